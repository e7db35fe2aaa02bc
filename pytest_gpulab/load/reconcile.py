"""Reconcile: whether what the client saw and what the server counted can be the same run.

Each check returns why the run is no valid evidence. Counts have no tolerance; requests that did not end well on the
client's side leave open how far the server got with them, and only they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.load.bodies import SALT_TOKENS
from pytest_gpulab.load.share import Outcome

MOST_LAG_S = 0.010
"""Above this p99 the client was too slow to be trusted."""

MOST_CLOCK_ERROR_S = 0.050
"""A shard that starts late shifts its arrivals against the others'; its latencies are its own and stay right. Up to
this the shift is a step or two of a slow engine, and 1 % of the 5 s over which rates are looked at."""

_MOST_APART_S = 2.5
"""Samples up to so far apart show the server: one that is late, or a single one that did not come, is no loss."""

_MOST_LOST = 0.1
"""Share of the run that may go without samples of the server."""

_LITTLE_TOLERANCE = 0.25
_LITTLE_SAMPLES = 20


def client_problems(outcome: Outcome) -> Iterator[str]:
    """What the client knows to be wrong with itself or with the answers."""
    for what, lags in (("sent requests", outcome.send_lag_s), ("ran timers", outcome.loop_lag_s)):
        if len(lags) and (lag := lag_p99(lags)) > MOST_LAG_S:
            yield (
                f"the client {what} late: p99 {lag * 1e3:.1f} ms after they were due, more than "
                f"{MOST_LAG_S * 1e3:.0f} ms; use more processes or a machine of its own"
            )
    if outcome.clock_error_s > MOST_CLOCK_ERROR_S:
        yield (
            f"the shards may have started {outcome.clock_error_s * 1e3:.0f} ms apart, more than "
            f"{MOST_CLOCK_ERROR_S * 1e3:.0f} ms; measure from nearer to the cluster, or at a rate that one pod sends"
        )
    for name, words in _MISCOUNTS.items():
        if count := outcome.counts[name]:
            yield f"{count} of {outcome.counts['whole']} answers {words}"
    for kind, count in outcome.failures.items():
        if kind.startswith("client_error"):
            yield f"{count} requests failed in the client itself: {kind}"
        if kind.startswith(("http_3", "http_4")) and kind not in _OVERLOADED:
            status = kind.removeprefix("http_")
            yield f"the server refused {count} requests with {status}: {_WHAT_TO_DO.get(status, _OTHERWISE)}"
    if outcome.interrupted:
        yield "interrupted before its end"


_OVERLOADED = ("http_408", "http_429")
"""What a server says because of the load; every other refusal would have come without any."""

_KEY = "give the client the key that the server asks for"
_WHAT_TO_DO = {"401": _KEY, "403": _KEY, "404": "check the address and the name by which it calls the model"}
_OTHERWISE = "it does not take what was sent, whatever the load; its log says why"


def lag_p99(lags: NDArray[np.float64]) -> float:
    """The 99th percentile in seconds; 0 for none."""
    return float(np.percentile(lags, 99)) if len(lags) else 0.0


_MISCOUNTS = {
    "usage_missing": "came without a usage block: their token counts are not verified",
    "output_miscounted": "carried more tokens than their usage block says",
    "prompt_miscounted": "count other prompt tokens than were sent",
}


def server_problems(
    workload: Workload, profile: Profile, outcome: Outcome, totals: Mapping[str, float], *, complete: bool = True
) -> Iterator[str]:
    """Where the server's counters contradict the client's table.

    `complete`: whether the last page of every server was read after its last answer; else they may be too low.
    """
    rows = outcome.requests
    whole = outcome.counts["whole"]
    ok, sent = rows["ok"], ~np.isnan(rows["sent"])
    unsure = sent & ~ok
    limits = {
        "request_success_total": (whole, int(sent.sum())),
        "prompt_tokens_total": (rows["prompt_tokens"][ok].sum(), rows["prompt_tokens"][sent].sum()),
        "generation_tokens_total": (rows["output_tokens"][sent].sum(), None),
    }
    for name, (least, most) in limits.items():
        if name not in totals:
            continue
        got = round(totals[name])
        if (complete and got < least) or (most is not None and got > most):
            expected = f"{least:,}" if most == least else f"{least:,} to {most:,}" if most else f"at least {least:,}"
            yield f"the server counted {got:,} in {name}, the client {expected}"
    if not unsure.any() and totals.get("generation_tokens_total", 0) > (most := int(rows["output_tokens"].sum())):
        got = round(totals["generation_tokens_total"])
        yield f"the server counted {got:,} in generation_tokens_total, the client {most:,}"
    yield from _cache_problems(workload, profile, outcome, totals)


def _cache_problems(
    workload: Workload, profile: Profile, outcome: Outcome, totals: Mapping[str, float]
) -> Iterator[str]:
    hits = totals.get("prefix_cache_hits_total", 0.0)
    sent = int((~np.isnan(outcome.requests["sent"])).sum())
    asked = sent * workload.shared_prefix_tokens
    if profile.engine_args.block_size == 1:  # a block holds what starts all prompts, and one more token by chance
        asked += sent * (SALT_TOKENS + 1)
    recomputed = totals.get("num_preemptions_total", 0.0) * workload.longest_tokens
    if hits > asked + recomputed:
        yield (
            f"{hits:,.0f} prompt tokens came from a warm prefix cache, the workload shares at most {asked:,}; start "
            "with a cold server and keep others off it"
        )


def sample_problems(server: NDArray[Any], lasted_s: float) -> Iterator[str]:
    """Whether the samples cover the run, from its start to `lasted_s`, however many they are: a page that takes
    seconds, or never comes, leaves its seconds without one."""
    apart_s = np.diff(server["time"], prepend=0.0, append=lasted_s)
    lost_s = apart_s[apart_s > _MOST_APART_S].sum()
    if lost_s > _MOST_LOST * lasted_s:
        yield (
            f"no sample of the metrics came in {lost_s:.0f} of {lasted_s:.0f} s, more than {_MOST_LOST:.0%}: what "
            "the server did then is not known; lower the rate, or leave the server's front end more CPU"
        )


def little_problems(server: NDArray[Any], outcome: Outcome) -> Iterator[str]:
    """Little's law: requests in the server, on average, are rate x mean time, which the client knows.

    Fewer are no contradiction: what waits before the engine (connections, tokenisation) is not in its gauges.
    """
    mean, expected, error = in_flight_means(server, outcome)
    if mean > expected * (1 + _LITTLE_TOLERANCE) + 1 + 3 * error:
        yield (
            f"the server held {mean:.1f} requests on average, rate x mean time of the client is {expected:.1f}: it "
            "served others, or samples were lost"
        )


def in_flight_means(server: NDArray[Any], outcome: Outcome) -> tuple[float, float, float]:
    """Mean requests in the server by its gauges, by the client's table, and the standard error of the former.

    NaN where there are too few samples, or requests whose end is unknown.
    """
    rows = outcome.requests
    during = server[server["time"] <= outcome.ended_s]
    sent = ~np.isnan(rows["sent"])
    if len(during) < _LITTLE_SAMPLES or not rows["ok"][sent].all():
        return math.nan, math.nan, math.nan
    held = during["num_requests_running"] + during["num_requests_waiting"]
    expected = float((rows["last_token"] - rows["sent"])[sent].sum()) / outcome.ended_s
    return float(held.mean()), expected, float(held.std() / math.sqrt(len(held)))
