"""Serving one profile on a pool: apply its objects, wait stage by stage, answer once through the public way in.

Without an Ingress there is no public way in: the Service is for load from inside the cluster, which asks it first.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from pytest_gpulab.endpoint import Endpoint, distrust
from pytest_gpulab.kube.apply import apply
from pytest_gpulab.kube.client import Kube
from pytest_gpulab.kube.nodes import GPU, gpu_capacity, gpu_claims, wait_for_zero
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.pool import Pool
from pytest_gpulab.kube.teardown import Teardown, remove
from pytest_gpulab.kube.wait import WaitFailed, is_true, pod_failure, wait
from pytest_gpulab.render import RUN_LABEL

NODE_S: Final = 900.0
"""Cluster seconds until a pod must run on a GPU node. Karpenter gives a GPU that never registers all the time there
is, so this deadline is the only one."""
READY_S: Final = 1800.0
"""From the node to a Ready vLLM: image, weights, CUDA graphs."""
ADDRESS_S: Final = 600.0
"""Until the Ingress has its load balancer."""
ANSWER_S: Final = 600.0
"""Until the load balancer's name resolves and its targets are healthy."""

_ANSWER_TIMEOUT_S: Final = 10.0
_AUTOSCALER: Final = "HorizontalPodAutoscaler"
_INGRESS: Final = "networking.k8s.io/v1"


class NoCapacity(WaitFailed):
    """No pool could buy a machine."""


def serve(pool: Pool, objects: Sequence[Object], model: str, *, replicas: int = 1) -> Endpoint:
    """Have `objects` (a Deployment, its Service, an Ingress if any, and what goes with them) serve `model`.

    Applying what is there already changes nothing, so equal profiles share one deployment. The Secret among `objects`
    must hold the pool's API key.

    Args:
        replicas: how many a new deployment starts with, all of them Ready before this returns. From then on they are
            its autoscaler's business.

    Raises:
        NoCapacity: EC2 had no machine for any pool.
        WaitFailed: a stage failed or took too long; it says which, and what was last said about the objects.
        KubeError: the API server refused an object.
    """
    kube = pool.kube
    deployment = of_kind(objects, "Deployment")
    name = Ref.of(deployment)
    is_new = kube.get(name) is None
    old = shortages_so_far(kube)
    apply(kube, pool.ledger, [obj for obj in objects if obj["kind"] != _AUTOSCALER])
    if is_new and replicas > 1:
        kube.scale(name, replicas)
    ready = wait_for_replicas(pool, deployment, replicas if is_new else 1, old)
    # Not before: it would see idle replicas next to those that are still loading, and take these away.
    apply(kube, pool.ledger, [obj for obj in objects if obj["kind"] == _AUTOSCALER])
    way_in = next((obj for obj in objects if obj["kind"] == "Ingress"), None)
    url = wait_for_address(pool, way_in) if way_in else _service_url(of_kind(objects, "Service"))
    endpoint = endpoint_at(pool, url, model, pages=[metrics_url(kube, pod) for pod in ready])
    if way_in:
        wait_for_answer(pool, endpoint, deployment)
    return endpoint


def open_way_in(pool: Pool, objects: Sequence[Object], model: str) -> Endpoint:
    """Have the load balancer answer before there is anything behind it.

    Args:
        objects: the Secret, the Service and the Ingress.

    Raises:
        WaitFailed: it did not come, or does not answer.
        KubeError: the API server refused an object.
    """
    kube = pool.kube
    apply(kube, pool.ledger, objects)
    ingress = of_kind(objects, "Ingress")
    url = wait_for_address(pool, ingress)
    wait(
        kube,
        f"{url} to answer, if only that nobody is there",
        lambda: _status(f"{url}/v1/models") is not None,
        deadline_s=ANSWER_S,
        about=lambda: _existing(kube, Ref.of(ingress)),
    )
    return endpoint_at(pool, url, model)


