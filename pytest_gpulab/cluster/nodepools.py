"""Whether NodePools and their NodeClasses are Ready.

Facts from sigs.k8s.io/karpenter v1: pkg/controllers/nodepool (readiness, validation), pkg/apis/v1/nodepool_status.go.
What a NodePool says was validated when it was written. A NodeClass has nothing to look up here: it is Ready at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.conditions import is_true, with_condition
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import Object, at, is_deleting, name_of
from pytest_gpulab.cluster.resources import EC2_NODE_CLASS, NODE_CLASS, NODE_POOL, Resource
from pytest_gpulab.cluster.store import Store

CLASSES: Final = (NODE_CLASS, EC2_NODE_CLASS)


class NodeClasses:
    """Sets a NodeClass Ready."""

    def __init__(self, store: Store, clock: Clock, resource: Resource) -> None:
        self.watches = (resource,)
        self._store = store
        self._clock = clock
        self._resource = resource

    def refs(self, event: Event) -> Iterable[Ref]:
        """The class itself."""
        return (ref_of(event),)

    def reconcile(self, ref: Ref) -> float | None:
        """Once is enough."""
        found = self._store.find(self._resource, *ref)
        if found is not None and not is_deleting(found):
            self._store.update_status(
                self._resource, with_condition(found, self._clock.now(), "Ready", True, "Ready")
            )
        return None


class NodePools:
    """Sets a NodePool Ready when it is valid and its NodeClass is Ready."""

    watches = (NODE_POOL, *CLASSES)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def refs(self, event: Event) -> Iterable[Ref]:
        """The pool; all pools of a class."""
        if event.resource is NODE_POOL:
            return (ref_of(event),)
        pools = self._store.list(NODE_POOL)
        return tuple((name_of(pool), "") for pool in pools if _class_of(pool) == (event.resource, *ref_of(event)))

    def reconcile(self, ref: Ref) -> float | None:
        """Its conditions as they are now."""
        pool = self._store.find(NODE_POOL, *ref)
        if pool is None or is_deleting(pool):
            return None
        now, (ready, reason, message) = self._clock.now(), self._class_state(pool)
        pool = with_condition(pool, now, "ValidationSucceeded", True, "ValidationSucceeded")
        pool = with_condition(pool, now, "NodeClassReady", ready, reason, message)
        why = ("Ready", "") if ready else ("UnhealthyDependents", "NodeClassReady=False")
        self._store.update_status(NODE_POOL, with_condition(pool, now, "Ready", ready, *why))
        return None

    def _class_state(self, pool: Object) -> tuple[bool, str, str]:
        """Whether its NodeClass is Ready, reason and message."""
        wanted = _class_of(pool)
        found = self._store.find(*wanted) if wanted else None
        if found is None:
            return False, "NodeClassNotFound", "NodeClass not found on cluster"
        if is_deleting(found):
            return False, "NodeClassTerminating", "NodeClass is Terminating"
        if not is_true(found, "Ready"):
            return False, "NodeClassReadinessUnknown", "Node Class Readiness Unknown"
        return True, "NodeClassReady", ""


def _class_of(pool: Object) -> tuple[Resource, str, str] | None:
    """Kind, name and namespace of the NodeClass that a pool names."""
    wanted = at(pool, "spec.template.spec.nodeClassRef", {})
    kind = next(
        (kind for kind in CLASSES if (kind.group, kind.kind) == (wanted.get("group"), wanted.get("kind"))), None
    )
    return (kind, wanted.get("name", ""), "") if kind else None
