"""What containers have written, line by line, for `kubectl logs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

from pytest_gpulab.cluster.api.requests import flag, whole
from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.errors import BadRequest
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.objects import Object, at, name_of, seconds, timestamp, uid_of
from pytest_gpulab.cluster.resources import POD
from pytest_gpulab.cluster.store import Store


@dataclass
class _Log:
    lines: list[tuple[float, str]] = field(default_factory=list)
    """Unix seconds of the cluster, and the line."""
    ended: bool = False
    followers: set[asyncio.Event] = field(default_factory=set)


class PodLogs:
    """The log of each pod's first container, until the pod is deleted."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._logs: dict[str, _Log] = {}
        store.subscribe(self._forget, POD)

    def write(self, uid: str, line: str) -> None:
        """A line of the pod with this uid."""
        log = self._logs.setdefault(uid, _Log())
        log.lines.append((self._clock.now(), line))
        _wake(log)

    def end(self, uid: str) -> None:
        """Its container writes no more: those who follow have it all."""
        log = self._logs.setdefault(uid, _Log())
        log.ended = True
        _wake(log)

    def read(self, namespace: str, name: str, query: Mapping[str, str]) -> AsyncIterator[str]:
        """Lines with their ends, as the query's options ask; with ``follow`` those that are yet to come.

        BadRequest: there is no such container, or it has not started.
        """
        pod = self._store.get(POD, name, namespace)
        container = query.get("container") or pod["spec"]["containers"][0]["name"]
        if container not in [one["name"] for one in pod["spec"]["containers"]]:
            raise BadRequest(f"container {container} is not valid for pod {name}")
        if (reason := _waiting(pod)) is not None:
            raise BadRequest(f'container "{container}" in pod "{name}" is waiting to start: {reason}')
        return self._read(self._logs.setdefault(uid_of(pod), _Log()), query)

    async def _read(self, log: _Log, query: Mapping[str, str]) -> AsyncIterator[str]:
        since = self._since(query)
        start = sum(written < since for written, _ in log.lines)
        if query.get("tailLines"):
            start = max(start, len(log.lines) - whole(query, "tailLines"))
        changed = asyncio.Event()
        log.followers.add(changed)
        try:
            while True:
                changed.clear()
                for written, line in log.lines[start:]:
                    yield f"{timestamp(written)} {line}\n" if flag(query, "timestamps") else f"{line}\n"
                    start += 1
                if start < len(log.lines):
                    continue
                if log.ended or not flag(query, "follow"):
                    return
                await changed.wait()
        finally:
            log.followers.discard(changed)

    def _since(self, query: Mapping[str, str]) -> float:
        if query.get("sinceTime"):
            return seconds(query["sinceTime"])
        return self._clock.now() - whole(query, "sinceSeconds") if query.get("sinceSeconds") else 0.0

    def _forget(self, event: Event) -> None:
        if event.type == DELETED:
            self.end(uid_of(event.object))
            self._logs.pop(uid_of(event.object))


def _wake(log: _Log) -> None:
    for follower in log.followers:
        follower.set()


def _waiting(pod: Object) -> str | None:
    """Why its container has never run; None when it has."""
    (status, *_) = at(pod, "status.containerStatuses", []) or [{}]
    if at(status, "state.waiting") is None and status:
        return None
    return None if at(status, "lastState.terminated") else str(at(status, "state.waiting.reason", name_of(pod)))