def endpoint_at(pool: Pool, url: str, model: str, pages: Sequence[str] = ()) -> Endpoint:
    """The way in at `url`; metrics come through the API server."""
    kube = pool.kube
    return Endpoint(
        url,
        model,
        pool.api_key,
        metrics_urls=tuple(pages),
        metrics_headers=lambda: kube.headers,
        metrics_ca=kube.ca,
    )


def wait_for_replicas(pool: Pool, deployment: Object, wanted: int, old: frozenset[str]) -> list[Object]:
    """The pods of a Deployment once so many are Ready.

    Args:
        old: `shortages_so_far` before it was applied.

    Raises:
        NoCapacity: EC2 had no machine for any pool.
        WaitFailed: it took too long, or a container cannot run.
    """
    kube, name, pods = pool.kube, Ref.of(deployment), partial(_pods_of, pool.kube, deployment)

    def ready() -> list[Object]:
        return [pod for pod in pods() if is_true(pod, "Ready")]

    _wait_for_node(kube, pool.run, pods, old)
    wait(
        kube,
        f"vLLM of {name} to be Ready",
        lambda: len(ready()) >= wanted,
        deadline_s=READY_S,
        fails=lambda: pod_failure(pods()),
        about=pods,
    )
    return ready()


def wait_for_address(pool: Pool, way_in: Object) -> str:
    """Base URL of an Ingress's load balancer. WaitFailed when it gets none."""
    kube, ingress = pool.kube, Ref.of(way_in)
    scheme = _scheme(kube, way_in)
    return wait(
        kube,
        f"an address of {ingress}",
        lambda: _address(kube.get(ingress), scheme),
        deadline_s=ADDRESS_S,
        about=lambda: _existing(kube, ingress),
    )


def _service_url(service: Object) -> str:
    """As the cluster's DNS has it."""
    meta = service["metadata"]
    return f"http://{meta['name']}.{meta['namespace']}.svc"


def wait_for_answer(pool: Pool, endpoint: Endpoint, deployment: Object) -> None:
    """Until the public way leads to the model. WaitFailed when it does not."""
    kube, name, pods = pool.kube, Ref.of(deployment), partial(_pods_of, pool.kube, deployment)
    wait(
        kube,
        f"{endpoint.url}/v1/models to list {endpoint.model}",
        lambda: _answers(endpoint),
        deadline_s=ANSWER_S,
        fails=lambda: pod_failure(pods()),
        about=lambda: [*_existing(kube, name._replace(api_version=_INGRESS, kind="Ingress")), *pods()],
    )


def _pods_of(kube: Kube, deployment: Object) -> list[Object]:
    return kube.list("v1", "Pod", Ref.of(deployment).namespace, labels=selector_of(deployment))


def selector_of(deployment: Object) -> str:
    """What selects the pods of a Deployment."""
    return ",".join(f"{key}={value}" for key, value in deployment["spec"]["selector"]["matchLabels"].items())


def shortages_so_far(kube: Kube) -> frozenset[str]:
    """Uids of what Karpenter has said by now about capacity that it did not get: it says nothing about later."""
    return frozenset(event["metadata"]["uid"] for event in _shortages(kube))


def withdraw(pool: Pool, name: str) -> None:
    """Take what is served under `name` away again, and wait until Karpenter has given every machine back.

    Raises:
        WaitFailed: something did not go; it names what.
    """
    make_room(pool, name)
    wait_for_zero(pool.kube)


def make_room(pool: Pool, name: str) -> None:
    """Take what is served under `name` away again; the machine may serve the next. Nothing if it is not served.

    Raises:
        WaitFailed: something did not go; it names what.
    """
    ended = Teardown()
    remove(pool.kube, pool.run, [ref for ref in pool.ledger.refs() if ref.name == name], ended)
    if ended.problems:
        raise WaitFailed("; ".join(ended.problems))


def _wait_for_node(kube: Kube, run: str, pods: Callable[[], list[Object]], old: frozenset[str]) -> None:
    short = None

    def fails() -> str | None:
        nonlocal short
        short = _no_capacity(kube, run, old)
        return short

    try:
        wait(
            kube,
            "a GPU node that takes the pod",
            lambda: any(is_true(pod, "PodScheduled") for pod in pods()),
            deadline_s=NODE_S,
            fails=fails,
            about=lambda: [*gpu_capacity(kube), *pods()],
        )
    except WaitFailed as failed:
        raise (NoCapacity if short else WaitFailed)(str(failed)) from None


