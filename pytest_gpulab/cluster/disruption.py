"""Karpenter takes nodes away: empty, unneeded and expired ones, those whose spot capacity ends, those that are lost.

Facts from sigs.k8s.io/karpenter v1: pkg/controllers/nodeclaim (podevents, disruption/consolidation.go, expiration,
garbagecollection every 2 min) and pkg/controllers/disruption (poll 10 s, validation 15 s).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.cloud import Cloud, Instance
from pytest_gpulab.cluster.conditions import is_true, since, with_condition, with_status
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.karpenter import (
    DISRUPTION_POLL_S,
    GARBAGE_POLL_S,
    NODE_POOL_LABEL,
    VALIDATION_S,
    Pool,
    Room,
    Unavailable,
    WaitingPod,
    allowed_disruptions,
    consolidatable_at,
    must_not_be_disrupted,
)
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.nodeclaims import claim_of, node_of
from pytest_gpulab.cluster.objects import Object, at, controller_of, is_deleting, name_of, seconds, timestamp, uid_of
from pytest_gpulab.cluster.provisioning import is_unschedulable, node_is_initialized
from pytest_gpulab.cluster.quantity import duration, plus, pod_requests
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import NODE, NODE_CLAIM, NODE_POOL, POD
from pytest_gpulab.cluster.scheduler import free_on, is_terminal
from pytest_gpulab.cluster.store import Store


class PodEvents:
    """Writes into a NodeClaim when a pod was last scheduled to its node, ended or was told to end."""

    watches = (POD,)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def refs(self, event: Event) -> Iterable[Ref]:
        """Nothing to reconcile: the event itself is what counts."""
        pod, before = event.object, event.previous
        if event.type != DELETED and pod["spec"].get("nodeName"):
            ending = is_deleting(pod) or is_terminal(pod)
            was_ending = before is not None and (is_deleting(before) or is_terminal(before))
            scheduled = is_true(pod, "PodScheduled") and not (before is not None and is_true(before, "PodScheduled"))
            if (ending and not was_ending) or (scheduled and not ending):
                self._note(pod)
        return ()

    def reconcile(self, ref: Ref) -> float | None:
        """Never asked for."""
        return None

    def _note(self, pod: Object) -> None:
        node = self._store.find(NODE, pod["spec"]["nodeName"])
        claim = claim_of(self._store, node) if node else None
        owner = controller_of(pod)
        if claim is not None and not (owner and owner["kind"] == "DaemonSet"):
            stamp = {"lastPodEventTime": timestamp(self._clock.now())}
            self._store.patch_status(NODE_CLAIM, name_of(claim), "", stamp)


class Consolidatable:
    """Keeps the Consolidatable condition of every NodeClaim."""

    watches = (NODE_CLAIM, NODE_POOL)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def refs(self, event: Event) -> Iterable[Ref]:
        """The claim; all claims of a pool."""
        if event.resource is NODE_CLAIM:
            return (ref_of(event),)
        claims = self._store.list(NODE_CLAIM, labels=f"{NODE_POOL_LABEL}={name_of(event.object)}")
        return tuple((name_of(claim), "") for claim in claims)

    def reconcile(self, ref: Ref) -> float | None:
        """Set or clear it; seconds until it will be time."""
        claim = self._store.find(NODE_CLAIM, *ref)
        pool = _pool_of(self._store, claim) if claim else None
        if claim is None or pool is None or is_deleting(claim):
            return None
        now = self._clock.now()
        initialized = since(claim, "Initialized") if is_true(claim, "Initialized") else None
        last = at(claim, "status.lastPodEventTime")
        due = consolidatable_at(initialized, seconds(last) if last else None, pool.consolidate_after)
        if now >= due:
            if not is_true(claim, "Consolidatable"):
                self._store.update_status(NODE_CLAIM, with_condition(claim, now, "Consolidatable", True))
            return None
        if is_true(claim, "Consolidatable"):
            kept = [item for item in at(claim, "status.conditions", []) if item["type"] != "Consolidatable"]
            self._store.update_status(NODE_CLAIM, with_status(claim, conditions=kept))
        return None if due == float("inf") else due - now


class Expiration:
    """Deletes a NodeClaim that is older than its expireAfter, whatever the budgets say."""

    watches = (NODE_CLAIM,)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def refs(self, event: Event) -> Iterable[Ref]:
        """The claim."""
        return (ref_of(event),)

    def reconcile(self, ref: Ref) -> float | None:
        """Delete it if it is time; seconds until it will be."""
        claim = self._store.find(NODE_CLAIM, *ref)
        if claim is None or is_deleting(claim):
            return None
        lives = duration(at(claim, "spec.expireAfter"))
        if lives is None:
            return None
        left = seconds(claim["metadata"]["creationTimestamp"]) + lives - self._clock.now()
        if left > 0:
            return left
        self._store.delete(NODE_CLAIM, name_of(claim))
        return None


class Disruption:
    """Polls every 10 s for nodes that are not needed, and takes them 15 s later if that still holds."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._events = Recorder(store, clock, "karpenter")

    def start(self) -> None:
        """Poll from now on."""
        self._clock.call_later(DISRUPTION_POLL_S, self._poll)

    def _poll(self) -> None:
        chosen = self._candidates()
        if not chosen:
            self.start()
            return
        self._clock.call_later(VALIDATION_S, lambda: self._execute([uid_of(claim) for claim in chosen]))

    def _execute(self, uids: list[str]) -> None:
        """All of them or none: pod churn in between makes the decision void."""
        valid = {uid_of(claim): claim for claim in self._candidates()}
        if all(uid in valid for uid in uids):
            for uid in uids:
                claim = valid[uid]
                reason = "Empty" if not self._pods_on(claim) else "Underutilized"
                self._events.normal(claim, "DisruptionTerminating", f"Disrupting NodeClaim: {reason}")
                self._store.delete(NODE_CLAIM, name_of(claim))
        self.start()

    def _candidates(self) -> list[Object]:
        """Empty nodes; without any, the first node whose pods fit on the others."""
        claims = [claim for claim in self._store.list(NODE_CLAIM) if self._may_go(claim)]
        empty = [claim for claim in claims if not self._pods_on(claim)]
        within = self._within_budgets(empty, "Empty")
        if within:
            return within
        used = [claim for claim in claims if claim not in empty]  # a budget that holds the empty ones holds them here
        return self._within_budgets([claim for claim in used if self._fit_elsewhere(claim)], "Underutilized")[:1]

    def _may_go(self, claim: Object) -> bool:
        node = node_of(self._store, claim)
        return (
            node is not None
            and is_true(claim, "Consolidatable")
            and not is_deleting(claim)
            and not any(map(must_not_be_disrupted, (claim, node)))
            and not self._nominated(node)
        )

    def _nominated(self, node: Object) -> bool:
        """Whether an unschedulable pod would run there: the provisioner counts on the node."""
        waiting = [pod for pod in self._store.list(POD) if is_unschedulable(pod)]
        if not waiting:
            return False
        room = _room(self._store, node)
        return any(room.takes(_waiting(pod)) for pod in waiting)

    def _pods_on(self, claim: Object) -> list[Object]:
        """Pods that would have to run elsewhere: not of a daemon set, not ended, not ending."""
        name = at(claim, "status.nodeName")
        return [
            pod
            for pod in self._store.list(POD)
            if pod["spec"].get("nodeName") == name
            and not is_terminal(pod)
            and not is_deleting(pod)
            and (controller_of(pod) or {}).get("kind") != "DaemonSet"
        ]

    def _fit_elsewhere(self, claim: Object) -> bool:
        pool = _pool_of(self._store, claim)
        if pool is None or pool.policy == "WhenEmpty":
            return False
        pods = self._pods_on(claim)
        if any(map(must_not_be_disrupted, pods)):
            return False
        others = [
            _room(self._store, node)
            for node in self._store.list(NODE)
            if name_of(node) != at(claim, "status.nodeName") and not is_deleting(node) and node_is_initialized(node)
        ]
        for pod in pods:
            wanted = _waiting(pod)
            room = next((room for room in others if room.takes(wanted)), None)
            if room is None:
                return False
            room.free = plus(room.free, wanted.requests, -1)
        return True

    def _within_budgets(self, claims: list[Object], reason: str) -> list[Object]:
        taken: Counter[str] = Counter()
        chosen = []
        for claim in claims:
            pool = _pool_of(self._store, claim)
            if pool is None:
                continue
            all_claims = self._store.list(NODE_CLAIM, labels=f"{NODE_POOL_LABEL}={pool.name}")
            leaving = sum(is_deleting(other) for other in all_claims)
            if taken[pool.name] < allowed_disruptions(pool.budgets, len(all_claims), leaving, reason):
                taken[pool.name] += 1
                chosen.append(claim)
        return chosen


