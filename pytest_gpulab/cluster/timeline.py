"""Writes a run's timeline from what happens in the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.conditions import is_true
from pytest_gpulab.cluster.events import ADDED, DELETED, Event
from pytest_gpulab.cluster.objects import Object, at, is_deleting, name_of
from pytest_gpulab.cluster.resources import DEPLOYMENT, EVENT, NODE, NODE_CLAIM, POD
from pytest_gpulab.cluster.store import Store
from pytest_gpulab.timeline import Counts, Entry

_TOLD: Final = frozenset(
    {"SuccessfulRescale", "InsufficientCapacityError", "SpotInterrupted", "RegistrationTimeout", "LaunchTimeout"}
)
"""Events that are worth a line of their own."""


class Timeline:
    """Listens to a store. Seconds count from `start`; what happened before has negative ones."""

    def __init__(self, store: Store, clock: Clock, start: float) -> None:
        self._store = store
        self._clock = clock
        self.start = start
        self._entries: list[Entry] = []
        self._counts: tuple[int, ...] = ()
        store.subscribe(self._hear, POD, NODE, NODE_CLAIM, DEPLOYMENT, EVENT)

    def entries(self) -> tuple[Entry, ...]:
        """(seconds, what happened), in order; microseconds are enough."""
        return tuple((round(at - self.start, 6), text) for at, text in self._entries)

    def _hear(self, event: Event) -> None:
        now, obj = self._clock.now(), event.object
        if event.resource is EVENT:
            if obj["reason"] in _TOLD:
                about = obj["involvedObject"]
                self._entries.append((now, f"{about['kind']} {about['name']}: {obj['reason']}, {obj['message']}"))
            return
        for word in _words(event):
            self._entries.append((now, f"{obj['kind']} {name_of(obj)} {word}"))
        counts = self._count()
        if counts != self._counts:
            self._counts = counts
            self._entries.append((now, Counts(now, *counts).text))

    def _count(self) -> tuple[int, int, int, int]:
        wanted = sum(d["spec"]["replicas"] for d in self._store.list(DEPLOYMENT))
        ready = sum(is_true(pod, "Ready") and not is_deleting(pod) for pod in self._store.list(POD))
        return wanted, ready, len(self._store.list(NODE)), len(self._store.list(NODE_CLAIM))


def _words(event: Event) -> Iterable[str]:
    """What a change of an object means."""
    obj, before = event.object, event.previous
    if event.type == DELETED:
        return ("gone",)
    words = ["created"] if event.type == ADDED and event.resource is not DEPLOYMENT else []
    if event.resource is POD:
        words += _turned(obj, before, ("PodScheduled", "scheduled"), ("Ready", "ready"))
        started = at(obj, "status.phase") == "Running" and at(before, "status.phase") != "Running"
        if started:
            words.insert(0, "started")
    elif event.resource is NODE_CLAIM:
        steps = (("Launched", "launched"), ("Registered", "registered"), ("Initialized", "initialized"))
        words += _turned(obj, before, *steps)
    elif event.resource is NODE:
        words += _turned(obj, before, ("Ready", "ready"))
    if before is not None and is_deleting(obj) and not is_deleting(before):
        words.append("terminating")
    return words


def _turned(obj: Object, before: Object | None, *names: tuple[str, str]) -> list[str]:
    """Words for the conditions that have become True; "not ..." for those that no longer are."""
    words = []
    for kind, word in names:
        was, now = before is not None and is_true(before, kind), is_true(obj, kind)
        if was != now:
            words.append(word if now else f"not {word}")
    return words
