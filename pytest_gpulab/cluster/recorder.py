"""Kubernetes Events: what controllers say about an object, and the last of it for an error message."""

from __future__ import annotations

from typing import Any, Literal

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.errors import Forbidden, NotFound
from pytest_gpulab.cluster.objects import Object, name_of, namespace_of, timestamp, uid_of
from pytest_gpulab.cluster.resources import EVENT
from pytest_gpulab.cluster.store import Store


class Recorder:
    """Writes events; the same one again only counts up, as client-go's correlator does. Best effort, as there."""

    def __init__(self, store: Store, clock: Clock, component: str) -> None:
        self._store = store
        self._clock = clock
        self._component = component
        self._known: dict[tuple[str, str, str], tuple[str, str]] = {}

    def normal(self, about: Object, reason: str, message: str) -> None:
        """Something went as it should."""
        self._write(about, "Normal", reason, message)

    def warning(self, about: Object, reason: str, message: str) -> None:
        """Something did not."""
        self._write(about, "Warning", reason, message)

    def _write(self, about: Object, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        key = (uid_of(about), reason, message)
        now = timestamp(self._clock.now())
        if key in self._known:
            name, namespace = self._known[key]
            old = self._store.find(EVENT, name, namespace)
            if old is not None:
                self._store.update(EVENT, {**old, "count": old["count"] + 1, "lastTimestamp": now})
                return
        namespace = namespace_of(about) or "default"
        try:
            created = self._store.create(EVENT, self._event(about, namespace, kind, reason, message, now))
        except (Forbidden, NotFound):  # the namespace is ending; what is done there must not wait for its event
            return
        self._known[key] = (name_of(created), namespace)

    def _event(self, about: Object, namespace: str, kind: str, reason: str, message: str, now: str) -> dict[str, Any]:
        involved = {
            "apiVersion": about["apiVersion"],
            "kind": about["kind"],
            "name": name_of(about),
            "uid": uid_of(about),
        }
        if namespace_of(about):
            involved["namespace"] = namespace_of(about)
        return {
            "metadata": {"generateName": f"{name_of(about)}.", "namespace": namespace},
            "involvedObject": involved,
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": self._component},
            "reportingComponent": self._component,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }


def last_events(store: Store, about: Object, most: int = 3) -> list[str]:
    """The newest events of an object, oldest first: "Warning FailedScheduling: ..."."""
    found = [
        event
        for event in store.list(EVENT, namespace_of(about) or "default")
        if event["involvedObject"].get("uid") == uid_of(about)
    ]
    found.sort(key=lambda event: (event["lastTimestamp"], int(event["metadata"]["resourceVersion"])))
    return [f"{event['type']} {event['reason']}: {event['message']}" for event in found[-most:]]
