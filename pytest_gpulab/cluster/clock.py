"""The clock that is handed to the store and to every controller: virtual for studies, real behind the API.

Both read Unix seconds and call back in order of time; what is due at the same time is called in the order in which
it was asked for. Nothing in the cluster reads another clock.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from typing import Protocol

EPOCH = 1_767_225_600.0
"""When virtual time starts, 2026-01-01T00:00:00Z: a constant, so that equal runs write equal bytes."""


class Timer:
    """A call that is due at `at`, until it is cancelled."""

    __slots__ = ("at", "callback")

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not call; harmless when it has been called."""
        self.callback = None

    def fire(self) -> None:
        """Call once, unless cancelled."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class Clock(Protocol):
    """Unix seconds, and calls at a time."""

    def now(self) -> float:
        """Unix seconds."""

    def call_at(self, at: float, callback: Callable[[], None]) -> Timer:
        """Call at `at`, or as soon as possible when that has passed."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `delay` seconds from now."""


class VirtualClock:
    """Time passes only in `run_until`, and only as fast as there is something to call."""

    def __init__(self, start: float = EPOCH) -> None:
        self._now = start
        self._due: list[tuple[float, int, Timer]] = []
        self._asked = 0

    def now(self) -> float:
        """Unix seconds."""
        return self._now

    def call_at(self, at: float, callback: Callable[[], None]) -> Timer:
        """Call at `at`."""
        timer = Timer(max(at, self._now), callback)
        self._asked += 1
        heapq.heappush(self._due, (timer.at, self._asked, timer))
        return timer

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `delay` seconds from now."""
        return self.call_at(self._now + delay, callback)

    @property
    def next_at(self) -> float:
        """When the next call is due; infinity: never."""
        while self._due and self._due[0][2].callback is None:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else float("inf")

    def run_until(self, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
        """Call what is due up to and including `until`; then it is `until`. True when `stop` held before that."""
        while not stop():
            if self.next_at > until:
                self._now = max(self._now, until)
                return False
            self._now, _, timer = heapq.heappop(self._due)
            timer.fire()
        return True


class RealClock:
    """The machine's monotonic clock on an asyncio loop, `speed` times as fast."""

    def __init__(self, speed: float = 1.0) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be positive, got {speed}: 1 is real time, 10 is ten times as fast")
        self.speed = speed
        self._epoch = time.time()
        self._start = time.monotonic()

    def now(self) -> float:
        """Unix seconds at the start, and from then on `speed` seconds a second."""
        return self._epoch + (time.monotonic() - self._start) * self.speed

    def call_at(self, at: float, callback: Callable[[], None]) -> Timer:
        """Call at `at`."""
        return self.call_later(at - self.now(), callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `delay` seconds from now, on the running loop."""
        timer = Timer(self.now() + max(delay, 0.0), callback)
        asyncio.get_running_loop().call_later(max(delay, 0.0) / self.speed, timer.fire)
        return timer
