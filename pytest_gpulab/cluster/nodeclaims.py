"""The life of a NodeClaim: Launched, Registered, Initialized, and the orderly end of its node.

Facts from sigs.k8s.io/karpenter v1, pkg/controllers/nodeclaim/lifecycle (launch, registration, initialization,
liveness) and pkg/controllers/node/termination. A claim that is registered is never given up: a node whose GPU never
appears stays for ever, and it is the lab's own deadline that ends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.cloud import Cloud, InsufficientCapacity, Offering
from pytest_gpulab.cluster.conditions import condition, is_true, since, with_condition, with_status
from pytest_gpulab.cluster.durations import Durations
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.karpenter import (
    DISRUPTED_TAINT,
    INITIALIZED_LABEL,
    LAUNCH_TIMEOUT_S,
    REGISTERED_LABEL,
    REGISTRATION_TIMEOUT_S,
    TERMINATION,
    UNREGISTERED_TAINT,
    Unavailable,
    launch_order,
    must_not_be_disrupted,
)
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import (
    Object,
    at,
    controller_of,
    is_deleting,
    name_of,
    namespace_of,
    seconds,
    uid_of,
)
from pytest_gpulab.cluster.placement import tolerates
from pytest_gpulab.cluster.provisioning import claim_options
from pytest_gpulab.cluster.quantity import amounts, duration, texts
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import NODE, NODE_CLAIM, POD, Resource
from pytest_gpulab.cluster.scheduler import is_terminal, taints_of
from pytest_gpulab.cluster.store import Store

DRAIN_POLL_S: Final = 1.0
TERMINATION_POLL_S: Final = 5.0


def node_of(store: Store, claim: Object) -> Object | None:
    """The node with the claim's provider id."""
    provider = at(claim, "status.providerID")
    return next((n for n in store.list(NODE) if provider and at(n, "spec.providerID") == provider), None)


def claim_of(store: Store, node: Object) -> Object | None:
    """The claim with the node's provider id."""
    provider = at(node, "spec.providerID")
    return next((c for c in store.list(NODE_CLAIM) if provider and at(c, "status.providerID") == provider), None)


