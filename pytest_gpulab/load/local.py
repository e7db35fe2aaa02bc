"""Load from this machine: in this process, or from several that send shards of one schedule."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.arrivals import Schedule, schedule
from pytest_gpulab.experiment import ClosedLoop, Workload
from pytest_gpulab.load.progress import Progress
from pytest_gpulab.load.sending import Sending
from pytest_gpulab.load.share import Outcome, Share, divisible, merge
from pytest_gpulab.load.wire import share_to_line
from pytest_gpulab.load.words import Heard, progress_of

RATE_PER_PROCESS = 100.0
"""Requests per second that one process sends; beyond it, more processes share the load."""

_RATE_WINDOW_S = 5.0
_LEAD_S = 0.1


class Load(Protocol):
    """Something that sends a workload. Entering it prepares everything that is slow."""

    @property
    def lead_s(self) -> float:
        """Seconds before its start at which `run` must be called."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def run(self, start: float) -> Outcome:
        """Send it all from `start` (``time.perf_counter``) on. Cancelled, it gives the partial outcome."""

    def progress(self, elapsed_s: float) -> Progress:
        """How far it is."""


def processes_for(workload: Workload, seed: int) -> int:
    """How many processes the rate of a workload needs; one where it cannot be divided."""
    if not divisible(workload):
        return 1
    rate = getattr(workload.arrivals, "rate", None) or peak_rate(workload, seed)  # a trace states none
    return max(1, math.ceil(rate / RATE_PER_PROCESS))


def peak_rate(workload: Workload, seed: int) -> float:
    """The most requests per second over any few seconds of the schedule; 0 for a closed loop."""
    return _peak(workload, schedule(workload, seed), 1)


def peak_chunk_rate(workload: Workload, seed: int) -> float:
    """The most output tokens per second that arrivals ask for over any few seconds; 0 for a closed loop."""
    return _peak_chunk_rate(workload, schedule(workload, seed))


def chunk_rate_of(share: Share) -> float:
    """`peak_chunk_rate` of one share."""
    return _peak_chunk_rate(share.workload, schedule(share.workload, share.seed)[share.rows()])


def _peak_chunk_rate(workload: Workload, rows: Schedule) -> float:
    return _peak(workload, rows, rows["output_tokens"])


def _peak(workload: Workload, rows: Schedule, weights: NDArray[np.int32] | int) -> float:
    if isinstance(workload.arrivals, ClosedLoop):
        return 0.0
    times = rows["scheduled"]
    sums = np.concatenate([[0], np.cumsum(np.broadcast_to(weights, len(rows)))])
    ends = np.searchsorted(times, times + _RATE_WINDOW_S - 1e-9, side="left")
    return float((sums[ends] - sums[:-1]).max(initial=0)) / _RATE_WINDOW_S


class OneProcess:
    """The whole load from this process' event loop."""

    lead_s = _LEAD_S

    def __init__(self, share: Share) -> None:
        self._sending = Sending(share)

    async def __aenter__(self) -> Self:
        gc.collect()  # which in a long session takes longer than the lead; what is frozen is not looked at again
        gc.freeze()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.unfreeze()

    async def run(self, start: float) -> Outcome:
        return await self._sending.run(start)

    def progress(self, elapsed_s: float) -> Progress:
        sending = self._sending
        return Progress(
            elapsed_s=elapsed_s,
            length_s=sending.length_s,
            finished=sending.finished,
            offered=sending.total,
            in_flight=sending.in_flight,
            p95_s=sending.p95_s,
        )


class Processes:
    """One child process a share. They get their shares by stdin, say ``ready``, and are told when to start."""

    lead_s = _LEAD_S

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._children: list[asyncio.subprocess.Process] = []
        self._heard = [Heard() for _ in shares]

    async def __aenter__(self) -> Self:
        try:
            for share in self._shares:
                child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "pytest_gpulab.load.shard"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C reaches this process only, which tells them
                )
                self._children.append(child)
                _tell(child, share_to_line(share))
            for child, heard in zip(self._children, self._heard, strict=True):
                heard.line(await _line(child))
                if not heard.ready:
                    raise RuntimeError(f"a load process ended before it was ready, see its words above: {child}")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def run(self, start: float) -> Outcome:
        start_unix = time.time() + start - time.perf_counter()
        for child in self._children:
            _tell(child, f"{start_unix!r}")
        outcomes = asyncio.gather(*(self._outcome(index, child) for index, child in enumerate(self._children)))
        try:
            return merge(await asyncio.shield(outcomes))
        except asyncio.CancelledError:
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
            return merge(await outcomes)

    def progress(self, elapsed_s: float) -> Progress:
        return progress_of(self._heard, elapsed_s)

    async def _outcome(self, index: int, child: asyncio.subprocess.Process) -> Outcome:
        heard = self._heard[index]
        while heard.outcome is None:
            line = await _line(child)
            if not line:
                raise RuntimeError(f"load process {index} ended without an outcome, see its words above")
            heard.line(line)
        return heard.outcome


def _tell(child: asyncio.subprocess.Process, line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n".encode())


async def _line(child: asyncio.subprocess.Process) -> str:
    """The next line without its end; empty when there is none."""
    assert child.stdout is not None
    return (await child.stdout.readline()).decode().rstrip("\n")
