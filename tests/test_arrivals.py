"""Arrival schedules and prompts against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab import (
    ClosedLoop,
    Constant,
    Gamma,
    Lengths,
    Mix,
    Poisson,
    Ramp,
    Shape,
    SpikeToZero,
    Workload,
)
from pytest_gpulab.arrivals import prompt_ids, schedule

SHAPE = Shape(prompt_tokens=512, output_tokens=128)


def workload(arrivals, **fields) -> Workload:  # type: ignore[no-untyped-def]
    return Workload(**{"arrivals": arrivals, "shape": SHAPE, **fields})


def gaps(arrivals) -> np.ndarray:  # type: ignore[no-untyped-def,type-arg]
    return np.diff(schedule(workload(arrivals, requests=100_000), 1)["scheduled"])


def test_constant_arrivals_are_evenly_spaced_from_zero() -> None:
    times = schedule(workload(Constant(rate=4), duration_s=2), 9)["scheduled"]
    assert times == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75])


def test_poisson_gaps_have_equal_mean_and_deviation() -> None:
    found = gaps(Poisson(rate=8))
    assert found.mean() == pytest.approx(1 / 8, rel=0.02)
    assert found.std() == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_stated_burstiness(burstiness: float) -> None:
    found = gaps(Gamma(rate=8, burstiness=burstiness))
    assert found.mean() == pytest.approx(1 / 8, rel=0.03)
    assert found.var() == pytest.approx(1 / (burstiness * 64), rel=0.06)


def test_a_ramp_offers_the_integral_of_its_rate() -> None:
    """2 to 8 req/s in 30 s is 150 requests, then 8 a second: 2550 in 330 s, as in the reference workload."""
    times = schedule(workload(Ramp(start_rate=2, rate=8, ramp_s=30), duration_s=330), 0)["scheduled"]
    assert len(times) == 2550
    assert (times < 30).sum() == 150
    assert np.diff(times[times > 30]) == pytest.approx(1 / 8)


@pytest.mark.parametrize(("start_rate", "rate"), [(0, 10), (1, 10), (10, 1), (4, 4)])
@pytest.mark.parametrize("duration_s", [30.0, 60.0, 90.0])
def test_a_ramp_offers_its_integral_up_and_down(start_rate: float, rate: float, duration_s: float) -> None:
    ramped = min(duration_s, 60.0)
    integral = start_rate * ramped + (rate - start_rate) / 60 * ramped**2 / 2 + rate * (duration_s - ramped)
    ramp = Ramp(start_rate=start_rate, rate=rate, ramp_s=60)
    assert len(schedule(workload(ramp, duration_s=duration_s), 0)) == pytest.approx(integral, abs=1)


@given(start=st.floats(0, 20), rate=st.floats(0.5, 20), ramp_s=st.floats(1, 60))
def test_a_ramp_never_goes_back_in_time(start: float, rate: float, ramp_s: float) -> None:
    times = schedule(workload(Ramp(start_rate=start, rate=rate, ramp_s=ramp_s), requests=200), 0)["scheduled"]
    assert np.isfinite(times).all()
    assert (np.diff(times) >= -1e-9).all()


def test_a_spike_ends_and_the_run_goes_on() -> None:
    times = schedule(workload(SpikeToZero(rate=20, spike_s=30), duration_s=120), 3)["scheduled"]
    assert times.max() < 30
    assert len(times) == pytest.approx(600, abs=100)


def test_closed_loop_users_start_together() -> None:
    times = schedule(workload(ClosedLoop(concurrency=3), requests=5), 0)["scheduled"]
    assert times[:3].tolist() == [0, 0, 0]
    assert np.isnan(times[3:]).all()


def test_a_trace_is_taken_as_it_is() -> None:
    rows = [(0.5, 10, 3), (0.75, 20, 4)]
    assert schedule(Workload.from_trace(rows), 7).tolist() == rows
    assert schedule(Workload.from_trace(np.array(rows)), 7).tolist() == rows


def test_a_mix_draws_by_weight() -> None:
    mix = Mix(
        parts=((6, SHAPE), (3, Shape(prompt_tokens=5, output_tokens=6)), (1, Shape(prompt_tokens=7, output_tokens=8)))
    )
    drawn = schedule(workload(Poisson(rate=1), shape=mix, requests=50_000), 0)
    assert (drawn["prompt_tokens"] == 512).mean() == pytest.approx(0.6, abs=0.01)
    assert (drawn["output_tokens"] == 8).mean() == pytest.approx(0.1, abs=0.01)


def test_lengths_have_the_stated_median_and_maximum() -> None:
    lengths = Lengths(
        prompt_median=400, prompt_sigma=0.8, prompt_max=2000, output_median=100, output_sigma=0, output_max=100
    )
    drawn = schedule(workload(Poisson(rate=1), shape=lengths, requests=50_000), 0)
    assert np.median(drawn["prompt_tokens"]) == pytest.approx(400, rel=0.02)
    assert drawn["prompt_tokens"].max() <= 2000
    assert drawn["prompt_tokens"].min() >= 1
    assert (drawn["output_tokens"] == 100).all()


@given(seed=st.integers(0, 2**31), rate=st.floats(0.1, 100))
def test_a_schedule_is_a_pure_function_of_the_seed(seed: int, rate: float) -> None:
    once, twice = (schedule(workload(Poisson(rate=rate), requests=20), seed) for _ in range(2))
    assert (once == twice).all()
    assert (schedule(workload(Poisson(rate=rate), requests=20), seed + 1) != once).any()


def test_a_longer_run_begins_like_the_shorter_one() -> None:
    short, long = (schedule(workload(Poisson(rate=5), requests=n), 2) for n in (10, 1000))
    assert (long[:10] == short).all()


def test_prompts_share_exactly_the_stated_prefix() -> None:
    shared = workload(Poisson(rate=1), requests=2, shared_prefix_tokens=100)
    one, two = prompt_ids(shared, 0, 0, 512), prompt_ids(shared, 5, 1, 512)
    assert len(one) == 512
    assert (one[:100] == two[:100]).all()
    assert (one[100:] != two[100:]).mean() > 0.9
    assert one.min() >= 300


def test_prompts_are_unique_to_seed_and_request() -> None:
    plain = workload(Poisson(rate=1), requests=2)
    prompts = {prompt_ids(plain, seed, index, 32).tobytes() for seed in range(5) for index in range(5)}
    assert len(prompts) == 25
