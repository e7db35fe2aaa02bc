"""A fleet on a cluster: deployed at a run's start or warm before it, watched, harmed, and back to zero GPU nodes.

The capacity and the way in are there first. A run from zero does not wait for anything else: the load begins when the
Deployment appears, and its clients get 503 from the load balancer until the first replica is Ready.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.fleet import NO_FAULTS, NO_VICTIM, Faults, Fleet, no_victim, too_late
from pytest_gpulab.kube.apply import apply
from pytest_gpulab.kube.nodes import POOL_LABEL
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.pool import Pool
from pytest_gpulab.kube.serving import (
    metrics_url,
    of_kind,
    open_way_in,
    selector_of,
    shortages_so_far,
    wait_for_answer,
    wait_for_replicas,
)
from pytest_gpulab.kube.teardown import Teardown, remove
from pytest_gpulab.kube.wait import WaitFailed, wait
from pytest_gpulab.kube.watch import watch
from pytest_gpulab.timeline import Entry, Timeline, is_ready

CUSTOM_METRICS: Final = "custom.metrics.k8s.io/v1beta1"
CUSTOM_METRICS_S: Final = 900.0
"""Cluster seconds until the adapter answers: its own machine, image and start."""
LATE_S: Final = 2.0
"""A deployment that appears so long after the run's start has not started with it."""
_HEARD_S: Final = 10.0
"""Until the watches have heard of the last machine's end."""

_NODE_POOL: Final = "NodePool"
_WAY_IN: Final = ("Secret", "Service", "Ingress")
_AUTOSCALER: Final = "HorizontalPodAutoscaler"
_POD_DELETION: Final = "pod deletion"

Orders = Callable[[Faults], Object]
"""The object that tells an emulated cloud what goes wrong from now on; its own times count from then."""
Observe = Callable[[Sequence[Object], float], None]
"""Takes the NodeClaims that there are at a moment (Unix seconds)."""