class NodeClaims:
    """Brings NodeClaims forward, one condition at a time."""

    watches = (NODE_CLAIM, NODE)

    def __init__(
        self, store: Store, clock: Clock, cloud: Cloud, durations: Durations, unavailable: Unavailable
    ) -> None:
        self._store = store
        self._clock = clock
        self._cloud = cloud
        self._durations = durations
        self._unavailable = unavailable
        self._events = Recorder(store, clock, "karpenter")
        self._launches: dict[str, float] = {}

    def refs(self, event: Event) -> Iterable[Ref]:
        """The claim, or the claim of a node."""
        if event.resource is NODE_CLAIM:
            return (ref_of(event),)
        claim = claim_of(self._store, event.object)
        return () if claim is None else ((name_of(claim), ""),)

    def reconcile(self, ref: Ref) -> float | None:
        """The next condition that is not True yet; seconds until a timeout or a launch needs a look."""
        claim = self._store.find(NODE_CLAIM, *ref)
        if claim is None:
            return None
        if is_deleting(claim):
            return self._end(claim)
        if is_true(claim, "Registered") and self._loses_node(claim):
            self._store.delete(NODE_CLAIM, name_of(claim))
            return None
        if not claim["metadata"].get("finalizers"):
            patch = {"metadata": {"finalizers": [TERMINATION]}}
            claim = self._store.patch(NODE_CLAIM, name_of(claim), "", patch)
        if condition(claim, "Initialized") is None:
            claim = self._set(claim, *((kind, "Unknown", "AwaitingReconciliation", "") for kind in _STEPS))
        if not is_true(claim, "Launched"):
            return self._launch(claim)
        if not is_true(claim, "Registered"):
            return self._register(claim)
        if not is_true(claim, "Initialized"):
            self._initialize(claim)
        return None

    def _set(self, claim: Object, *conditions: tuple[str, str, str, str]) -> Object:
        now = self._clock.now()
        for kind, status, reason, message in conditions:
            claim = with_condition(claim, now, kind, status, reason, message)
        if all(is_true(claim, kind) for kind in _STEPS):
            claim = with_condition(claim, now, "Ready", True, "Ready")
        meta = {key: value for key, value in claim["metadata"].items() if key != "resourceVersion"}
        return self._store.update_status(NODE_CLAIM, {**claim, "metadata": meta})

    # launch

    def _launch(self, claim: Object) -> float | None:
        now = self._clock.now()
        gives_up = (since(claim, "Launched") or now) + LAUNCH_TIMEOUT_S
        if now >= gives_up:
            self._give_up(claim, "LaunchTimeout", f"not launched within {LAUNCH_TIMEOUT_S:.0f} s")
            return None
        if self._cloud.faults.launch_hangs:
            return gives_up - now
        due = self._launches.setdefault(uid_of(claim), now + self._durations.draw("launch"))
        if now < due:
            return due - now
        options = launch_order(
            offering
            for offering in claim_options(claim, self._cloud.offerings)
            if self._unavailable.allows(offering, now)
        )
        try:
            instance = self._cloud.launch(options)
        except InsufficientCapacity as shortage:
            self._unavailable.block(shortage.offerings, now)
            self._set(claim, ("Launched", "False", "InsufficientCapacity", str(shortage)))
            self._give_up(claim, "InsufficientCapacityError", str(shortage))
            return None
        self._launched(claim, instance.offering, instance.provider_id, instance.id)
        return REGISTRATION_TIMEOUT_S

    def _launched(self, claim: Object, offering: Offering, provider_id: str, image: str) -> None:
        labels = {**offering.labels(), **(claim["metadata"].get("labels") or {})}
        claim = self._store.patch(NODE_CLAIM, name_of(claim), "", {"metadata": {"labels": labels}})
        claim = with_status(
            claim,
            providerID=provider_id,
            capacity=texts(offering.type.capacity),
            allocatable=texts(offering.type.allocatable),
        )
        self._set(claim, ("Launched", "True", "Launched", ""))
        self._events.normal(claim, "Launched", f"Launched {'/'.join(offering.key)} as {image}")

    def _give_up(self, claim: Object, reason: str, message: str) -> None:
        self._events.warning(claim, reason, f"NodeClaim {name_of(claim)} event: {message}")
        self._store.delete(NODE_CLAIM, name_of(claim))

    # registration and initialization

    def _register(self, claim: Object) -> float | None:
        now = self._clock.now()
        node = node_of(self._store, claim)
        if node is None:
            gives_up = (since(claim, "Registered") or now) + REGISTRATION_TIMEOUT_S
            if now < gives_up:
                return gives_up - now
            self._give_up(claim, "RegistrationTimeout", f"not registered within {REGISTRATION_TIMEOUT_S:.0f} s")
            return None
        taints = [t for t in at(node, "spec.taints", []) if t["key"] != UNREGISTERED_TAINT["key"]]
        labels = {**(claim["metadata"].get("labels") or {}), REGISTERED_LABEL: "true"}
        finalizers = sorted({*(node["metadata"].get("finalizers") or ()), TERMINATION})
        patch = {"metadata": {"labels": labels, "finalizers": finalizers}, "spec": {"taints": taints or None}}
        self._store.patch(NODE, name_of(node), "", patch)
        claim = with_status(claim, nodeName=name_of(node))
        claim = self._set(claim, ("Registered", "True", "Registered", ""))
        self._events.normal(claim, "Registered", f"Node {name_of(node)} registered")
        self._initialize(claim)
        return None

    def _initialize(self, claim: Object) -> None:
        node = node_of(self._store, claim)
        why = ("NodeNotFound", "Node not registered with cluster") if node is None else _not_initialized(claim, node)
        if why is not None:
            self._set(claim, ("Initialized", "Unknown", *why))
            return
        assert node is not None
        self._store.patch(NODE, name_of(node), "", {"metadata": {"labels": {INITIALIZED_LABEL: "true"}}})
        claim = self._set(claim, ("Initialized", "True", "Initialized", ""))
        self._events.normal(claim, "Initialized", f"Node {name_of(node)} initialized")

    # the end

    def _loses_node(self, claim: Object) -> bool:
        """Whether somebody deletes its node, or has: then the machine must go too."""
        node = node_of(self._store, claim)
        return node is None or is_deleting(node)

    def _end(self, claim: Object) -> float | None:
        """Drain the node, terminate the instance, then let claim and node go."""
        node = node_of(self._store, claim)
        instance = self._cloud.find(at(claim, "status.providerID", ""))
        if instance is None:
            self._release(claim, node)
            return None
        if instance.gone is None:
            if node is not None and not self._drained(node, claim):
                return DRAIN_POLL_S
            self._cloud.terminate(instance, self._durations.draw("terminate") if instance.stopped is None else 0.0)
            if not is_true(claim, "InstanceTerminating"):
                now = self._clock.now()
                self._store.update_status(NODE_CLAIM, with_condition(claim, now, "InstanceTerminating", True))
            return TERMINATION_POLL_S
        self._release(claim, node)
        return None

    def _drained(self, node: Object, claim: Object) -> bool:
        """Taint the node and evict its pods; whether none is left that has to go first."""
        if DISRUPTED_TAINT not in at(node, "spec.taints", []):
            taints = [*at(node, "spec.taints", []), dict(DISRUPTED_TAINT)]
            node = self._store.patch(NODE, name_of(node), "", {"spec": {"taints": taints}})
        if not is_deleting(node):
            node = self._store.delete(NODE, name_of(node))
        force = _force_in(claim, self._clock.now())
        left = [pod for pod in self._store.list(POD) if _must_leave(pod, node)]
        for pod in left:
            if force is not None and force <= 0:
                self._store.delete(POD, name_of(pod), namespace_of(pod), grace=0)
            elif not is_deleting(pod) and _may_be_evicted(pod, force):
                self._events.normal(pod, "Evicted", f"Evicted pod: {name_of(node)} is being disrupted")
                self._store.delete(POD, name_of(pod), namespace_of(pod))
        return not left

    def _release(self, claim: Object, node: Object | None) -> None:
        if node is not None:
            release(self._store, node)
        _let_go(self._store, NODE_CLAIM, name_of(claim))
        self._launches.pop(uid_of(claim), None)


