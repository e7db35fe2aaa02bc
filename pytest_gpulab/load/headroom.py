"""Headroom: how much load this client can send and read on this machine before it measures itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Constant, Shape, Workload
from pytest_gpulab.load.local import peak_chunk_rate
from pytest_gpulab.load.reconcile import lag_p99
from pytest_gpulab.load.sending import Sending
from pytest_gpulab.load.share import Outcome, Share

_INTERVAL_S = 0.01
_SHAPE = Shape(prompt_tokens=256, output_tokens=128)
_RUNG_S = 1.5
_RATES = (20.0, 40.0, 60.0, 80.0, 100.0, 150.0, 200.0, 300.0, 400.0)
_MOST_LAG_S = 0.005
_TRIES = 3


class BeyondHeadroom(ValueError):
    """A load that this client cannot send in time."""


class NoHeadroom(RuntimeError):
    """Even the least load was late, which says something of this moment and nothing of what the client can do."""


@dataclass(frozen=True)
class Headroom:
    """What one process of this client was seen to do against a server that costs nothing.

    Attributes:
        chunks_per_s: the highest rate of streamed chunks at which it still sent and read on time.
    """

    chunks_per_s: float

    def require(self, workload: Workload, seed: int, processes: int) -> None:
        """BeyondHeadroom when the workload asks for more. In a closed loop only the run shows, by its lag."""
        asked = peak_chunk_rate(workload, seed)
        able = self.chunks_per_s * min(processes, os.cpu_count() or 1)
        if asked > able:
            raise BeyondHeadroom(
                f"the load must be within what this client can do: the workload asks for {asked:,.0f} tokens/s, "
                f"{processes} processes here can read {able:,.0f}; use more processes, a "
                "faster machine or a lower rate"
            )


def measure_headroom() -> Headroom:
    """Raise the load against a null server until the client is late, some 10 to 20 s. Needs two idle cores.

    NoHeadroom: it was late from the first.
    """
    reached = 0.0
    with null_server(_INTERVAL_S) as url:
        for rate in _RATES:
            if not any(_is_on_time(send_to(url, _rung(rate))) for _ in range(_TRIES)):
                break
            reached = rate * _SHAPE.output_tokens
    if not reached:
        raise NoHeadroom(
            f"this client must read {_RATES[0] * _SHAPE.output_tokens:,.0f} tokens/s in time from a server that "
            f"costs nothing, it failed {_TRIES} times: other work keeps this machine busy; end it, then repeat"
        )
    return Headroom(chunks_per_s=reached)


def keeps_up(chunks_per_s: float) -> bool:
    """Whether this process sends and reads so much in time here; 2 to 6 s.

    Less than the lowest rung is no question of what it can do: if it is late, others are at work here, and the run
    will say so.
    """
    if chunks_per_s <= _RATES[0] * _SHAPE.output_tokens:
        return True
    with null_server(_INTERVAL_S) as url:
        rung = _rung(chunks_per_s / _SHAPE.output_tokens)
        return any(_is_on_time(send_to(url, rung)) for _ in range(_TRIES))


def _rung(rate: float) -> Workload:
    return Workload(arrivals=Constant(rate=rate), shape=_SHAPE, duration_s=_RUNG_S)


def _is_on_time(outcome: Outcome) -> bool:
    late_s = max(lag_p99(outcome.send_lag_s), lag_p99(outcome.loop_lag_s))
    return bool(outcome.requests["ok"].all()) and late_s <= _MOST_LAG_S


@contextmanager
def null_server(interval_s: float) -> Iterator[str]:
    """A null server in a process of its own; gives its URL. `interval_s`: seconds between two chunks of a stream.

    It ends with this process, whatever ends that: its stdin closes then.
    """
    command = [sys.executable, "-m", "pytest_gpulab.load.null_server", str(interval_s)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process only
    )
    with process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def send_to(url: str, workload: Workload) -> Outcome:
    """Send a workload from this process to a null server. KeyboardInterrupt: Ctrl-C has ended it."""
    share = Share(workload, Endpoint(url, "null"), seed=0, salt=(), longest_answer_s=60.0)
    sending = Sending(share)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(sending.run(time.perf_counter() + 0.05))
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome
