"""Model time: the seconds that the engine's costs are in, as the event loop's clock times a factor."""

from __future__ import annotations

import asyncio


class ModelClock:
    """Starts at 0 when it is created, inside a running event loop. `speed` model seconds pass in one real second."""

    def __init__(self, speed: float) -> None:
        if not 0.0 < speed <= 1000.0:
            raise ValueError(f"speed must be above 0 and at most 1000, got {speed}: 1 is real time")
        self.speed = speed
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()

    def now(self) -> float:
        """Model seconds since the start."""
        return (self._loop.time() - self._start) * self.speed

    def real(self, at: float) -> float:
        """The event loop's time at model time `at`."""
        return self._start + at / self.speed

    async def until(self, at: float) -> None:
        """Sleep until model time `at`; when it is past, only let others run. Never sleeps in steps, so no drift."""
        await asyncio.sleep(max(0.0, self.real(at) - self._loop.time()))
