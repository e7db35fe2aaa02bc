"""A Share: the part of a load that one process sends; and the Outcome it comes back with.

Shard k of n has the requests k, k + n, k + 2n, ... of the one schedule, so any number of shards offers the same
load and their outcomes merge exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import ClosedLoop, Direct, Workload
from pytest_gpulab.load.bodies import Salt
from pytest_gpulab.run import REQUEST_DTYPE


@dataclass(frozen=True)
class Share:
    """What one process sends. ValueError when the workload cannot be divided."""

    workload: Workload
    endpoint: Endpoint
    seed: int
    salt: Salt
    longest_answer_s: float
    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard's index must be from 0 to {self.count - 1}, got {self.index}")
        if self.count > 1 and not divisible(self.workload):
            raise ValueError(
                f"only an open loop without a limit of what is in flight can be divided, got {self.count} shards of "
                f"{self.workload.arrivals.kind} arrivals with admission {self.workload.admission!r}: use one process"
            )

    def rows(self) -> slice:
        """Which requests of the schedule."""
        return slice(self.index, None, self.count)


def divisible(workload: Workload) -> bool:
    """Whether no request of the workload depends on the answer to another."""
    return not isinstance(workload.arrivals, ClosedLoop) and workload.admission == Direct()


@dataclass(frozen=True)
class Outcome:
    """What the requests of a Share, or of all of them, came to.

    Attributes:
        requests: REQUEST_DTYPE, in order of the schedule.
        failures: undelivered requests by kind.
        send_lag_s: how late each sent request was sent, seconds after the policy's decision.
        loop_lag_s: how late the event loop ran a timer, sampled all along.
        cpu_s: CPU seconds of the sending process while it ran; of the busiest one after a merge.
        ended_s: when the last answer ended, seconds from the run's start.
        counts: answers with wrong or missing usage blocks.
        interrupted: the run was ended from outside.
        clock_error_s: how far apart the shards may have started, at most; 0 on one machine.
    """

    requests: NDArray[Any]
    failures: Counter[str]
    send_lag_s: NDArray[np.float64]
    loop_lag_s: NDArray[np.float64]
    cpu_s: float
    ended_s: float
    counts: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    clock_error_s: float = 0.0


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of all shards, given in order of their index."""
    if len(outcomes) == 1:
        return outcomes[0]
    requests = np.empty(sum(len(outcome.requests) for outcome in outcomes), dtype=REQUEST_DTYPE)
    for index, outcome in enumerate(outcomes):
        requests[index :: len(outcomes)] = outcome.requests
    return Outcome(
        requests=requests,
        failures=sum((outcome.failures for outcome in outcomes), Counter()),
        send_lag_s=np.concatenate([outcome.send_lag_s for outcome in outcomes]),
        loop_lag_s=np.concatenate([outcome.loop_lag_s for outcome in outcomes]),
        cpu_s=max(outcome.cpu_s for outcome in outcomes),
        ended_s=max(outcome.ended_s for outcome in outcomes),
        counts=sum((outcome.counts for outcome in outcomes), Counter()),
        interrupted=any(outcome.interrupted for outcome in outcomes),
    )
