"""Seeded arrival schedules and prompts: pure functions of the workload and the seed.

Options that are compared share them: nothing here looks at the profile or at the admission policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.experiment import (
    ClosedLoop,
    Constant,
    Gamma,
    Lengths,
    Mix,
    Poisson,
    Ramp,
    Shape,
    SpikeToZero,
    Trace,
    Workload,
)

Schedule = NDArray[Any]
"""Structured array of SCHEDULE_DTYPE, one row a request, in order of arrival."""

SCHEDULE_DTYPE = np.dtype([("scheduled", "f8"), ("prompt_tokens", "i4"), ("output_tokens", "i4")])

FIRST_PROMPT_ID = 300
"""Token ids below are special or single bytes in common vocabularies."""

PROMPT_ID_COUNT = 30_000
"""Prompts use ids from FIRST_PROMPT_ID up to this many more: every known vocabulary has them."""

# One independent random stream for each purpose, so that a longer run starts with the shorter one's draws.
_TIMES, _SHAPES, _PROMPTS = 0, 1, 2


def schedule(workload: Workload, seed: int) -> Schedule:
    """The requests of `workload` under `seed`: scheduled seconds from the run's start, and token counts.

    In a closed loop `scheduled` is 0 for the first requests, one a user, and NaN for the others: they are due
    when an earlier one is answered.
    """
    if isinstance(workload.arrivals, Trace):
        return np.array(list(workload.arrivals.rows), dtype=SCHEDULE_DTYPE)
    times = _times(workload, _stream(seed, _TIMES))
    rows = np.empty(len(times), dtype=SCHEDULE_DTYPE)
    rows["scheduled"] = times
    rows["prompt_tokens"], rows["output_tokens"] = _lengths(workload, len(times), _stream(seed, _SHAPES))
    return rows


def prompt_ids(workload: Workload, seed: int, index: int, prompt_tokens: int) -> NDArray[np.int64]:
    """Token ids of request `index`'s prompt, shape (prompt_tokens,).

    The first ``shared_prefix_tokens`` are the same for all requests and seeds, the rest is unique to the
    (seed, index) pair.
    """
    shared = min(workload.shared_prefix_tokens, prompt_tokens)
    prefix = _stream(0, _PROMPTS).integers(PROMPT_ID_COUNT, size=shared)
    own = _stream(seed, _PROMPTS, index + 1).integers(PROMPT_ID_COUNT, size=prompt_tokens - shared)
    return FIRST_PROMPT_ID + np.concatenate([prefix, own])


def _stream(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _times(workload: Workload, random: np.random.Generator) -> NDArray[np.float64]:
    arrivals, count, duration_s = workload.arrivals, workload.requests, workload.duration_s
    if isinstance(arrivals, ClosedLoop):
        assert count is not None
        return np.where(np.arange(count) < arrivals.concurrency, 0.0, np.nan)
    if isinstance(arrivals, Constant):
        return _until(count, duration_s, lambda k: k / arrivals.rate, arrivals.rate)
    if isinstance(arrivals, Ramp):
        return _until(count, duration_s, lambda k: _ramp_time(arrivals, k), max(arrivals.start_rate, arrivals.rate))
    if isinstance(arrivals, SpikeToZero):
        assert duration_s is not None
        return _random_times(None, min(arrivals.spike_s, duration_s), 1.0, arrivals.rate, random)
    if isinstance(arrivals, Gamma):
        return _random_times(count, duration_s, arrivals.burstiness, arrivals.rate, random)
    assert isinstance(arrivals, Poisson)
    return _random_times(count, duration_s, 1.0, arrivals.rate, random)


def _until(count: int | None, duration_s: float | None, time_of: Any, highest_rate: float) -> NDArray[np.float64]:
    if count is not None:
        return np.asarray(time_of(np.arange(count)), dtype=np.float64)
    assert duration_s is not None
    times = np.asarray(time_of(np.arange(int(duration_s * highest_rate) + 2)), dtype=np.float64)
    return times[times < duration_s]


def _ramp_time(ramp: Ramp, k: NDArray[Any]) -> NDArray[np.float64]:
    """When the integral of the rate reaches k: a quadratic during the ramp, linear after it."""
    slope = (ramp.rate - ramp.start_rate) / ramp.ramp_s
    ramped = (ramp.start_rate + ramp.rate) / 2 * ramp.ramp_s
    after = ramp.ramp_s + (k - ramped) / ramp.rate
    if slope == 0:
        return k / ramp.rate
    discriminant = np.maximum(ramp.start_rate**2 + 2 * slope * k, 0.0)
    during = (np.sqrt(discriminant) - ramp.start_rate) / slope
    return np.where(k <= ramped, during, after)


def _random_times(
    count: int | None, duration_s: float | None, burstiness: float, rate: float, random: np.random.Generator
) -> NDArray[np.float64]:
    def gaps(size: int) -> NDArray[np.float64]:
        return random.standard_gamma(burstiness, size) / (burstiness * rate)

    if count is not None:
        return np.cumsum(gaps(count))
    assert duration_s is not None
    times = np.cumsum(gaps(int(duration_s * rate * 1.1) + 16))
    while times[-1] < duration_s:
        times = np.concatenate([times, times[-1] + np.cumsum(gaps(len(times)))])
    return times[times < duration_s]


def _lengths(
    workload: Workload, count: int, random: np.random.Generator
) -> tuple[NDArray[np.int32] | int, NDArray[np.int32] | int]:
    shape = workload.shape
    if isinstance(shape, Shape):
        return shape.prompt_tokens, shape.output_tokens
    if isinstance(shape, Mix):
        weights = np.array([weight for weight, _ in shape.parts])
        drawn = random.choice(len(weights), size=count, p=weights / weights.sum())
        prompts = np.array([part.prompt_tokens for _, part in shape.parts], dtype=np.int32)
        outputs = np.array([part.output_tokens for _, part in shape.parts], dtype=np.int32)
        return prompts[drawn], outputs[drawn]
    assert isinstance(shape, Lengths)
    normal = random.standard_normal((count, 2))
    return (
        _log_normal(shape.prompt_median, shape.prompt_sigma, shape.prompt_max, normal[:, 0]),
        _log_normal(shape.output_median, shape.output_sigma, shape.output_max, normal[:, 1]),
    )


def _log_normal(median: int, sigma: float, most: int, normal: NDArray[np.float64]) -> NDArray[np.int32]:
    tokens: NDArray[np.int32] = np.clip(np.rint(median * np.exp(sigma * normal)), 1, most).astype(np.int32)
    return tokens