def _pool_of(store: Store, claim: Object) -> Pool | None:
    pool = store.find(NODE_POOL, (claim["metadata"].get("labels") or {}).get(NODE_POOL_LABEL, ""))
    return Pool.of(pool) if pool else None


def _room(store: Store, node: Object) -> Room:
    labels = node["metadata"].get("labels") or {}
    return Room(name_of(node), labels, at(node, "spec.taints", []), free_on(store, node))


def _waiting(pod: Object) -> WaitingPod:
    return WaitingPod(uid_of(pod), pod["spec"], pod_requests(pod["spec"]))


class Interruption:
    """A spot notice: the NodeClaim is deleted at once, so that its pods move while the machine still works.

    What was interrupted is not asked for again for a while (karpenter-provider-aws v1, pkg/controllers/interruption).
    """

    def __init__(self, store: Store, clock: Clock, cloud: Cloud, unavailable: Unavailable) -> None:
        self._store = store
        self._clock = clock
        self._unavailable = unavailable
        self._events = Recorder(store, clock, "karpenter")
        cloud.on_notice.append(self._interrupted)

    def _interrupted(self, instance: Instance) -> None:
        for claim in self._store.list(NODE_CLAIM):
            if at(claim, "status.providerID") == instance.provider_id:
                message = f"NodeClaim {name_of(claim)} event: A spot interruption warning was triggered for the node"
                self._events.warning(claim, "SpotInterrupted", message)
                self._unavailable.block([instance.offering], self._clock.now())
                self._store.delete(NODE_CLAIM, name_of(claim))


class GarbageCollection:
    """Every two minutes: claims whose machine is gone and whose node says so, and machines that no claim knows."""

    def __init__(self, store: Store, clock: Clock, cloud: Cloud) -> None:
        self._store = store
        self._clock = clock
        self._cloud = cloud

    def start(self) -> None:
        """Collect from now on."""
        self._clock.call_later(GARBAGE_POLL_S, self._collect)

    def _collect(self) -> None:
        known = set()
        for claim in self._store.list(NODE_CLAIM):
            provider = at(claim, "status.providerID", "")
            known.add(provider)
            instance = self._cloud.find(provider)
            node = node_of(self._store, claim)
            lost = instance is not None and instance.gone is not None and not (node and is_true(node, "Ready"))
            if lost and not is_deleting(claim):
                self._store.delete(NODE_CLAIM, name_of(claim))
        for instance in self._cloud.instances.values():
            if instance.stopped is None and instance.provider_id not in known:
                self._cloud.terminate(instance, 0.0)
        self.start()
