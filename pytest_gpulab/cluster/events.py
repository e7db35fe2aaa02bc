"""What happened to the objects, in order: the log a watch is resumed from and those who listen."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pytest_gpulab.cluster.errors import Expired
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import Resource

ADDED, MODIFIED, DELETED = "ADDED", "MODIFIED", "DELETED"


class Event(NamedTuple):
    """One change of one object. `previous` is None when it was added."""

    version: int
    type: str
    resource: Resource
    object: Object
    previous: Object | None


Listener = Callable[[Event], None]


class EventLog:
    """Keeps the last events of each kind and tells listeners.

    Every listener sees all events in the order of their versions: what a listener writes is told after the event it
    is being told of has reached everyone.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._kept: dict[Resource, deque[Event]] = {}
        self._dropped: dict[Resource, int] = {}
        self._listeners: dict[Resource | None, list[Listener]] = {}
        self._untold: deque[Event] = deque()
        self._telling = False

    def append(self, event: Event) -> None:
        """Log an event; `tell` passes it on."""
        kept = self._kept.setdefault(event.resource, deque())
        if len(kept) == self._history:
            self._dropped[event.resource] = kept.popleft().version
        kept.append(event)
        self._untold.append(event)

    def tell(self) -> None:
        """Pass on what was logged."""
        if self._telling:
            return
        self._telling = True
        try:
            while self._untold:
                event = self._untold.popleft()
                for listener in (*self._listeners.get(event.resource, ()), *self._listeners.get(None, ())):
                    listener(event)
        finally:
            self._telling = False

    def since(self, resource: Resource, version: int) -> list[Event]:
        """The events of a kind after a version, oldest first. `Expired` when some of them are gone."""
        dropped = self._dropped.get(resource, 0)
        if version < dropped:
            raise Expired(f"too old resource version: {version} ({dropped})")
        found: list[Event] = []
        for event in reversed(self._kept.get(resource, ())):
            if event.version <= version:
                break
            found.append(event)
        return found[::-1]

    def subscribe(self, listener: Listener, *kinds: Resource) -> Callable[[], None]:
        """Tell `listener` of every later event, of all kinds when none is named. Returns the way to stop."""
        places = [self._listeners.setdefault(kind, []) for kind in kinds or (None,)]
        for place in places:
            place.append(listener)

        def stop() -> None:
            for place in places:
                if listener in place:
                    place.remove(listener)

        return stop


class Watch:
    """The events of one kind as a queue. Falls behind without losing any; close it when done."""

    def __init__(self, log: EventLog, resource: Resource, since: int, wake: Callable[[], None] | None = None) -> None:
        self.events: deque[Event] = deque(log.since(resource, since))
        self._wake = wake
        self._last = self.events[-1].version if self.events else since
        self.close = log.subscribe(self._receive, resource)

    def _receive(self, event: Event) -> None:
        if event.version <= self._last:
            return
        self.events.append(event)
        if self._wake:
            self._wake()

    def drain(self) -> list[Event]:
        """All events that are waiting."""
        waiting = list(self.events)
        self.events.clear()
        return waiting
