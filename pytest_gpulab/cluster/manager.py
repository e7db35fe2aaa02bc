"""Runs controllers: one work queue for all of them, driven by the store's events and the clock.

The same controllers run an hour in virtual time in milliseconds, or in real time behind the API server. Work is
done in the order in which it was asked for; an object that is asked for twice is reconciled once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import Final, Protocol

from pytest_gpulab.cluster.clock import Clock, Timer
from pytest_gpulab.cluster.errors import ApiError
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.objects import name_of, namespace_of
from pytest_gpulab.cluster.resources import Resource
from pytest_gpulab.cluster.store import Store

Ref = tuple[str, str]
"""(name, namespace) of an object; namespace "" for cluster-scoped kinds."""

FIRST_RETRY_S: Final = 0.005
LONGEST_RETRY_S: Final = 1000.0
"""client-go's DefaultControllerRateLimiter: 5 ms, doubled with each failure, up to 1000 s."""


class Controller(Protocol):
    """A state machine: it looks at the store, writes what is missing, and says when to look again."""

    @property
    def watches(self) -> tuple[Resource, ...]:
        """Kinds whose changes concern it."""

    def refs(self, event: Event) -> Iterable[Ref]:
        """The objects to reconcile after a change."""

    def reconcile(self, ref: Ref) -> float | None:
        """Bring one object forward. Seconds until it should be looked at again; None: when something changes."""


def ref_of(event: Event) -> Ref:
    """The changed object itself."""
    return name_of(event.object), namespace_of(event.object)


def _raise(error: Exception) -> None:
    raise error


class Manager:
    """The controllers of one cluster."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._queue: deque[tuple[Controller, Ref]] = deque()
        self._queued: set[tuple[int, Ref]] = set()
        self._timers: dict[tuple[int, Ref], Timer] = {}
        self._failures: dict[tuple[int, Ref], int] = {}
        self._turn: Timer | None = None
        self._stopped = False

    def add(self, controller: Controller) -> None:
        """Run a controller from now on; it sees what exists as if it had just been created.

        What it raises is raised by the clock: it is no business of whoever made the change, or of other listeners.
        """

        def changed(event: Event) -> None:
            try:
                refs = list(controller.refs(event))
            except Exception as error:
                self._clock.call_later(0.0, partial(_raise, error))
                return
            for ref in refs:
                self.enqueue(controller, ref)

        self._store.subscribe(changed, *controller.watches)
        for resource in controller.watches:
            for obj in self._store.list(resource):
                changed(Event(self._store.version, "ADDED", resource, obj, None))

    def enqueue(self, controller: Controller, ref: Ref) -> None:
        """Reconcile the object as soon as it is its turn."""
        key = (id(controller), ref)
        if self._stopped or key in self._queued:
            return
        self._queued.add(key)
        self._queue.append((controller, ref))
        if self._turn is None:
            self._turn = self._clock.call_later(0.0, self._work)

    def stop(self) -> None:
        """Reconcile nothing any more."""
        self._stopped = True
        self._queue.clear()
        for timer in self._timers.values():
            timer.cancel()

    def _work(self) -> None:
        """Everything that is queued now; what that causes waits for the next turn, at the same time."""
        self._turn = None
        for _ in range(len(self._queue)):
            if self._stopped:
                return
            controller, ref = self._queue.popleft()
            self._queued.discard((id(controller), ref))
            self._reconcile(controller, ref)

    def _reconcile(self, controller: Controller, ref: Ref) -> None:
        key = (id(controller), ref)
        try:
            again = controller.reconcile(ref)
        except ApiError:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
            again = min(FIRST_RETRY_S * 2.0 ** min(failures, 30), LONGEST_RETRY_S)
        else:
            self._failures.pop(key, None)
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if again is not None:
            self._timers[key] = self._clock.call_later(again, lambda: self.enqueue(controller, ref))
