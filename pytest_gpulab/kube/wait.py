"""Waiting for the cluster: until something holds, until it cannot hold any more, or until the deadline.

It asks again and again rather than watching: there is no stream that could be dropped. What it raises names the
objects concerned, their conditions and their last events. Deadlines are cluster seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from pytest_gpulab.kube.client import Kube, KubeError
from pytest_gpulab.kube.objects import Object, Ref

T = TypeVar("T")

_POLL_S: Final = 2.0
_SHORTEST_POLL_S: Final = 0.1
_LAST_EVENTS: Final = 3

_HOPELESS: Final = frozenset(
    {
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
    }
)
"""Reasons of a waiting container that time does not heal."""


class WaitFailed(KubeError):
    """Something did not come about: it failed, or the deadline passed."""


def wait(
    kube: Kube,
    what: str,
    holds: Callable[[], T],
    *,
    deadline_s: float,
    about: Callable[[], Iterable[Object]] = tuple,
    fails: Callable[[], str | None] = lambda: None,
) -> T:
    """Ask until `holds` returns something true; that.

    Args:
        what: what is waited for, as in "waited for WHAT".
        fails: why it cannot hold any more; None as long as it can.
        about: the objects to describe if it does not, the most telling first.

    Raises:
        WaitFailed: `fails` said so, or `deadline_s` cluster seconds are over.
    """
    started = time.monotonic()
    allowed_s = deadline_s / kube.speed
    poll_s = max(_POLL_S / kube.speed, _SHORTEST_POLL_S)
    while True:
        if found := holds():
            return found
        why = fails()
        if why is None and time.monotonic() - started + poll_s > allowed_s:
            why = f"not within {deadline_s:g} s"
        if why is not None:
            described = "; ".join(describe(kube, obj) for obj in about()) or "there is no such object"
            raise WaitFailed(f"waited for {what}: {why}. {described}")
        time.sleep(poll_s)


def describe(kube: Kube, obj: Object) -> str:
    """An object with the conditions that do not hold and its last events, in a sentence."""
    status = obj.get("status") or {}
    states = [_condition(item) for item in status.get("conditions") or () if item["status"] != "True"]
    states += [f"{item.get('name')}: {_waiting(item)}" for item in _containers(obj) if _waiting(item)]
    events = " | ".join(last_events(kube, obj)) or "no events"
    shown = f" ({', '.join(states)})" if states else ""
    return f"{Ref.of(obj)}{shown}: {events}"


def last_events(kube: Kube, obj: Object) -> list[str]:
    """What was last said about an object, oldest first."""
    fields = f"involvedObject.name={obj['metadata']['name']}"
    events = kube.list("v1", "Event", fields=fields)
    said = sorted((e for e in events if e["involvedObject"].get("kind") == obj["kind"]), key=_when)
    return [f"{event.get('reason')}: {event.get('message')}" for event in said[-_LAST_EVENTS:]]


def pod_failure(pods: Iterable[Object]) -> str | None:
    """Why a pod will not become Ready however long one waits."""
    for pod in pods:
        for container in _containers(pod):
            reason = _waiting(container)
            if reason in _HOPELESS:
                return f"container {container['name']} of {Ref.of(pod)} is in {reason}"
    return None


def is_true(obj: Object, kind: str) -> bool:
    """Whether a condition holds."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return any(item["type"] == kind and item["status"] == "True" for item in conditions)


def _condition(item: dict[str, Any]) -> str:
    return f"{item['type']}={item['status']} {item.get('reason') or ''} {item.get('message') or ''}".strip()


def _containers(obj: Object) -> list[dict[str, Any]]:
    status = obj.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _waiting(container: dict[str, Any]) -> str:
    return str(((container.get("state") or {}).get("waiting") or {}).get("reason") or "")


def _when(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])