class FleetRun:
    """One run of a fleet. Its `begin` and `pages` are for the load generator; times are Unix seconds.

    Attributes:
        endpoint: the way in, which is open before the first replica.
        problems: why the run is no valid evidence.
    """

    def __init__(
        self,
        pool: Pool,
        fleet: Fleet,
        serving: Sequence[Object],
        endpoint: Endpoint,
        *,
        orders: Orders | None,
        observe: Observe,
    ) -> None:
        self.endpoint = endpoint
        self.problems: list[str] = []
        self.started = 0.0
        self._pool = pool
        self._fleet = fleet
        self._orders = orders
        self._observe = observe
        self._deployment = of_kind(serving, "Deployment")
        self._autoscaler = [obj for obj in serving if obj["kind"] == _AUTOSCALER]
        self._timeline = Timeline(0.0)
        self._pods: dict[str, Object] = {}
        self._served: set[str] = set()
        self._claims: dict[str, Object] = {}
        self._given_back: set[str] = set()
        self._listening = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ended = threading.Event()
        self._acting: threading.Thread | None = None

    # --- for the load generator ---------------------------------------------------------------------------------

    def begin(self, start: float) -> None:
        """The run starts at `start`: deploy then what is not warm, and let the faults happen."""
        with self._lock:
            self.started = self._timeline.start = start
        self._acting = threading.Thread(target=self._act, args=(start,), name="fleet", daemon=True)
        self._acting.start()

    def pages(self) -> Mapping[str, bool]:
        """Metrics pages of the pods that have served; whether each is Ready."""
        with self._lock:
            return {
                metrics_url(self._pool.kube, pod): is_ready(pod)
                for uid, pod in self._pods.items()
                if uid in self._served
            }

    def timeline(self) -> tuple[Entry, ...]:
        """What has happened, seconds from the run's start; worded as in the simulation."""
        with self._lock:
            return tuple(sorted(self._timeline.entries(), key=lambda entry: entry[0]))

    # --- its life -----------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Watch what becomes of it from now on."""
        kube, space = self._pool.kube, self._deployment["metadata"]["namespace"]
        selector = selector_of(self._deployment)
        watch(kube, self._over, "v1", "Event", self._heard_event)
        self._listening = True
        watch(kube, self._over, "karpenter.sh/v1", "NodeClaim", self._heard_claim, labels=POOL_LABEL)
        watch(kube, self._over, "v1", "Node", self._heard_node, labels=POOL_LABEL)
        watch(kube, self._over, "v1", "Pod", self._heard_pod, namespace=space, labels=selector)
        watch(kube, self._over, "apps/v1", "Deployment", self._heard, namespace=space, labels=selector)

    def warm_up(self) -> None:
        """Deploy, and wait until the warm replicas are Ready and answer. WaitFailed says what did not come."""
        old = shortages_so_far(self._pool.kube)
        self._deploy()
        wait_for_replicas(self._pool, self._deployment, self._fleet.warm, old)
        wait_for_answer(self._pool, self.endpoint, self._deployment)
        self._scale()

    def end(self) -> None:
        """The load is over: let nothing happen any more that was to happen in the run."""
        self._ended.set()
        if self._acting is not None:
            self._acting.join()

    def stop_watching(self) -> None:
        """Hear nothing any more; the timeline stays as it is."""
        self._over.set()

    def is_back_at_zero(self) -> bool:
        """Whether the watches have heard that the last machine is gone."""
        counts = next((text for _, text in reversed(self.timeline()) if text.startswith("replicas ")), "")
        return not counts or counts.endswith("0 ready, nodes 0, nodeclaims 0")

    def _act(self, start: float) -> None:
        try:
            if not self._sleep_until(start):
                return
            if self._orders is not None:
                apply(self._pool.kube, self._pool.ledger, [self._orders(_of_the_cloud(self._fleet.faults))])
            if not self._fleet.warm:
                self._deploy()
                if (late := time.time() - start) > LATE_S:
                    self._problem(f"the deployment appeared {late:.1f} s after the run's start")
                self._scale()
            for moment in sorted(self._fleet.faults.pod_deletions):
                if self._sleep_until(start + moment):
                    self._delete_oldest_pod(moment)
                else:
                    self._problem(too_late(_POD_DELETION, moment))
        except Exception as error:  # in a thread of its own: it must not go unnoticed
            self._problem(f"what was to happen to the fleet did not: {error}")

    def _sleep_until(self, moment: float) -> bool:
        """False when the run is over before."""
        return not self._ended.wait(max(0.0, moment - time.time()))

    def _deploy(self) -> None:
        apply(self._pool.kube, self._pool.ledger, [self._deployment])
        if self._fleet.autoscaling is not None and self._fleet.deployed > 1:
            self._pool.kube.scale(Ref.of(self._deployment), self._fleet.deployed)

    def _scale(self) -> None:
        """From now on the replicas are the autoscaler's business, if there is one."""
        apply(self._pool.kube, self._pool.ledger, self._autoscaler)

    def _delete_oldest_pod(self, moment: float) -> None:
        with self._lock:
            ready = [pod for pod in self._pods.values() if is_ready(pod)]
        if not ready:
            self._problem(no_victim(_POD_DELETION, moment, "Ready pod"))
            return
        oldest = min(ready, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
        self._pool.kube.delete(Ref.of(oldest))

    # --- what is heard ------------------------------------------------------------------------------------------

    def _heard(self, obj: Object, gone: bool) -> None:
        with self._lock:
            self._timeline.changed(time.time(), obj, gone=gone)

    def _heard_pod(self, pod: Object, gone: bool) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            if gone:
                self._pods.pop(uid, None)
            else:
                self._pods[uid] = pod
            if is_ready(pod):
                self._served.add(uid)
        self._heard(pod, gone)

    def _heard_claim(self, claim: Object, gone: bool) -> None:
        uid = claim["metadata"]["uid"]
        with self._lock:
            if gone or uid in self._given_back:
                self._claims.pop(uid, None)
            else:
                self._claims[uid] = claim
            self._observe(list(self._claims.values()), time.time())
        self._heard(claim, gone)

    def _heard_node(self, node: Object, gone: bool) -> None:
        """A node goes when its machine has: nobody pays for that any more, though its NodeClaim may stay a while."""
        if gone:
            name = node["metadata"]["name"]
            with self._lock:
                of_it = [uid for uid, claim in self._claims.items() if _node_name(claim) == name]
                self._given_back.update(of_it)
                for uid in of_it:
                    del self._claims[uid]
                self._observe(list(self._claims.values()), time.time())
        self._heard(node, gone)

    def _heard_event(self, event: Object, gone: bool) -> None:
        if self._listening and not gone:  # what was said before the run is not about it
            with self._lock:
                self._timeline.said(time.time(), event)
            if event.get("reason") == NO_VICTIM:
                self._problem(event["message"])

    def _problem(self, text: str) -> None:
        if text not in self.problems:  # an Event is heard again when it is counted up
            self.problems.append(text)


@contextmanager
def deployed(
    pool: Pool,
    fleet: Fleet,
    serving: Sequence[Object],
    model: str,
    *,
    capacity: Sequence[Object],
    restored: Sequence[Object],
    orders: Orders | None,
    observe: Observe,
) -> Iterator[FleetRun]:
    """A run of `fleet`, whose load is to be sent in the block; after it there is no GPU node.

    The way in stays for the next run of the same fleet. After Ctrl-C everything stays for the session's teardown.

    Args:
        serving: what serves `model`: a Secret, a Deployment, its Service, Ingress and perhaps an autoscaler.
        capacity: the NodeClass and the NodePools that the fleet asks for.
        restored: those that the pool has without it.
        orders: for the emulated cloud; None: the cloud is real and does what it wants.
        observe: hears of NodeClaims at each change of them, for the bill.

    Raises:
        NoCapacity: EC2 had no machine for the warm replicas.
        WaitFailed: a stage failed or took too long, or something did not go.
        KubeError: the API server refused an object.
    """
    kube, ledger = pool.kube, pool.ledger
    _remove(pool, [ref for ref in ledger.refs() if ref.kind == _NODE_POOL])
    apply(kube, ledger, capacity)
    if orders is not None:
        apply(kube, ledger, [orders(NO_FAULTS)])
    endpoint = open_way_in(pool, [obj for obj in serving if obj["kind"] in _WAY_IN], model)
    if fleet.autoscaling is not None:
        wait(
            kube,
            f"{CUSTOM_METRICS}, which the autoscaler asks",
            lambda: kube.serves(CUSTOM_METRICS),
            deadline_s=CUSTOM_METRICS_S,
            about=lambda: kube.list("v1", "Pod", labels="app.kubernetes.io/name=prometheus-adapter"),
        )
    run = FleetRun(pool, fleet, serving, endpoint, orders=orders, observe=observe)
    interrupted = True
    try:
        run.follow()
        if fleet.warm:
            run.warm_up()
        yield run
        interrupted = False
    except Exception:
        interrupted = False
        raise
    finally:
        run.end()
        try:
            if not interrupted:
                _withdraw(pool, serving, orders, run)
                apply(kube, ledger, restored)
        finally:
            run.stop_watching()


def _withdraw(pool: Pool, serving: Sequence[Object], orders: Orders | None, run: FleetRun) -> None:
    """Replicas and machines go, the way in stays. WaitFailed names what does not go."""
    if orders is not None:
        apply(pool.kube, pool.ledger, [orders(NO_FAULTS)])
    replicas = {Ref.of(obj) for obj in serving if obj["kind"] not in _WAY_IN}
    _remove(pool, [ref for ref in pool.ledger.refs() if ref in replicas or ref.kind == _NODE_POOL])
    deadline = time.monotonic() + _HEARD_S
    while not run.is_back_at_zero() and time.monotonic() < deadline:
        time.sleep(0.05)


def _remove(pool: Pool, refs: Sequence[Ref]) -> None:
    ended = Teardown()
    remove(pool.kube, pool.run, refs, ended)
    if ended.problems:
        raise WaitFailed("; ".join(ended.problems))


def _node_name(claim: Object) -> str:
    return str((claim.get("status") or {}).get("nodeName") or "")


def _of_the_cloud(faults: Faults) -> Faults:
    """Pods are deleted through the API, on any cluster."""
    return faults.model_copy(update={"pod_deletions": ()})
