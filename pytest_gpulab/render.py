"""The manifests, filled in: what a GPU pool and a served profile are made of, as Kubernetes objects.

The YAML in `manifests/` is valid as it is and says everything that is always the same. What depends on the profile,
its fleet and the run is laid over it here. Objects are plain JSON and the caller's to change.
"""

from __future__ import annotations

import copy
import math
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final

import yaml

from pytest_gpulab.experiment import Profile
from pytest_gpulab.fleet import Autoscaling, Fleet
from pytest_gpulab.vllm_args import to_argv

Object = dict[str, Any]

NAMESPACE: Final = "gpulab"
MANAGED_LABEL: Final = "app.kubernetes.io/managed-by"
RUN_LABEL: Final = "gpulab.dev/run"
"""On objects; and as a tag on what AWS makes for them: instances, volumes, load balancers."""
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"

MOST_CONFIG_BYTES: Final = 1_000_000
"""A ConfigMap's data may have 1 MiB, keys included."""

_MIB: Final = 1 << 20
_POOL_FILES: Final = (
    "00-namespace",
    "network-policies",
    "prometheus",
    "prometheus-adapter",
    "dcgm-exporter",
    "ingressclass",
)


@dataclass(frozen=True)
class Machines:
    """What EKS gives GPU nodes: the role they run as, and where in the network they are."""

    role: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]


@dataclass(frozen=True)
class PublicAccess:
    """A load balancer that the internet reaches: TLS only, and only from these addresses."""

    certificate_arn: str
    cidrs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.certificate_arn or not self.cidrs:
            raise ValueError(
                "public access needs a TLS certificate's ARN and at least one CIDR block, got "
                f"certificate_arn={self.certificate_arn!r}, cidrs={self.cidrs!r}"
            )


def pool_objects(
    fleet: Fleet,
    instance_types: Sequence[str],
    *,
    run: str,
    machines: Machines | None = None,
    public: PublicAccess | None = None,
) -> list[Object]:
    """Everything that serves no model yet, in the order to create it.

    Args:
        fleet: its capacity, limits and consolidation are the pools'.
        instance_types: what the pools may buy, e.g. `Profile.machine`.
        run: the id that labels every object.
        machines: None: the manifest's, which only an embedded cluster accepts.
        public: None: the load balancer is internal.
    """
    fixed = [obj for file in _POOL_FILES for obj in documents(file)]
    load_balancer = _only("IngressClassParams", fixed)["spec"]
    load_balancer["tags"].append({"key": RUN_LABEL, "value": run})
    if public:
        load_balancer |= _open_to(public)
    return [*_labelled(fixed, run), *gpu_capacity(fleet, instance_types, run=run, machines=machines)]


def gpu_capacity(
    fleet: Fleet, instance_types: Sequence[str], *, run: str, machines: Machines | None = None
) -> list[Object]:
    """The NodeClass, and a NodePool for each capacity type of the fleet."""
    (node_class,) = documents("nodeclass")
    node_class["spec"]["tags"][RUN_LABEL] = run
    if machines:
        node_class["spec"] |= {
            "role": machines.role,
            "subnetSelectorTerms": [{"id": subnet} for subnet in machines.subnets],
            "securityGroupSelectorTerms": [{"id": group} for group in machines.security_groups],
        }
    pools = [pool for pool in documents("nodepools") if _capacity_of(pool) in fleet.capacity]
    for pool in pools:
        _limit(pool, fleet, instance_types)
    return _labelled([node_class, *pools], run)


def metric_rules(*, run: str) -> list[Object]:
    """The adapter's ConfigMap alone: which custom metrics there are."""
    return _labelled([_only("ConfigMap", documents("prometheus-adapter"))], run)


def owned_cluster_objects(*, run: str) -> list[Object]:
    """What changes a whole cluster, and so is applied only to one that was created for the lab."""
    return _labelled(documents("network-policy-controller"), run)


