"""What a driver of the engine fills in while a run goes on, and how it becomes the tables of a Run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.run import REQUEST_DTYPE, SERVER_DTYPE

SAMPLE_EVERY_S = 1.0


@dataclass
class Outcome:
    """Per request: seconds from the run's start, NaN for what never happened, and tokens received.

    `samples` are rows of SERVER_DTYPE. `ended` is when the last answer arrived or was given up.
    """

    scheduled: list[float]
    sent: list[float]
    first_token: list[float]
    last_token: list[float]
    received: list[int]
    samples: list[tuple[float, int, int, float, int, int, int]] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    ended: float = 0.0
    problems: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, scheduled: list[float], sent: list[float]) -> Outcome:
        """Nothing has happened yet."""
        never = [math.nan] * len(scheduled)
        return cls(scheduled, sent, never, never.copy(), [0] * len(scheduled))

    def request_table(self, schedule: NDArray[Any]) -> NDArray[Any]:
        """REQUEST_DTYPE rows, in the schedule's order."""
        table = np.empty(len(schedule), dtype=REQUEST_DTYPE)
        table["scheduled"] = self.scheduled
        table["sent"] = self.sent
        table["first_token"] = self.first_token
        table["last_token"] = self.last_token
        table["prompt_tokens"] = schedule["prompt_tokens"]
        table["output_tokens"] = self.received
        table["ok"] = table["output_tokens"] == schedule["output_tokens"]
        return table

    def server_table(self) -> NDArray[Any]:
        """SERVER_DTYPE rows, one a second."""
        return np.array(self.samples, dtype=SERVER_DTYPE)


def totals(
    *,
    queue_time_s: float,
    finished: int,
    prompt_tokens: int,
    generation_tokens: int,
    preemptions: int,
    prefix_queries: int,
    prefix_hits: int,
) -> dict[str, float]:
    """Sums over a run under vLLM's metric names. vLLM counts queue time when a request finishes."""
    return {
        "request_queue_time_seconds_sum": queue_time_s,
        "request_queue_time_seconds_count": finished,
        "request_success_total": finished,
        "prompt_tokens_total": prompt_tokens,
        "generation_tokens_total": generation_tokens,
        "num_preemptions_total": preemptions,
        "prefix_cache_queries_total": prefix_queries,
        "prefix_cache_hits_total": prefix_hits,
    }