def _no_capacity(kube: Kube, run: str, old: frozenset[str]) -> str | None:
    """Why no pool can buy a machine: EC2 had none for any of them, and nothing is on its way.

    `old`: uids of shortages from before, which say nothing about now.
    """
    selector = f"{RUN_LABEL}={run}"
    pools = {
        pool["metadata"]["name"]
        for pool in kube.list("karpenter.sh/v1", "NodePool", labels=selector)
        if GPU in (pool["spec"].get("limits") or {})
    }
    short = [event for event in _shortages(kube) if event["metadata"]["uid"] not in old]
    refused = {pool for pool in pools if any(_of_pool(event, pool) for event in short)}
    if not pools or refused != pools or gpu_claims(kube):
        return None
    return f"insufficient capacity in every NodePool ({', '.join(sorted(refused))}): {short[-1]['message']}"


def _shortages(kube: Kube) -> list[Object]:
    """What Karpenter has said about capacity that it did not get."""
    return kube.list("v1", "Event", fields="reason=InsufficientCapacityError")


def _of_pool(event: Object, pool: str) -> bool:
    """Whether an event is about a NodeClaim of the pool: their names are the pool's and five letters."""
    about = event["involvedObject"]
    return about.get("kind") == "NodeClaim" and str(about.get("name")).rpartition("-")[0] == pool


def _address(ingress: Object | None, scheme: str = "http") -> str:
    """Base URL of the load balancer, empty before it has one. Only the embedded cluster names a port."""
    status = (ingress or {}).get("status") or {}
    for entry in (status.get("loadBalancer") or {}).get("ingress") or ():
        host = entry.get("hostname") or entry.get("ip")
        ports = [port["port"] for port in entry.get("ports") or ()]
        if host:
            return f"{scheme}://{host}" + (f":{ports[0]}" if ports else "")
    return ""


def _scheme(kube: Kube, ingress: Object) -> str:
    """What the load balancer speaks: HTTPS on 443 if the parameters of the Ingress's class have certificates, else
    HTTP on 80 (AWS Load Balancer Controller, default of `listen-ports`)."""
    params = kube.get(Ref("eks.amazonaws.com/v1", "IngressClassParams", ingress["spec"]["ingressClassName"]))
    return "https" if ((params or {}).get("spec") or {}).get("certificateARNs") else "http"


def metrics_url(kube: Kube, pod: Object) -> str:
    """The pod's /metrics through the API server: the load balancer shows only /v1."""
    meta = pod["metadata"]
    return f"{kube.url}/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}:8000/proxy/metrics"


def _status(url: str) -> int | None:
    """Of an answer without a key, whatever it is; None without one."""
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refusal:
        return refusal.code
    except (OSError, ValueError):
        return None


def _answers(endpoint: Endpoint) -> bool:
    """Whether the public way leads to the model. WaitFailed when it is not trusted, which time does not heal."""
    try:
        with endpoint.ask("/v1/models", _ANSWER_TIMEOUT_S) as answer:
            listed: dict[str, Any] = json.load(answer)
    except (OSError, ValueError) as failure:  # no such name yet, refused, 503 without targets, not JSON
        if isinstance(failure, OSError) and (why := distrust(endpoint.url, failure)):
            raise WaitFailed(why) from None
        return False
    return endpoint.model in (entry["id"] for entry in listed.get("data", ()))


def of_kind(objects: Sequence[Object], kind: str) -> Object:
    """The one of that kind. ValueError when there is none."""
    found = next((obj for obj in objects if obj["kind"] == kind), None)
    if found is None:
        raise ValueError(f"what serves must include a {kind}, got {', '.join(obj['kind'] for obj in objects)}")
    return found


def _existing(kube: Kube, ref: Ref) -> list[Object]:
    found = kube.get(ref)
    return [found] if found is not None else []