_STEPS = ("Launched", "Registered", "Initialized")


def release(store: Store, node: Object) -> None:
    """Remove a node whose machine is gone, finalizer or not."""
    if not is_deleting(node):
        store.delete(NODE, name_of(node))
    _let_go(store, NODE, name_of(node))


def _let_go(store: Store, resource: Resource, name: str) -> None:
    """Remove Karpenter's finalizer; others' stay, and hold the object."""
    current = store.find(resource, name)
    finalizers = current["metadata"].get("finalizers") or () if current is not None else ()
    if TERMINATION in finalizers:
        kept = [item for item in finalizers if item != TERMINATION]
        store.patch(resource, name, "", {"metadata": {"finalizers": kept or None}})


def _force_in(claim: Object, now: float) -> float | None:
    """Seconds until the claim's termination grace period is over; None without one."""
    grace = duration(at(claim, "spec.terminationGracePeriod"))
    return None if grace is None else seconds(claim["metadata"]["deletionTimestamp"]) + grace - now


def _must_leave(pod: Object, node: Object) -> bool:
    owner = controller_of(pod)
    return (
        pod["spec"].get("nodeName") == name_of(node)
        and not is_terminal(pod)
        and not (owner and owner["kind"] == "DaemonSet")
        and not tolerates(pod["spec"].get("tolerations") or (), DISRUPTED_TAINT)
    )


def _may_be_evicted(pod: Object, force_in: float | None) -> bool:
    """Whether a drain may ask it to go: one that must not be disrupted goes when just its own grace is left."""
    if not must_not_be_disrupted(pod):
        return True
    return force_in is not None and force_in <= at(pod, "spec.terminationGracePeriodSeconds", 30)


def _not_initialized(claim: Object, node: Object) -> tuple[str, str] | None:
    """Reason and message while the node is not Ready, has a startup taint, or lacks a requested resource."""
    if not is_true(node, "Ready"):
        return "NodeNotReady", "Node status is NotReady"
    keys = {taint["key"] for taint in claim["spec"].get("startupTaints") or ()}
    present = next((taint for taint in taints_of(node) if taint["key"] in keys), None)
    if present is not None:
        return "StartupTaintsExist", f'StartupTaint "{present["key"]}" still exists'
    allocatable = amounts(at(node, "status.allocatable"))
    for name, amount in amounts(at(claim, "spec.resources.requests")).items():
        if amount and not allocatable.get(name):
            return "ResourceNotRegistered", f'Resource "{name}" was requested but not registered'
    return None
