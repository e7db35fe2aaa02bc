"""Karpenter's provisioner: unschedulable pods become NodeClaims."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from pytest_gpulab.cluster.clock import Clock, Timer
from pytest_gpulab.cluster.cloud import Cloud, Offering
from pytest_gpulab.cluster.conditions import condition, is_true
from pytest_gpulab.cluster.durations import Durations
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.karpenter import (
    INITIALIZED_LABEL,
    NODE_POOL_LABEL,
    TERMINATION,
    Batch,
    NewClaim,
    Pool,
    Room,
    Unavailable,
    WaitingPod,
    launch_order,
    plan,
)
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import Object, at, is_deleting, name_of, owner_reference, uid_of
from pytest_gpulab.cluster.placement import holds
from pytest_gpulab.cluster.quantity import Amounts, amounts, fits, plus, pod_requests, texts
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import NODE, NODE_CLAIM, NODE_POOL, POD
from pytest_gpulab.cluster.scheduler import free_on, is_waiting
from pytest_gpulab.cluster.store import Store

POD_POLL_S: Final = 10.0
"""A pod that is still unschedulable triggers again."""


def is_unschedulable(pod: Object) -> bool:
    """Whether the scheduler has found no node for it."""
    scheduled = condition(pod, "PodScheduled")
    return is_waiting(pod) and scheduled is not None and scheduled.get("reason") == "Unschedulable"


class Provisioner:
    """Batches pods and buys nodes for them."""

    watches = (POD,)

    def __init__(
        self, store: Store, clock: Clock, cloud: Cloud, durations: Durations, unavailable: Unavailable
    ) -> None:
        self._store = store
        self._clock = clock
        self._cloud = cloud
        self._durations = durations
        self._unavailable = unavailable
        self._events = Recorder(store, clock, "karpenter")
        self._batch = Batch()
        self._timer: Timer | None = None
        self._deciding = False

    def refs(self, event: Event) -> Iterable[Ref]:
        """Pods that no node takes."""
        return (ref_of(event),) if is_unschedulable(event.object) else ()

    def reconcile(self, ref: Ref) -> float | None:
        """Put the pod into the open batch."""
        pod = self._store.find(POD, *ref)
        if pod is None or not is_unschedulable(pod):
            return None
        self._batch.trigger(self._clock.now())
        self._wait()
        return POD_POLL_S

    def _wait(self) -> None:
        """Come back when the batch closes; while a batch is being decided the next one stays open."""
        if self._deciding or self._batch.opened is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clock.call_at(self._batch.closes, self._close)

    def _close(self) -> None:
        self._batch.close()
        self._deciding = True
        self._clock.call_later(self._durations.draw("decide"), self._decide)

    def _decide(self) -> None:
        self._deciding = False
        self._provision()
        self._wait()

    def _provision(self) -> None:
        """Plan for every pod that is unschedulable now."""
        now = self._clock.now()
        waiting = {uid_of(pod): pod for pod in self._store.list(POD) if is_unschedulable(pod)}
        if not waiting:
            return
        pods = [
            WaitingPod(uid, pod["spec"], pod_requests(pod["spec"]), pod["metadata"]["creationTimestamp"])
            for uid, pod in waiting.items()
        ]
        objects = {
            name_of(pool): pool
            for pool in self._store.list(NODE_POOL)
            if not is_deleting(pool)
            and is_true(pool, "Ready")  # "ignoring nodepool, not ready", says Karpenter's log
        }
        pools = [Pool.of(pool) for pool in objects.values()]
        offerings = [o for o in self._cloud.offerings if self._unavailable.allows(o, now)]
        result = plan(pods, self._rooms(), pools, offerings, self._used())
        for claim in result.claims:
            created = self._store.create(NODE_CLAIM, new_claim(claim, objects[claim.pool.name]))
            for uid in claim.pods:
                message = f"Pod should schedule on: nodeclaim/{name_of(created)}"
                self._events.normal(waiting[uid], "Nominated", message)
        for uid, why in result.errors.items():
            self._events.warning(waiting[uid], "FailedScheduling", f"Failed to schedule pod, {why}")

    def _rooms(self) -> list[Room]:
        """Nodes that work, then those on their way, oldest first. Nodes that are leaving take nobody."""
        claims = [claim for claim in self._store.list(NODE_CLAIM) if not is_deleting(claim)]
        by_node = {at(claim, "status.nodeName"): claim for claim in claims}
        nodes = [
            node
            for node in self._store.list(NODE)
            if not is_deleting(node) and (name_of(node) not in by_node or node_is_initialized(node))
        ]
        ready = {name_of(node) for node in nodes}
        rooms = [
            Room(name_of(n), n["metadata"].get("labels") or {}, at(n, "spec.taints", []), free_on(self._store, n))
            for n in nodes
        ]
        return rooms + [self._coming(c) for c in claims if at(c, "status.nodeName") not in ready]

    def _coming(self, claim: Object) -> Room:
        """What a NodeClaim will bring, and what its pods have taken of it."""
        options = claim_options(claim, self._cloud.offerings)
        free = amounts(at(claim, "status.allocatable")) or _least(options)
        for pod in self._store.list(POD):
            if at(claim, "status.nodeName") and pod["spec"].get("nodeName") == at(claim, "status.nodeName"):
                free = plus(free, pod_requests(pod["spec"]), -1)
        labels = dict(claim["metadata"].get("labels") or {})
        best = launch_order(options)
        return Room(name_of(claim), {**(best[0].labels() if best else {}), **labels}, claim["spec"]["taints"], free)

    def _used(self) -> dict[str, Amounts]:
        """Capacity that each pool has bought: of claims that are not launched, the most they could be."""
        used: dict[str, Amounts] = {}
        for claim in self._store.list(NODE_CLAIM):
            capacity = amounts(at(claim, "status.capacity"))
            if not capacity:
                capacity = _most(claim_options(claim, self._cloud.offerings))
            pool = (claim["metadata"].get("labels") or {}).get(NODE_POOL_LABEL, "")
            used[pool] = plus(used.get(pool, {}), capacity)
        return used


def node_is_initialized(node: Object) -> bool:
    """Whether Karpenter counts on what the node says of itself."""
    return (node["metadata"].get("labels") or {}).get(INITIALIZED_LABEL) == "true"


def _least(options: list[Offering]) -> Amounts:
    names = set.intersection(*(set(o.type.allocatable) for o in options)) if options else set()
    return {name: min(o.type.allocatable[name] for o in options) for name in sorted(names)}


def _most(options: list[Offering]) -> Amounts:
    names = {name for o in options for name in o.type.capacity}
    return {name: max(o.type.capacity.get(name, 0) for o in options) for name in sorted(names)}


def claim_options(claim: Object, offerings: Iterable[Offering]) -> list[Offering]:
    """The offerings that a NodeClaim may be launched as, whether they have capacity or not."""
    labels = claim["metadata"].get("labels") or {}
    wanted = amounts(at(claim, "spec.resources.requests"))
    return [
        offering
        for offering in offerings
        if fits(wanted, offering.type.allocatable)
        and all(holds(item, {**offering.labels(), **labels}) for item in claim["spec"]["requirements"])
    ]


def new_claim(claim: NewClaim, pool: Object) -> Object:
    """The NodeClaim object for a planned claim."""
    template = pool["spec"]["template"]["spec"]
    keys: dict[str, set[str]] = {
        "node.kubernetes.io/instance-type": {o.type.name for o in claim.options},
        "topology.kubernetes.io/zone": {o.zone for o in claim.options},
        "karpenter.sh/capacity-type": {o.capacity_type for o in claim.options},
    }
    requests = dict(sorted(texts(claim.requests).items()))
    spec: dict[str, Any] = {
        "nodeClassRef": template.get("nodeClassRef") or {},
        "requirements": [{"key": key, "operator": "In", "values": sorted(values)} for key, values in keys.items()],
        "resources": {"requests": requests},
        "taints": [dict(taint) for taint in claim.pool.taints],
        "startupTaints": [dict(taint) for taint in claim.pool.startup_taints],
        "expireAfter": template.get("expireAfter", "720h"),
    }
    if template.get("terminationGracePeriod"):
        spec["terminationGracePeriod"] = template["terminationGracePeriod"]
    return {
        "metadata": {
            "generateName": f"{claim.pool.name}-",
            "labels": {**claim.pool.labels, NODE_POOL_LABEL: claim.pool.name},
            "ownerReferences": [owner_reference(pool, controller=False)],
            # Karpenter adds its finalizer before it launches anything, so that nothing launched is forgotten.
            "finalizers": [TERMINATION],
        },
        "spec": spec,
    }