def serving_objects(profile: Profile, fleet: Fleet | None, *, run: str, api_key: str) -> list[Object]:
    """The model servers of one profile and the way to them, all named `serving_name(profile)`.

    A Deployment that an autoscaler owns has no ``replicas``. It starts with one; scale it to ``fleet.deployed`` once,
    after it is created. Without a fleet there is one replica and no autoscaler.

    Args:
        run: the id that labels every object.
        api_key: what clients must show; it goes into a Secret and nowhere else.
    """
    name = serving_name(profile)
    deployment, service, ingress = (_named(obj, name) for obj in documents("vllm"))
    _fill_deployment(deployment, profile, fleet)
    ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"] = name
    objects = [_secret(name, api_key), deployment, service, ingress]
    if fleet and fleet.autoscaling:
        objects.append(_autoscaler(name, fleet.autoscaling))
    return _labelled(objects, run)


def load_objects(
    name: str,
    *,
    run: str,
    service: str,
    share: str,
    code: bytes,
    pods: int,
    memory_bytes: float,
    longest_s: float,
    ready_s: float,
    speed: float = 1.0,
) -> list[Object]:
    """An Indexed Job that loads a served model from inside the cluster, its ConfigMap, and what both need.

    Args:
        name: of Job and ConfigMap.
        run: the id that labels every object.
        service: of the model, `serving_name`; its Secret has the same name.
        share: what is sent, without the API key.
        code: the archive that sends it.
        memory_bytes: of each pod.
        longest_s: real seconds that sending may take.
        ready_s: cluster seconds until the pods run.
        speed: cluster seconds in one real second.

    Raises:
        ValueError: it is more than a ConfigMap holds.
    """
    pool, policy, config, job = documents("load")
    if (size := len(share.encode()) + len(b64encode(code))) > MOST_CONFIG_BYTES:
        raise ValueError(
            f"what a pod is told must fit into a ConfigMap of {MOST_CONFIG_BYTES:,} bytes, got {size:,}: shorten the "
            "trace, or load from the client's machine"
        )
    config["metadata"]["name"] = name
    config |= {"data": {"share.json": share}, "binaryData": {"gpulab.zip": b64encode(code).decode()}}
    _fill_job(job, name, service, pods, memory_bytes)
    job["spec"] |= {
        "activeDeadlineSeconds": math.ceil(ready_s + longest_s * speed),
        "ttlSecondsAfterFinished": math.ceil(job["spec"]["ttlSecondsAfterFinished"] * speed),
    }
    pod = job["spec"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = math.ceil(pod["terminationGracePeriodSeconds"] * speed)
    return _labelled([pool, policy, config, job], run)


def serving_name(profile: Profile) -> str:
    """A DNS label that tells this profile from every other: model, accelerator, and a digest of all of it."""
    words = re.sub(r"[^a-z0-9]+", "-", f"vllm-{profile.model}-{profile.accelerator}".lower()).strip("-")
    return f"{words[:40].rstrip('-')}-{profile.definition_hash[:8]}"


def documents(file: str) -> list[Object]:
    """The objects of ``manifests/FILE.yaml``, a copy."""
    return copy.deepcopy(_parsed(file))


def manifest_files() -> list[str]:
    """The names of all manifests, without ``.yaml``."""
    folder = files("pytest_gpulab.manifests")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


@cache
def _parsed(file: str) -> list[Object]:
    text = (files("pytest_gpulab.manifests") / f"{file}.yaml").read_text(encoding="utf-8")
    return list(yaml.safe_load_all(text))


# --- what is laid over them -----------------------------------------------------------------------------------------


def _labelled(objects: Iterable[Object], run: str) -> list[Object]:
    """Who made them, on the objects and on the pods and nodes they make."""
    added = {MANAGED_LABEL: "gpulab", RUN_LABEL: run}
    labelled = list(objects)
    for obj in labelled:
        made = obj.get("spec", {}).get("template")
        for meta in (obj["metadata"], *([made["metadata"]] if made else ())):
            meta["labels"] = {**meta.get("labels", {}), **added}
    return labelled


def _only(kind: str, objects: Iterable[Object]) -> Object:
    (found,) = (obj for obj in objects if obj["kind"] == kind)
    return found


def _open_to(public: PublicAccess) -> Object:
    """With a certificate the controller listens on HTTPS 443 alone; Auto Mode's guide does not know `listeners`."""
    return {
        "scheme": "internet-facing",
        "inboundCIDRs": list(public.cidrs),
        "certificateARNs": [public.certificate_arn],
    }


def _requirement(pool: Object, key: str) -> Object:
    (found,) = (item for item in pool["spec"]["template"]["spec"]["requirements"] if item["key"] == key)
    requirement: Object = found
    return requirement


def _capacity_of(pool: Object) -> str:
    (capacity,) = _requirement(pool, "karpenter.sh/capacity-type")["values"]
    return str(capacity)


def _limit(pool: Object, fleet: Fleet, instance_types: Sequence[str]) -> None:
    _requirement(pool, "node.kubernetes.io/instance-type")["values"] = sorted(set(instance_types))
    pool["spec"]["limits"] = {"nvidia.com/gpu": str(fleet.max_gpus)}
    pool["spec"]["disruption"]["consolidateAfter"] = f"{fleet.consolidate_after_s}s"


def _named(obj: Object, name: str) -> Object:
    """Renamed, with selectors and pods to match."""
    spec = obj["spec"]
    obj["metadata"]["name"] = obj["metadata"]["labels"][INSTANCE_LABEL] = name
    if obj["kind"] == "Service":
        spec["selector"][INSTANCE_LABEL] = name
    if obj["kind"] == "Deployment":
        spec["selector"]["matchLabels"][INSTANCE_LABEL] = name
        spec["template"]["metadata"]["labels"][INSTANCE_LABEL] = name
    return obj


def _fill_deployment(deployment: Object, profile: Profile, fleet: Fleet | None) -> None:
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain_s = fleet.drain_s if fleet else _said(container["args"], "--shutdown-timeout")
    container["args"] = [*to_argv(profile), "--shutdown-timeout", str(drain_s)]
    for variable in container["env"]:
        if variable["name"] == "VLLM_API_KEY":
            variable["valueFrom"]["secretKeyRef"]["name"] = deployment["metadata"]["name"]
    if fleet is None or fleet.autoscaling is None:
        deployment["spec"]["replicas"] = fleet.deployed if fleet else 1
    if fleet is None:
        return
    period_s = fleet.readiness_period_s
    startup = container["startupProbe"]
    longest_s = startup["periodSeconds"] * startup["failureThreshold"]
    startup |= {"periodSeconds": period_s, "failureThreshold": max(1, longest_s // period_s)}
    container["readinessProbe"]["periodSeconds"] = period_s
    pod["terminationGracePeriodSeconds"] = fleet.pre_stop_s + fleet.grace_s
    if fleet.pre_stop_s:
        container["lifecycle"]["preStop"]["sleep"]["seconds"] = fleet.pre_stop_s
    else:
        del container["lifecycle"]


def _fill_job(job: Object, name: str, service: str, pods: int, memory_bytes: float) -> None:
    job["metadata"]["name"] = name
    job["spec"] |= {"completions": pods, "parallelism": pods}
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for variable in container["env"]:
        if variable["name"] == "GPULAB_LOAD_SERVICE":
            variable["value"] = service
        elif variable["name"] == "GPULAB_API_KEY":
            variable["valueFrom"]["secretKeyRef"]["name"] = service
    memory = f"{math.ceil(memory_bytes / _MIB)}Mi"
    container["resources"]["requests"]["memory"] = container["resources"]["limits"]["memory"] = memory
    (mounted,) = (volume for volume in pod["volumes"] if "configMap" in volume)
    mounted["configMap"]["name"] = name


def _said(args: Sequence[str], flag: str) -> str:
    """The value of a flag."""
    return args[list(args).index(flag) + 1]


def _secret(name: str, api_key: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {INSTANCE_LABEL: name}},
        "data": {"api-key": b64encode(api_key.encode()).decode()},
    }


def _autoscaler(name: str, scaling: Autoscaling) -> Object:
    (hpa,) = documents(f"hpa-{scaling.policy}")
    hpa["metadata"]["name"] = hpa["metadata"]["labels"][INSTANCE_LABEL] = name
    spec = hpa["spec"]
    spec["scaleTargetRef"]["name"] = name
    spec |= {"minReplicas": scaling.min_replicas, "maxReplicas": scaling.max_replicas}
    spec["metrics"][0]["pods"]["target"]["averageValue"] = _quantity(scaling.target)
    if scaling.scale_down_window_s is not None:
        spec["behavior"] = {"scaleDown": {"stabilizationWindowSeconds": scaling.scale_down_window_s}}
    return hpa


def _quantity(value: float) -> str:
    """As Kubernetes writes it: 8, or 2500m."""
    thousandths = round(value * 1000)
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)
