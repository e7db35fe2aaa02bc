"""Writes a run's timeline from what happens in the store."""

from __future__ import annotations

from pytest_gpulab import timeline
from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.resources import DEPLOYMENT, EVENT, NODE, NODE_CLAIM, POD
from pytest_gpulab.cluster.store import Store


class Timeline(timeline.Timeline):
    """Listens to a store that is still empty."""

    def __init__(self, store: Store, clock: Clock, start: float) -> None:
        super().__init__(start)
        self._clock = clock
        store.subscribe(self._hear, POD, NODE, NODE_CLAIM, DEPLOYMENT, EVENT)

    def _hear(self, event: Event) -> None:
        now = self._clock.now()
        if event.resource is EVENT:
            self.said(now, event.object)
        else:
            self.changed(now, event.object, gone=event.type == DELETED)
