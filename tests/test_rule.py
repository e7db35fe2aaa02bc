"""The sequential sign rule: its error rate, its power, and the cases that break weaker rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from pytest_gpulab.rule import LOOKS, Look, Vote, decide, error_probability, interval_ranks, looks_for

COMPARISONS = 20_000
REPEATS = LOOKS[-1].repeats


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return random.normal(size=shape)


def lognormal(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return random.lognormal(sigma=1.0, size=shape)


def pareto(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return random.pareto(1.5, size=shape)


def one_in_ten_ten_times_larger(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return (5 + random.normal(size=shape)) * np.where(random.random(shape) < 0.1, 10.0, 1.0)


FAMILIES = [normal, lognormal, pareto, one_in_ten_ten_times_larger]


def outcomes(below: NDArray[np.bool_]) -> dict[str, float]:
    """Share of each outcome over rows of votes."""
    counts = {"held": 0, "false": 0, "undecided": 0}
    for row in below:
        counts[decide(lambda i, row=row: 1 if row[i] else -1, LOOKS).outcome] += 1
    return {outcome: count / len(below) for outcome, count in counts.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_paired_options_that_do_not_differ_are_rarely_told_apart(family: Callable[..., NDArray[np.float64]]) -> None:
    random = np.random.default_rng(1)
    left, right = family(random, (2, COMPARISONS, REPEATS))
    shares = outcomes(left < right)
    assert shares["held"] + shares["false"] <= 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_at_the_median_is_rarely_decided(family: Callable[..., NDArray[np.float64]]) -> None:
    random = np.random.default_rng(2)
    median = np.median(family(random, (1_000_000,)))
    shares = outcomes(family(random, (COMPARISONS, REPEATS)) < median)
    assert shares["held"] + shares["false"] <= 0.05


def test_the_error_probability_is_that_of_all_coin_sequences() -> None:
    """Against a count over every one of the 2**12 sequences."""
    looks = (Look(6, 0), Look(12, 1))
    believed = 0
    for sequence in range(2**12):
        votes = [1 if sequence >> i & 1 else -1 for i in range(12)]
        believed += decide(lambda i, votes=votes: votes[i], looks).outcome == "held"
    assert error_probability(looks) == pytest.approx(believed / 2**12)


def test_a_real_difference_is_found() -> None:
    """Nine repeats of ten on one side decide most of the time, and practically never wrongly."""
    shares = outcomes(np.random.default_rng(3).random((5_000, REPEATS)) < 0.9)
    assert shares["held"] >= 0.85
    assert shares["false"] == 0


def test_a_clear_difference_needs_six_repeats() -> None:
    asked: list[int] = []

    def vote(repeat: int) -> int:
        asked.append(repeat)
        return 1

    result = decide(vote, LOOKS)  # type: ignore[arg-type]
    assert (result.outcome, result.repeats, asked) == ("held", 6, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize(("repeats", "dissents"), LOOKS)
@pytest.mark.parametrize(("majority", "outcome"), [(1, "held"), (-1, "false")])
def test_each_look_allows_its_dissents_and_not_one_more(
    repeats: int, dissents: int, majority: int, outcome: str
) -> None:
    """Dissents come first, so earlier looks cannot decide."""
    for count, expected in ((dissents, outcome), (dissents + 1, "undecided")):
        votes = [-majority] * count + [majority] * (repeats - count)
        looks = tuple(look for look in LOOKS if look.repeats <= repeats)
        assert decide(lambda i, votes=votes: votes[i], looks).outcome == expected  # type: ignore[arg-type,return-value]


def test_votes_left_open_by_the_calibration_decide_nothing() -> None:
    result = decide(lambda _: 0, LOOKS)
    assert (result.outcome, result.held, result.false) == ("undecided", 0, 0)


@pytest.mark.parametrize("alternatives", [2, 3, 5, 8])
def test_the_error_level_is_split_between_alternatives(alternatives: int) -> None:
    looks = looks_for(24, alternatives)
    assert alternatives * error_probability(looks) <= error_probability(LOOKS)


def test_too_many_alternatives_for_the_repeats_stay_undecided() -> None:
    """The repeats are made all the same: they are evidence, and a longer session goes on from them."""
    asked: list[int] = []

    def vote(repeat: int) -> Vote:
        asked.append(repeat)
        return 1

    result = decide(vote, looks_for(6, 3), looks_against=looks_for(6))
    assert (result.outcome, result.repeats, asked) == ("undecided", 6, list(range(6)))


def test_a_claim_may_be_refuted_sooner_than_it_may_be_believed() -> None:
    refuted = decide(lambda _: -1, looks_for(24, 3), looks_against=LOOKS)
    believed = decide(lambda _: 1, looks_for(24, 3), looks_against=LOOKS)
    assert (refuted.outcome, refuted.repeats) == ("false", 6)
    assert (believed.outcome, believed.repeats) == ("held", 12)


def test_alternatives_of_which_one_holds_are_rarely_all_refuted() -> None:
    """The one at its own median, two that never hold: all three are false no more often than the one alone."""
    coins = np.random.default_rng(7).random((COMPARISONS, REPEATS)) < 0.5
    looks = looks_for(24, 3)
    refuted = sum(
        decide(lambda i, row=row: 1 if row[i] else -1, looks, looks_against=LOOKS).outcome == "false" for row in coins
    )
    assert refuted / COMPARISONS <= 1.1 * error_probability(LOOKS)


@pytest.mark.parametrize(("repeats", "dissents"), LOOKS)
def test_the_interval_clears_a_threshold_exactly_when_the_look_decides(repeats: int, dissents: int) -> None:
    low, high = interval_ranks(repeats)
    assert (low, high) == (dissents, repeats - 1 - dissents)


def test_one_repeat_is_its_own_interval() -> None:
    assert interval_ranks(1) == (0, 0)
