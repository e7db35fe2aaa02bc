"""kube-scheduler: pods to nodes by taints, selectors, affinity and free resources, with its backoff.

Facts from Kubernetes 1.33, pkg/scheduler: pods that fit nowhere wait for an event that may help, at least 1 s and up
to 10 s (doubled with each attempt), and are tried anyway after 5 min.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.conditions import with_condition
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import Object, at, is_deleting, merged, name_of, namespace_of
from pytest_gpulab.cluster.placement import labels_match, untolerated
from pytest_gpulab.cluster.quantity import Amounts, amounts, fits, plus, pod_requests
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import NODE, POD
from pytest_gpulab.cluster.store import Store

FIRST_BACKOFF_S: Final = 1.0
LONGEST_BACKOFF_S: Final = 10.0
FLUSH_S: Final = 300.0
_UNSCHEDULABLE: Final = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
_NOT_READY: Final = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}


def backoff(attempts: int) -> float:
    """Seconds between the last attempt and the next."""
    return float(min(FIRST_BACKOFF_S * 2.0 ** min(attempts - 1, 30), LONGEST_BACKOFF_S))


def is_waiting(pod: Object) -> bool:
    """Whether the scheduler has to place it."""
    return not pod["spec"].get("nodeName") and not is_deleting(pod) and at(pod, "status.phase") == "Pending"


def is_terminal(pod: Object) -> bool:
    """Whether it holds no resources any more."""
    return at(pod, "status.phase") in ("Succeeded", "Failed")


def free_on(store: Store, node: Object) -> Amounts:
    """Allocatable minus what the node's pods ask for; pods that are ending still count."""
    free = amounts(at(node, "status.allocatable", {}))
    for pod in store.list(POD):
        if pod["spec"].get("nodeName") == name_of(node) and not is_terminal(pod):
            free = plus(free, pod_requests(pod["spec"]), -1)
    return free


def taints_of(node: Object) -> list[dict[str, Any]]:
    """Its taints, with those that the node controller would add for its state."""
    taints = list(at(node, "spec.taints", []))
    if at(node, "spec.unschedulable", False):
        taints.append(dict(_UNSCHEDULABLE))
    ready = next((c["status"] for c in at(node, "status.conditions", []) if c["type"] == "Ready"), "Unknown")
    return taints if ready == "True" else [*taints, dict(_NOT_READY)]


def misfit(pod: Object, node: Object, free: Amounts) -> str | None:
    """Why the node cannot run the pod, in the scheduler's words; None when it can."""
    taint = untolerated(pod["spec"], taints_of(node))
    if taint is not None:
        value = f": {taint['value']}" if taint.get("value") else ": "
        return f"node(s) had untolerated taint {{{taint['key']}{value}}}"
    if not labels_match(pod["spec"], node["metadata"].get("labels") or {}):
        return "node(s) didn't match Pod's node affinity/selector"
    wanted = pod_requests(pod["spec"])
    if not fits(wanted, free):
        lacking = sorted(name for name, amount in wanted.items() if amount > free.get(name, 0))
        return f"Insufficient {lacking[0]}"
    return None


@dataclass
class _Attempts:
    count: int = 0
    last: float = 0.0
    stirred: bool = True
    """Whether something happened since that may have made room."""


class Scheduler:
    """Binds pods, or says why it cannot."""

    watches = (POD, NODE)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._events = Recorder(store, clock, "default-scheduler")
        self._waiting: dict[Ref, _Attempts] = {}

    def refs(self, event: Event) -> Iterable[Ref]:
        """A new pod; when a node changed or a pod left, all that wait."""
        if event.resource is POD and event.type != DELETED and not is_terminal(event.object):
            return (ref_of(event),) if is_waiting(event.object) else ()
        for attempts in self._waiting.values():
            attempts.stirred = True
        return tuple(self._waiting)

    def reconcile(self, ref: Ref) -> float | None:
        """One attempt, when it is worth one."""
        pod = self._store.find(POD, *ref)
        if pod is None or not is_waiting(pod):
            self._waiting.pop(ref, None)
            return None
        attempts = self._waiting.setdefault(ref, _Attempts())
        now = self._clock.now()
        if attempts.count:
            due = attempts.last + (backoff(attempts.count) if attempts.stirred else FLUSH_S)
            if now < due:
                return due - now
        attempts.count, attempts.last, attempts.stirred = attempts.count + 1, now, False
        if self._bind(pod, now):
            del self._waiting[ref]
            return None
        return FLUSH_S

    def _bind(self, pod: Object, now: float) -> bool:
        nodes = self._store.list(NODE)
        best: tuple[Fraction, str] | None = None
        reasons: Counter[str] = Counter()
        for node in nodes:
            free = free_on(self._store, node)
            reason = misfit(pod, node, free)
            if reason is not None:
                reasons[reason] += 1
                continue
            score = _least_allocated(node, free)
            if best is None or score > best[0]:
                best = (score, name_of(node))
        if best is None:
            self._refuse(pod, len(nodes), reasons, now)
            return False
        bound = self._store.update(POD, merged(pod, {"spec": {"nodeName": best[1]}}))
        self._store.update_status(POD, with_condition(bound, now, "PodScheduled", True))
        name = f"{namespace_of(pod)}/{name_of(pod)}"
        self._events.normal(pod, "Scheduled", f"Successfully assigned {name} to {best[1]}")
        return True

    def _refuse(self, pod: Object, nodes: int, reasons: Counter[str], now: float) -> None:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        message = f"0/{nodes} nodes are available: {why}." if nodes else "no nodes available to schedule pods"
        self._events.warning(pod, "FailedScheduling", message)
        self._store.update_status(POD, with_condition(pod, now, "PodScheduled", False, "Unschedulable", message))


def _least_allocated(node: Object, free: Amounts) -> Fraction:
    """The share of CPU and memory that is free: the scheduler spreads."""
    allocatable = amounts(at(node, "status.allocatable", {}))
    shares = [Fraction(free[name], allocatable[name]) for name in ("cpu", "memory") if allocatable.get(name)]
    return sum(shares, Fraction(0))
