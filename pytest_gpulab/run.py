"""A Run: one execution's evidence, whatever target it ran on.

The request table comes from the client's side of the wire, the server table and the totals from vLLM's
metrics. Figures (percentiles, rates, costs) are computed from them in `pytest_gpulab.figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Basis = Literal["simulated", "emulated", "measured"]

CLIENT_FAILED: Final = "client_failed_"
"""Begins the names of totals that count undelivered requests, by kind."""

GIVEN_UP: Final = f"{CLIENT_FAILED}timeout"
"""The total that counts requests whose answer the client did not await to its end."""

REQUEST_DTYPE = np.dtype(
    [
        ("scheduled", "f8"),
        ("sent", "f8"),
        ("first_token", "f8"),
        ("last_token", "f8"),
        ("prompt_tokens", "i4"),
        ("output_tokens", "i4"),
        ("ok", "?"),
    ]
)
"""One row a request that the schedule offered. Times are seconds from the run's start; NaN: never happened.

``output_tokens`` counts tokens received, ``ok`` means that all requested tokens arrived.
"""

SERVER_DTYPE = np.dtype(
    [
        ("time", "f8"),
        ("num_requests_running", "i4"),
        ("num_requests_waiting", "i4"),
        ("kv_cache_usage", "f8"),
        ("prompt_tokens_total", "i8"),
        ("generation_tokens_total", "i8"),
        ("num_preemptions_total", "i8"),
    ]
)
"""One row a scrape, each second: gauges, and counters since the run's start. KV usage is a fraction."""


UNKNOWN_ERROR: Final = "the calibration's error was never found; run gpulab fit without --no-check"


@dataclass(frozen=True)
class Provenance:
    """Where a Run comes from: enough to repeat it."""

    target: str
    basis: Basis
    seed: int
    definition_hash: str
    """Hash of workload and profile together."""
    server: str
    """What served: calibration and its variant, or vLLM's version and the GPU."""
    relative_error: float = 0.0
    """How far absolute figures may be off (0.05 = 5 %): the calibration's stored error, infinite where that was never
    found; 0 when measured."""

    @property
    def calibration(self) -> str:
        """Whose error that is. A fleet's server adds its cluster, which the cost of a step does not depend on."""
        return self.server.partition(", ")[0]


@dataclass(frozen=True)
class Run:
    """One execution's evidence.

    Attributes:
        requests: REQUEST_DTYPE, in order of the schedule.
        server: SERVER_DTYPE, once a second; empty where the target shows no metrics.
        totals: sums over the run under vLLM's metric names without the ``vllm:`` prefix
            (``request_queue_time_seconds_sum``, ``request_queue_time_seconds_count``,
            ``prompt_tokens_total``, ``generation_tokens_total``, ``num_preemptions_total``,
            ``prefix_cache_queries_total``, ``prefix_cache_hits_total``, ``request_success_total``).
        duration_s: from the run's start to the last answer, the last arrival or the end of the workload's stated
            duration, whichever is latest (`end_of_run`): the accelerator is billed for all of it.
        timeline: (seconds, what happened), in order.
        problems: why this run is no valid evidence; empty for a valid run. Costs that nobody has held against a run
            are one reason: they may be off by anything.
    """

    requests: NDArray[Any]
    server: NDArray[Any]
    totals: Mapping[str, float]
    duration_s: float
    provenance: Provenance
    timeline: tuple[tuple[float, str], ...] = ()
    problems: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if math.isinf(self.provenance.relative_error) and UNKNOWN_ERROR not in self.problems:
            object.__setattr__(self, "problems", (*self.problems, UNKNOWN_ERROR))


def end_of_run(requests: NDArray[Any], ended_s: float, stated_s: float | None) -> float:
    """A run's `duration_s`, also where no request was answered.

    Args:
        requests: REQUEST_DTYPE.
        ended_s: when the last request was answered, or lost on its way.
        stated_s: how long the workload says it lasts.
    """
    return max(ended_s, stated_s or 0.0, float(np.nanmax(requests["scheduled"], initial=0.0)))


def offered_problems(requests: NDArray[Any]) -> tuple[str, ...]:
    """Chance may let a short workload with a low rate offer nothing: no evidence of what serves."""
    if len(requests):
        return ()
    return ("the workload offered no request, so this run shows nothing; raise its rate or let it last longer",)
