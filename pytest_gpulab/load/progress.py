"""The progress line of a long run."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

Show = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        length_s: until the last arrival; 0 where arrivals follow answers.
        finished: requests that came to an end, good or bad.
        p95_s: of the answers so far, from their scheduled time; None without an answer.
    """

    elapsed_s: float
    length_s: float
    finished: int
    offered: int
    in_flight: int
    p95_s: float | None

    def __str__(self) -> str:
        """Such as ``0:35 of 2:00, 210 of 720 finished (6.0/s), 14 in flight, p95 2.31 s, 1:25 left``."""
        p95 = "no answer yet" if self.p95_s is None else f"p95 {self.p95_s:.2f} s"
        left_s = self.length_s - self.elapsed_s
        left = (
            f", {_minutes(left_s)} left" if left_s > 0 else ", waiting for the last answers" if self.length_s else ""
        )
        length = f" of {_minutes(self.length_s)}" if self.length_s else ""
        return (
            f"{_minutes(self.elapsed_s)}{length}, {self.finished} of {self.offered} finished "
            f"({self.finished / self.elapsed_s:.1f}/s), {self.in_flight} in flight, {p95}{left}"
        )


def _minutes(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole // 60}:{whole % 60:02}"


def of_all(shards: Sequence[Progress]) -> Progress:
    """The progress of a load by that of its shards; the p95 is that of the slowest shard."""
    return Progress(
        elapsed_s=max(shard.elapsed_s for shard in shards),
        length_s=max(shard.length_s for shard in shards),
        finished=sum(shard.finished for shard in shards),
        offered=sum(shard.offered for shard in shards),
        in_flight=sum(shard.in_flight for shard in shards),
        p95_s=max((shard.p95_s for shard in shards if shard.p95_s is not None), default=None),
    )


def show_on_terminal(line: str) -> None:
    """Write the line to stderr where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


async def tell_every(seconds: float, look: Callable[[], Progress], tell: Callable[[Progress], None]) -> None:
    """Tell how far it is, until cancelled; nothing of what is over sooner."""
    while True:
        await asyncio.sleep(seconds)
        tell(look())


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs beside the body and ends with it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
