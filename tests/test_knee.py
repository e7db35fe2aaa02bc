"""The knee search, on a target whose knee is known."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulab import any_of, find_knee
from pytest_gpulab.experiment import Constant, Profile, Shape, Workload
from pytest_gpulab.gates import Ledger, TargetRefused, collecting
from pytest_gpulab.knee import Knee
from pytest_gpulab.lab import Lab
from pytest_gpulab.run import Run
from tests.known import PROFILE, known_run


class KneeAt:
    """A server that answers in 1 s below its knee and in 100 s above it; close to it, in either, by the seed."""

    name, basis, max_repeats, repeatable = "known", "measured", 24, False

    def __init__(self, knee: float, blur: float = 0.0) -> None:
        self.knee, self.blur = knee, blur

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        rate = workload.arrivals.rate  # type: ignore[union-attr]
        near = abs(rate / self.knee - 1) < self.blur
        slow = seed % 2 == 0 if near else rate > self.knee
        return known_run(100.0 if slow else 1.0, seed=seed)


def search(target: KneeAt, low: float = 0.5, high: float = 8.0, resolution: float = 0.1) -> Knee:
    lab = Lab(target)  # type: ignore[arg-type]

    def arm(rate: float):  # type: ignore[no-untyped-def]
        workload = Workload(arrivals=Constant(rate=rate), shape=Shape(prompt_tokens=8, output_tokens=2), requests=200)
        return lab.measure(workload, PROFILE)

    return find_knee(arm, low=low, high=high, stable=lambda m: m.p95 <= 10.0, resolution=resolution)


@settings(max_examples=30, deadline=None)
@given(knee=st.floats(0.6, 7.5), resolution=st.floats(0.03, 0.5))
def test_the_bracket_holds_the_knee_and_is_as_narrow_as_asked(knee: float, resolution: float) -> None:
    found = search(KneeAt(knee), resolution=resolution)
    assert found.stable_rate <= knee <= found.unstable_rate
    assert found.unstable_rate / found.stable_rate <= 1 + resolution


@pytest.mark.parametrize(("knee", "bracket"), [(0.1, (0.0, 0.5)), (20.0, (8.0, math.inf))])
def test_a_knee_outside_the_range_is_not_invented(knee: float, bracket: tuple[float, float]) -> None:
    found = search(KneeAt(knee))
    assert (found.stable_rate, found.unstable_rate) == bracket


class Lent(KneeAt):
    """A machine that is taken away after some runs."""

    left = 0

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        if not self.left:
            raise TargetRefused("the machine is gone")
        self.left -= 1
        return super().run(workload, profile, seed)


@pytest.mark.parametrize(("runs", "bracket"), [(12, (0.5, 8.0)), (18, (2.0, 8.0)), (20, (2.0, 8.0))])
def test_a_target_that_serves_no_more_leaves_the_bracket_as_it_is(runs: int, bracket: tuple[float, float]) -> None:
    """The low and the high rate take 6 runs each, and so does the middle, 2 requests/s."""
    target = Lent(3.0)
    target.left = runs
    found = search(target)
    assert (found.stable_rate, found.unstable_rate) == bracket


def test_a_target_that_serves_nothing_is_refused() -> None:
    with pytest.raises(TargetRefused, match="the machine is gone"):
        search(Lent(3.0))


def test_an_undecided_rate_ends_the_search_with_a_wide_bracket() -> None:
    found = search(KneeAt(2.0, blur=0.3), resolution=0.05)
    assert found.stable_rate < 2.0 * 0.7 * 1.01
    assert found.unstable_rate > 2.0 * 1.3 * 0.99
    assert {point.outcome for point in found.points} == {"held", "false", "undecided"}


def test_a_knee_is_compared_by_its_whole_bracket() -> None:
    with collecting(Ledger("item")) as ledger:
        knee = search(KneeAt(3.0))
        assert knee >= 2.0
        assert knee <= 4.0
        assert knee >= 3.0
        with pytest.raises(AssertionError):
            assert knee >= 6.0
    assert [gate.outcome for gate in ledger.gates] == ["held", "held", "undecided", "false"]
    assert ledger.knees == [knee]


def test_knees_compare_with_a_margin() -> None:
    slow, fast = search(KneeAt(1.0)), search(KneeAt(4.0))
    assert (fast >= 2.0 * slow).decide().outcome == "held"
    assert (slow >= fast).decide().outcome == "false"
    assert (fast >= 4.0 * slow).decide().outcome == "undecided"


def test_a_knee_compares_with_knees_and_rates_only() -> None:
    knee = search(KneeAt(1.0))
    for other in (knee.points[0].measurement.request_rate, "2 req/s", None):
        with pytest.raises(TypeError, match=r"against another knee or a rate\) >= must be given a plain number, got"):
            knee >= other  # type: ignore[operator]  # noqa: B015


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2, 1), (-1, 1), (1, math.inf)])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"0 < low < high requests/s, got low={low} and high={high}"):
        search(KneeAt(1.0), low=low, high=high)


class Simulated(KneeAt):
    """A knee for every `max_num_seqs`, simulated by a calibration that may be 30 % off."""

    basis, repeatable = "simulated", True

    def __init__(self, calibrations: dict[int, str]) -> None:
        self.calibrations = calibrations

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        seqs = profile.engine_args.max_num_seqs or 0
        slow = workload.arrivals.rate > seqs  # type: ignore[union-attr]
        server = self.calibrations[seqs]
        return known_run(100.0 if slow else 1.0, seed=seed, basis="simulated", relative_error=0.3, server=server)


@pytest.mark.parametrize(("other", "outcome"), [("a base, g4dn cluster", "held"), ("b base", "undecided")])
def test_the_error_of_one_calibration_is_common_to_both_knees(other: str, outcome: str) -> None:
    """3 against 4 requests/s: told apart only where both are off by the same factor."""
    lab = Lab(Simulated({3: "a base", 4: other}))  # type: ignore[arg-type]

    def knee(seqs: int) -> Knee:
        def arm(rate: float):  # type: ignore[no-untyped-def]
            shape = Shape(prompt_tokens=8, output_tokens=2)
            workload = Workload(arrivals=Constant(rate=rate), shape=shape, requests=200)
            return lab.measure(workload, PROFILE.with_engine_args(max_num_seqs=seqs))

        return find_knee(arm, low=0.5, high=8.0, stable=lambda m: m.p95 <= 10)

    assert (knee(4) >= knee(3)).decide().outcome == outcome


def test_stable_must_be_a_claim() -> None:
    lab = Lab(KneeAt(2.0))  # type: ignore[arg-type]
    workload = Workload(arrivals=Constant(rate=1), shape=Shape(prompt_tokens=8, output_tokens=2), requests=200)
    with pytest.raises(TypeError, match=r"stable must return a claim, such as `m.queue_delay <= 1`, got "):
        find_knee(
            lambda rate: lab.measure(workload, PROFILE),
            low=0.5,
            high=8.0,
            stable=lambda m: m.queue_delay,  # type: ignore[arg-type,return-value]
        )


def test_an_undecided_knee_says_what_was_missing() -> None:
    blurred = search(KneeAt(2.0, blur=0.3), resolution=0.05)
    decided = (blurred >= 2.0).decide()
    assert decided.outcome == "undecided"
    assert re.search(r"undecided by the bracket; at 2 requests/s: .* 12 of 24 repeats held", decided.reason)
    stable = search(KneeAt(20.0))
    assert (stable >= 10.0).decide().reason.endswith("8 requests/s, the highest rate tried, was still stable")


def test_a_widened_bracket_says_so() -> None:
    lab = Lab(Simulated({3: "a base"}))  # type: ignore[arg-type]

    def arm(rate: float):  # type: ignore[no-untyped-def]
        workload = Workload(arrivals=Constant(rate=rate), shape=Shape(prompt_tokens=8, output_tokens=2), requests=200)
        return lab.measure(workload, PROFILE.with_engine_args(max_num_seqs=3))

    knee = find_knee(arm, low=0.5, high=8.0, stable=lambda m: m.p95 <= 10)
    decided = (knee >= 2.5).decide()
    assert decided.outcome == "undecided"
    assert decided.reason.endswith("(calibration error 30.0% included)")


def test_a_search_is_no_alternative_among_several() -> None:
    """It was made at the whole error level: four of them in one disjunction would be believed four times as often."""
    knee = search(KneeAt(3.0))
    with pytest.raises(
        TypeError, match="any_of splits the error level between its claims, which `knee >= 2 requests"
    ):
        any_of(knee >= 2.0, knee.points[0].measurement.p95 <= 10.0)


def test_an_arm_must_depend_on_the_rate() -> None:
    lab = Lab(KneeAt(2.0))  # type: ignore[arg-type]
    workload = Workload(arrivals=Constant(rate=1), shape=Shape(prompt_tokens=8, output_tokens=2), requests=200)
    with pytest.raises(
        ValueError, match=r"must measure at the rate that it is given, got the same .* at 0.5 and 8 req"
    ):
        find_knee(lambda rate: lab.measure(workload, PROFILE), low=0.5, high=8.0, stable=lambda m: m.p95 <= 10.0)
