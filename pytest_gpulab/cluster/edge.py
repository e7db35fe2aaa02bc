"""Between clients and replicas: the load balancer, and the client's admission policy.

The edge sends to Ready endpoints in turn. With none it answers 503 at once: a direct client loses the request, a
client with a bounded queue keeps it until an endpoint is ready, it has waited too long, or the queue is full.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from pytest_gpulab.cluster.replica import Replica
from pytest_gpulab.experiment import Admission, BoundedQueue


class Edge:
    """Round robin over the endpoints that are ready now."""

    def __init__(self) -> None:
        self.live: list[Replica] = []
        """Servers that exist, whether they get new requests or not."""
        self.endpoints: list[Replica | None] = []
        """None: its machine is gone and nobody has noticed. What is sent there is lost."""
        self._turn = -1

    def next(self) -> Replica | None:
        """Where the next request goes; None: it is lost, and without endpoints that is a 503."""
        if not self.endpoints:
            return None
        self._turn += 1
        return self.endpoints[self._turn % len(self.endpoints)]

    def spread(self, times: Sequence[float], first: int) -> None:
        """Submit the requests first, first + 1, ..., sent at `times`, while the endpoints stay as they are."""
        if not self.endpoints:
            return
        for offset in range(len(self.endpoints)):
            self._turn += 1
            replica = self.endpoints[self._turn % len(self.endpoints)]
            requests = range(first + offset, first + len(times), len(self.endpoints))
            if replica is not None:
                replica.submit_all(times[offset :: len(self.endpoints)], requests)
        self._turn += len(times) - len(self.endpoints)

    def advance(self, until: float) -> None:
        """Let time pass for all servers."""
        for replica in self.live:
            replica.advance(until)


class Client(Protocol):
    """The side that sends: `sent` says when each request was, NaN for those that never were."""

    sent: list[float]

    @property
    def waits(self) -> bool:
        """Whether it still has requests to send."""

    def act(self, until: float) -> None:
        """All it does up to `until`, while the endpoints stay as they are."""

    def endpoints_changed(self, now: float) -> None:
        """Servers became ready, or stopped being endpoints."""

    def lost(self, requests: list[int], at: float) -> None:
        """The server of these requests is gone."""


class OpenClient:
    """Sends every request when it is due, whatever became of others."""

    def __init__(self, due: list[float], edge: Edge) -> None:
        self.sent = due
        self._edge = edge
        self._next = 0

    @property
    def waits(self) -> bool:
        """Whether requests are still to come."""
        return self._next < len(self.sent)

    def act(self, until: float) -> None:
        """Send what is due."""
        due, first, last = self.sent, self._next, self._next
        while last < len(due) and due[last] <= until:
            last += 1
        self._next = last
        self._edge.spread(due[first:last], first)

    def endpoints_changed(self, now: float) -> None:
        """Nothing waits for that."""

    def lost(self, requests: list[int], at: float) -> None:
        """Nobody tries again."""


class LimitedClient:
    """Keeps at most so many requests unanswered; the others are dropped, or wait in a bounded queue.

    Answers count before whatever else happens at the same time, as in `engine.client`.
    """

    def __init__(self, due: list[float], edge: Edge, admission: Admission) -> None:
        self._due = due
        self._edge = edge
        self.sent = [math.nan] * len(due)
        self._limit = admission.max_outstanding or len(due)
        self._holds = isinstance(admission, BoundedQueue)
        self._capacity = admission.capacity if isinstance(admission, BoundedQueue) else 0
        self._max_wait = admission.max_wait_s if isinstance(admission, BoundedQueue) else math.inf
        self._queue: deque[int] = deque()
        self._answers: list[tuple[float, int]] = []
        self._outstanding = 0
        self._next = 0

    @property
    def waits(self) -> bool:
        """Whether requests are still to come, or wait in the queue."""
        return self._next < len(self._due) or bool(self._queue)

    def endpoints_changed(self, now: float) -> None:
        """What waits may go."""
        self._collect()
        self._send_queued(now)

    def lost(self, requests: list[int], at: float) -> None:
        """Their places are free."""
        for request in requests:
            heapq.heappush(self._answers, (at, request))

    def act(self, until: float) -> None:
        """Take answers, send what is due and what waits, in order of time."""
        while (at := self._next_at(until)) <= until:
            if self._answers and self._answers[0][0] <= at:
                heapq.heappop(self._answers)
                self._outstanding -= 1
                self._send_queued(at)
            else:
                self._arrive(self._next, at)
                self._next += 1
        self._drop_expired(until)

    def _next_at(self, until: float) -> float:
        """When the next answer comes or the next request is due; beyond `until`: infinity.

        Servers only run as far as nothing can be sent to them before: up to the next due request, and while someone
        waits for a place, no further than the first answer can come.
        """
        due = self._due[self._next] if self._next < len(self._due) else math.inf
        horizon = min(due, until)
        while True:
            known = self._answers[0][0] if self._answers else math.inf
            bound = min((replica.earliest_answer for replica in self._edge.live), default=math.inf)
            safe = min(horizon, known, bound) if self._queue and self._edge.endpoints else min(horizon, known)
            self._edge.advance(safe if safe in (horizon, known) else math.nextafter(safe, math.inf))
            self._collect()
            first = self._answers[0][0] if self._answers else math.inf
            if first <= safe or safe == horizon:
                return first if first <= horizon else (due if due <= until else math.inf)

    def _collect(self) -> None:
        for replica in self._edge.live:
            for answer in replica.completed:
                heapq.heappush(self._answers, answer)
            replica.completed.clear()

    def collect(self, replica: Replica) -> None:
        """The last answers of a server that is gone."""
        for answer in replica.completed:
            heapq.heappush(self._answers, answer)

    def _drop_expired(self, now: float) -> None:
        while self._queue and self._due[self._queue[0]] + self._max_wait <= now:
            self._queue.popleft()

    def _send_queued(self, now: float) -> None:
        self._drop_expired(now)
        while self._queue and self._edge.endpoints and self._outstanding < self._limit:
            self._send(self._queue.popleft(), now)

    def _arrive(self, request: int, now: float) -> None:
        self._drop_expired(now)
        if self._outstanding < self._limit and (self._edge.endpoints or not self._holds):
            self._send(request, now)
        elif len(self._queue) < self._capacity:
            self._queue.append(request)

    def _send(self, request: int, now: float) -> None:
        self.sent[request] = now
        replica = self._edge.next()
        if replica is not None:
            self._outstanding += 1
            replica.submit(now, request)
