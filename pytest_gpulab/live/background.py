"""What runs beside the controllers: none of it may fail unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pytest_gpulab.cluster.clock import RealClock, Timer


class Background:
    """Tasks that live until they end or are stopped. Created in a running event loop."""

    def __init__(self) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the first exception of any of them, and of the controllers."""
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` until it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def fail(self, error: BaseException) -> None:
        """Nothing can be relied on any more."""
        if not self.failed.done():
            self.failed.set_exception(error)

    async def stop(self) -> None:
        """Cancel what still runs, and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)


class WatchedClock(RealClock):
    """Real time whose calls report what they raise: a controller that crashes would otherwise only stop."""

    def __init__(self, speed: float, crashed: Callable[[BaseException], None]) -> None:
        super().__init__(speed)
        self._crashed = crashed
        self._stopped = False

    def stop(self) -> None:
        """Call nothing any more."""
        self._stopped = True

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `delay` seconds from now, on the running loop."""

        def watched() -> None:
            if self._stopped:
                return
            try:
                callback()
            except Exception as error:
                self._crashed(error)

        return super().call_later(delay, watched)
