"""The client in virtual time: when it sends which request, what it drops, when it gives up."""

from __future__ import annotations

import heapq
import math
from collections import deque

from pytest_gpulab.experiment import BoundedQueue, ClosedLoop, Direct, Workload

NEVER = math.nan


class Client:
    """Admission policies and timeouts of one run, seconds from its start.

    `scheduled` holds when each request is due, in order; NaN where an earlier answer decides it (closed loop).
    The caller asks `act` for the requests that are sent by some time, and reports each answer with `answered`.
    Answers count before whatever else happens at the same time.

    Where no server is, as while a GPU is still coming, a direct client's request is lost. A client with a bounded
    queue takes it back (`refused`) and holds all of them, each for its own time, until it is told that a server is
    there (`resume`).
    """

    def __init__(self, workload: Workload, scheduled: list[float]) -> None:
        admission = workload.admission
        if isinstance(workload.arrivals, ClosedLoop) and admission != Direct():
            raise ValueError(
                f"a closed loop limits what is in flight itself, got admission {admission!r}: leave admission out"
            )
        self.scheduled = scheduled
        self.sent = [NEVER] * len(scheduled)
        self.given_up: list[int] = []
        """Requests whose answer is no longer awaited, in order of time."""
        self._closed_loop = isinstance(workload.arrivals, ClosedLoop)
        self._limit = admission.max_outstanding or len(scheduled)
        self._capacity = admission.capacity if isinstance(admission, BoundedQueue) else 0
        self._max_wait = admission.max_wait_s if isinstance(admission, BoundedQueue) else math.inf
        self._timeout = workload.timeout_s or math.inf
        self._next = 0
        self._queue: deque[int] = deque()
        self._answers: list[tuple[float, int]] = []
        self._awaited: deque[tuple[float, int]] = deque()
        self._done = bytearray(len(scheduled))
        self._outstanding = 0
        self.holds = False
        """Whether it waits for a server, sending nothing."""

    @property
    def next_at(self) -> float:
        """When the client next does something on its own; infinity: never."""
        due = self.scheduled[self._next] if self._next < len(self.scheduled) else math.inf
        if due != due:  # decided by an answer
            due = math.inf
        answer = self._answers[0][0] if self._answers else math.inf
        while self._awaited and self._is_settled(*self._awaited[0]):
            self._awaited.popleft()
        deadline = self._awaited[0][0] if self._awaited else math.inf
        expiry = self.scheduled[self._queue[0]] + self._max_wait if self.holds and self._queue else math.inf
        return min(due, answer, deadline, expiry)

    def deadline(self, index: int) -> float:
        """Until when the client awaits the answer of a request it has sent."""
        return self.sent[index] + self._timeout

    def answered(self, index: int, at: float) -> None:
        """The last token of a request arrives at `at`, or the refusal to serve it."""
        heapq.heappush(self._answers, (at, index))

    def refused(self, index: int, at: float) -> None:
        """No server took a request that was sent: it waits again at its place in the queue, if there is one.

        The youngest gives way where that is full.
        """
        if not self._capacity:
            self.answered(index, at)
            return
        self.holds = True
        self.sent[index] = NEVER
        self._outstanding -= 1
        self._queue = deque(sorted((*self._queue, index)))
        while len(self._queue) > self._capacity:
            self._queue.pop()

    def resume(self, at: float) -> list[int]:
        """A server is there: the requests of the queue that are sent now."""
        self.holds = False
        sent: list[int] = []
        self._send_queued(at, sent)
        return sent

    def act(self, until: float) -> list[int]:
        """The requests sent up to and including `until`, in order; `sent` says when."""
        sent: list[int] = []
        while (now := self.next_at) <= until:
            if self._answers and self._answers[0][0] <= now:
                self._end(heapq.heappop(self._answers)[1], now, sent)
            elif self._awaited and self._awaited[0][0] <= now:
                index = self._awaited.popleft()[1]
                self.given_up.append(index)
                self._end(index, now, sent)
            elif self.holds and self._queue and self.scheduled[self._queue[0]] + self._max_wait <= now:
                self._drop_expired(now)
            else:
                self._due(self._next, now, sent)
                self._next += 1
        return sent

    def _end(self, index: int, now: float, sent: list[int]) -> None:
        """A request is answered or given up: its place is free."""
        if self._done[index]:
            return
        self._done[index] = 1
        self._outstanding -= 1
        self._drop_expired(now)
        self._send_queued(now, sent)
        if self._closed_loop and self._next < len(self.scheduled):
            self.scheduled[self._next] = now
            self._send(self._next, now, sent)
            self._next += 1

    def _due(self, index: int, now: float, sent: list[int]) -> None:
        self._drop_expired(now)
        if self._outstanding < self._limit and not self.holds:
            self._send(index, now, sent)
        elif len(self._queue) < self._capacity:
            self._queue.append(index)

    def _send_queued(self, now: float, sent: list[int]) -> None:
        """As many of those that wait as may go."""
        self._drop_expired(now)
        while self._queue and not self.holds and self._outstanding < self._limit:
            self._send(self._queue.popleft(), now, sent)

    def _is_settled(self, deadline: float, index: int) -> bool:
        """Whether nothing is awaited until a deadline any more: answered, or refused and perhaps sent again."""
        return bool(self._done[index]) or self.sent[index] + self._timeout != deadline

    def _drop_expired(self, now: float) -> None:
        while self._queue and self.scheduled[self._queue[0]] + self._max_wait <= now:
            self._queue.popleft()

    def _send(self, index: int, now: float, sent: list[int]) -> None:
        self.sent[index] = now
        self._outstanding += 1
        sent.append(index)
        if self._timeout < math.inf:
            self._awaited.append((now + self._timeout, index))
