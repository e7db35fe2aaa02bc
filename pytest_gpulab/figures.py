"""Figures of a Run: percentiles, rates and costs, each a pure function from one Run to one number.

Latencies count from the scheduled time and cover every offered request: an undelivered one is infinite. They
describe this workload, not a stationary state.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.run import GIVEN_UP, Run
from pytest_gpulab.timeline import Stage, cold_start, counts

Interval = Literal["e2e", "ttft", "tpot", "service"]


@cache
def sample_floor(percent: float) -> int:
    """Requests a run must offer before a percentile of it means anything: 130 for p95, 662 for p99.

    So many that at least two lie beyond the percentile, on its rarer side, with 99 % probability: with fewer, a
    distribution-free interval of the percentile has no finite end worth the name.
    """
    common = max(percent, 100 - percent) / 100
    requests = 2
    while common**requests + requests * (1 - common) * common ** (requests - 1) > 0.01:
        requests += 1
    return requests


def latencies(run: Run, interval: Interval) -> NDArray[np.float64]:
    """Seconds of `interval` for every offered request, inf where it was not delivered.

    e2e: last token - scheduled. ttft: first token - scheduled. service: last token - sent. tpot: (last - first
    token) / (output tokens - 1); requests of one token have none and are left out.
    """
    table = run.requests
    if interval == "tpot":
        table = table[(table["output_tokens"] > 1) | ~table["ok"]]
    return np.where(table["ok"], _seconds(table, interval), np.inf)


def _seconds(table: NDArray[Any], interval: Interval) -> NDArray[np.float64]:
    """Seconds of `interval` in each row of a request table; NaN where it never happened, 0 tpot for one token."""
    start, end = {
        "e2e": ("scheduled", "last_token"),
        "ttft": ("scheduled", "first_token"),
        "service": ("sent", "last_token"),
        "tpot": ("first_token", "last_token"),
    }[interval]
    seconds: NDArray[np.float64] = table[end] - table[start]
    return seconds / np.maximum(table["output_tokens"] - 1, 1) if interval == "tpot" else seconds


def percentile(values: NDArray[np.float64], percent: float) -> float:
    """The nearest-rank percentile: the smallest value that `percent` % of all values do not exceed; NaN of none."""
    if not len(values):
        return math.nan
    exact = Fraction(str(float(percent)))  # 0.55 * 100 is more than 55 in floating point
    rank = max(math.ceil(exact * len(values) / 100) - 1, 0)
    return float(np.partition(values, rank)[rank])


def delivery_ratio(run: Run, *, timeout_s: float = math.inf) -> float:
    """Requests answered in full, at most `timeout_s` after they were sent / requests offered by the schedule."""
    table = run.requests
    in_time = table["ok"] & ~(_seconds(table, "service") > timeout_s)
    return float(in_time.mean()) if len(table) else float("nan")


def request_rate(run: Run) -> float:
    """Delivered requests per second of the run's wall time."""
    return per_second(run, run.requests["ok"].sum())


def output_tokens_per_s(run: Run) -> float:
    """Output tokens of delivered requests per second of the run's wall time."""
    return per_second(run, run.requests["output_tokens"][run.requests["ok"]].sum())


def per_second(run: Run, count: float) -> float:
    """`count` over the run's wall time; NaN, which decides nothing, where no time passed: all was lost at once."""
    return float(count) / run.duration_s if run.duration_s else math.nan


def useful_requests(run: Run, slo: dict[Interval, float]) -> int:
    """How many requests met every limit of `slo` (seconds); undelivered ones never do."""
    good = run.requests["ok"].copy()
    for interval, limit_s in slo.items():
        good &= _seconds(run.requests, interval) <= limit_s
    return int(good.sum())


def mean_queue_delay(run: Run) -> float:
    """Seconds from QUEUED to first SCHEDULED in the server, mean over requests, from vLLM's own sum and count.

    NaN, which decides nothing, where the server showed no metrics or scheduled nothing, and where the client gave
    requests up: vLLM counts none that is aborted, so those that queued longest would be missing from the mean.
    """
    if run.totals.get(GIVEN_UP):
        return math.nan
    count = run.totals.get("request_queue_time_seconds_count")
    return run.totals["request_queue_time_seconds_sum"] / count if count else math.nan


def highest(run: Run, gauge: str) -> float:
    """The highest sample of a server gauge; NaN where none was taken."""
    return float(run.server[gauge].max()) if len(run.server) else math.nan


# --- what it cost ---------------------------------------------------------------------------------------------


def gpu_seconds(run: Run) -> float:
    """Billed accelerator time in seconds: a fleet's from the run's start to zero nodes, provisioning, idle time and
    drain included; without a fleet one accelerator for the run's wall time.
    """
    return run.totals.get("gpu_seconds", run.duration_s)


def cost_usd(run: Run, price_usd_per_hour: float) -> float:
    """USD for `gpu_seconds`: a fleet's bill, else at `price_usd_per_hour`."""
    return run.totals.get("cost_usd", price_usd_per_hour * run.duration_s / 3600)


def cost_per_useful_request(run: Run, price_usd_per_hour: float, slo: dict[Interval, float]) -> float:
    """USD of billed accelerator time per request that met the limits; inf when none did."""
    good = useful_requests(run, slo)
    return cost_usd(run, price_usd_per_hour) / good if good else float("inf")


def gpu_utilization(run: Run) -> float:
    """Share of the billed accelerator time in which a request ran; 0 where nothing was billed, NaN where the server
    showed no metrics.
    """
    busy = run.totals["gpu_busy_seconds"] if "gpu_busy_seconds" in run.totals else _sampled_busy_seconds(run)
    billed = gpu_seconds(run)
    return busy / billed if billed else 0.0


def _sampled_busy_seconds(run: Run) -> float:
    """Seconds in which a request ran, by samples that each stand for the time since the one before."""
    if not len(run.server):
        return math.nan
    return float(np.diff(run.server["time"], prepend=0.0)[run.server["num_requests_running"] > 0].sum())


# --- what the fleet did ---------------------------------------------------------------------------------------


def reached(run: Run, stage: Stage) -> float:
    """Seconds after the run's start at which the first cold start had reached `stage`; inf when it never did."""
    return cold_start(run.timeline).get(stage, float("inf"))


def replicas_ready(run: Run, replicas: int) -> float:
    """Seconds after the run's start at which `replicas` were first Ready together; inf when they never were.

    Without a timeline there is one server, and it is ready at the start.
    """
    moments = [max(0.0, at) for at, ready in _ready(run) if ready >= replicas]
    return min(moments, default=float("inf"))


def peak_replicas(run: Run) -> float:
    """The most replicas that were Ready together."""
    return float(max(ready for _, ready in _ready(run)))


def seconds_without_replica(run: Run) -> float:
    """Seconds of the run in which no replica was Ready."""
    steps = [*_ready(run), (run.duration_s, 0)]
    return sum(
        min(until, run.duration_s) - max(since, 0.0)
        for (since, ready), (until, _) in pairwise(steps)
        if not ready and until > 0.0 and since < run.duration_s
    )


def _ready(run: Run) -> list[tuple[float, int]]:
    """(seconds, Ready replicas from then on), up to the run's end."""
    found = [(number.at, number.ready) for number in counts(run.timeline) if number.at < run.duration_s]
    return found or [(0.0, 1)]
