"""Measurements, estimates and claims, on runs of known truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pytest_gpulab import any_of, caveat, requires
from pytest_gpulab.evidence import Claim
from pytest_gpulab.experiment import Profile
from pytest_gpulab.figures import percentile, sample_floor
from pytest_gpulab.gates import Ledger, collecting
from pytest_gpulab.lab import Lab
from pytest_gpulab.measurement import Measurement, summarize
from pytest_gpulab.run import Run
from tests.known import PROFILE, WORKLOAD, Known, arm, known_lab, known_run


def spread(profile: Profile, seed: int) -> Run:
    """Latency: max_num_seqs seconds, plus one hundredth for each seed."""
    return known_run(float(profile.engine_args.max_num_seqs or 1) + seed / 100, seed=seed)


def measure(seqs: int = 2, run=spread, **fields):  # type: ignore[no-untyped-def]
    return known_lab(run, **fields).measure(WORKLOAD, arm(seqs))


# --- figures --------------------------------------------------------------------------------------------


def test_percentiles_are_nearest_rank_over_offered_requests() -> None:
    m = measure(run=lambda _, seed: known_run(np.arange(1, 201) / 10, seed=seed))
    assert m.e2e.p50.value == pytest.approx(10.0)
    assert m.e2e.p95.value == pytest.approx(19.0)
    assert m.ttft.p95.value == pytest.approx(9.5)
    assert m.tpot.p50.value == pytest.approx(10.0 / 2 / 10)


def test_undelivered_requests_are_infinite_in_percentiles_and_absent_from_rates() -> None:
    m = measure(run=lambda _, seed: known_run(1.0, seed=seed, delivered=180))
    assert m.delivery_ratio.value == pytest.approx(0.9)
    assert m.e2e.p90.value == pytest.approx(1.0)
    assert math.isinf(m.e2e.p95.value)
    assert m.request_rate.value == pytest.approx(180 / 200)
    assert m.output_tokens_per_s.value == pytest.approx(180 * 11 / 200)


def test_cost_counts_wall_time_and_only_useful_requests() -> None:
    """200 s at 0.526 USD/h; the latencies 0.1..20 s meet 2 s in 20 cases."""
    m = measure(run=lambda _, seed: known_run(np.arange(1, 201) / 10, seed=seed))
    assert m.cost_per_useful_request(e2e_s=2.0).value == pytest.approx(0.526 * 200 / 3600 / 20)
    assert m.goodput(e2e_s=2.0).value == pytest.approx(20 / 200)


@pytest.mark.parametrize("run", [{"requests": 0}, {"output_tokens": 1}], ids=["no request", "one token"])
def test_a_percentile_of_nothing_is_unknown_and_decides_nothing(run: dict[str, int]) -> None:
    """A workload may offer no request under a seed, or answers of one token: no time between two tokens."""
    m = measure(run=lambda _, seed: known_run(1.0, seed=seed, **run))  # type: ignore[arg-type]
    decided = (m.tpot.p50 <= 1.0).decide()
    assert decided.outcome == "undecided"
    assert math.isnan(decided.left.value)
    figures = {figure.label: figure for figure in summarize(m).figures}
    assert math.isnan(figures["p50 tpot"].value)


def test_a_seed_without_a_request_hides_no_other() -> None:
    m = measure(run=lambda _, seed: known_run(1.0 + seed, seed=seed, requests=0 if seed == 1 else 200))
    assert (m.p50 <= 99.0).decide().outcome == "undecided"
    assert m.p50.figure(6).low == 1.0


# --- repeats --------------------------------------------------------------------------------------------


def test_nothing_runs_before_a_claim_asks() -> None:
    target = Known(spread)
    claim = Lab(target).measure(WORKLOAD, arm(2)).p95 <= 3.0
    assert target.seeds == []
    claim.decide()
    assert target.seeds == [0, 1, 2, 3, 4, 5]


def test_a_later_claim_starts_from_the_first_seed_whatever_is_known() -> None:
    """24 known repeats, of which every second is slow, do not change that six decide the next claim."""
    target = Known(lambda _, seed: known_run(1.0 + seed % 2, seed=seed))
    m = Lab(target).measure(WORKLOAD, arm(2))
    assert (m.p95 <= 1.5).decide().left.n == 24
    assert (m.p95 <= 3.0).decide().left.n == 6
    assert target.seeds == list(range(24))


def test_the_first_seed_shifts_all_repeats() -> None:
    target = Known(spread)
    (Lab(target, first_seed=100).measure(WORKLOAD, arm(2)).p95 <= 9.0).decide()
    assert target.seeds == [100, 101, 102, 103, 104, 105]


def test_compared_options_are_paired_repeat_by_repeat() -> None:
    """The spread over seeds is far larger than the difference, and still every pair tells."""

    def run(profile: Profile, seed: int) -> Run:
        return known_run(10.0**seed * (1.0 + 0.01 * (profile.engine_args.max_num_seqs or 0)), seed=seed)

    lab = known_lab(run)
    small, large = lab.measure(WORKLOAD, arm(1)), lab.measure(WORKLOAD, arm(2))
    assert (small.p50 < large.p50).decide().outcome == "held"
    assert (small.p50 > large.p50).decide().outcome == "false"


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (lambda m: m.delivery_ratio >= 1, True),
        (lambda m: m.delivery_ratio > 0.999, True),
        (lambda m: m.delivery_ratio <= 1.0, False),
        (lambda m: m.delivery_ratio >= 0.9 * m.delivery_ratio, False),
    ],
)
def test_a_promise_of_delivery_says_how_many_runs_could_still_fail(
    claim: Callable[[Measurement], Claim], said: bool
) -> None:
    assert ("up to 39% of runs could still fail" in claim(measure()).decide().reason) is said


def test_undecided_says_how_the_votes_fell() -> None:
    m = measure(run=lambda _, seed: known_run(1.0 + seed % 2, seed=seed))
    decided = (m.p50 <= 1.5).decide()
    assert decided.outcome == "undecided"
    assert "12 of 24 repeats held; undecided after 24" in decided.reason


def test_the_interval_is_that_of_the_order_statistics() -> None:
    decided = (measure().p50 <= 9.0).decide()
    assert (decided.left.low, decided.left.high) == pytest.approx((2.0, 2.05))
    assert decided.left.value == pytest.approx(2.025)


def test_measured_targets_stop_at_their_own_limit() -> None:
    m = measure(run=lambda _, seed: known_run(1.0 + seed % 2, seed=seed), max_repeats=12)
    assert (m.p50 <= 1.5).decide().left.n == 12


# --- determinism and calibration error ----------------------------------------------------------------------


def deterministic_lab(latency_s: float, error: float) -> Lab:
    same = known_run(latency_s, basis="simulated", relative_error=error)
    return known_lab(lambda *_: same, basis="simulated")


@pytest.mark.parametrize(
    ("threshold", "outcome"), [(2.3, "held"), (2.1, "undecided"), (1.9, "undecided"), (1.7, "false")]
)
def test_an_absolute_simulated_figure_is_widened_by_the_calibration_error(threshold: float, outcome: str) -> None:
    m = deterministic_lab(2.0, 0.1).measure(WORKLOAD, PROFILE)
    decided = (m.p95 <= threshold).decide()
    assert decided.outcome == outcome
    assert (decided.left.n, decided.left.deterministic) == (1, True)
    assert "deterministic, n=1" in decided.reason


def test_delivery_is_a_count_and_is_not_widened() -> None:
    m = deterministic_lab(2.0, 0.1).measure(WORKLOAD, PROFILE)
    assert (m.delivery_ratio >= 0.999).decide().outcome == "held"


@pytest.mark.parametrize(("limit_s", "outcome"), [(2.3, "held"), (2.1, "undecided")])
def test_who_meets_a_limit_depends_on_the_calibration_error(limit_s: float, outcome: str) -> None:
    """All answers take 2.0 s, with 10 % error 2.2 s: then nobody meets 2.1 s."""
    lab = deterministic_lab(2.0, 0.1)
    m = lab.measure(WORKLOAD, PROFILE)
    impatient = lab.measure(WORKLOAD.model_copy(update={"timeout_s": limit_s}), PROFILE)
    for claim in (
        m.goodput(e2e_s=limit_s) >= 0.5,
        m.cost_per_useful_request(e2e_s=limit_s) <= 1.0,
        impatient.delivery_ratio >= 0.999,
    ):
        assert claim.decide().outcome == outcome, claim.text


def test_a_measured_delivery_is_what_the_client_counted() -> None:
    """Its clock may show an answer just beyond the timeout that it still took."""
    m = known_lab(lambda _, seed: known_run(2.0001, seed=seed)).measure(
        WORKLOAD.model_copy(update={"timeout_s": 2.0}), PROFILE
    )
    assert (m.delivery_ratio >= 0.999).decide().outcome == "held"


@pytest.mark.parametrize(
    ("other_server", "outcome"), [("a", "held"), ("a, g4dn cluster", "held"), ("b", "undecided")]
)
def test_errors_cancel_only_within_one_calibration(other_server: str, outcome: str) -> None:
    """2.0 s against 2.1 s with 10 % error each: told apart only when the error is common."""
    fast = known_run(2.0, basis="simulated", relative_error=0.1, server="a")
    slow = known_run(2.1, basis="simulated", relative_error=0.1, server=other_server)
    lab = known_lab(lambda profile, _: fast if profile.engine_args.max_num_seqs == 1 else slow)
    claim = lab.measure(WORKLOAD, arm(1)).p95 < lab.measure(WORKLOAD, arm(2)).p95
    assert claim.decide().outcome == outcome


def two_arms(common: bool) -> tuple[Measurement, Measurement]:
    """2.0 s and 2.1 s, simulated by one calibration or by two, each up to 10 % off."""

    def run(profile: Profile, _: int) -> Run:
        seqs = profile.engine_args.max_num_seqs or 0
        server = "a" if common or seqs == 1 else "b"
        return known_run(1.9 + seqs / 10, basis="simulated", relative_error=0.1, server=server)

    lab = known_lab(run, basis="simulated")
    return lab.measure(WORKLOAD, arm(1), label="fast"), lab.measure(WORKLOAD, arm(2), label="slow")


SLOWER: dict[str, Callable[[Measurement, Measurement], Claim]] = {
    "compared": lambda fast, slow: slow.p95 > fast.p95,
    "ratio": lambda fast, slow: slow.p95 / fast.p95 > 1,
    "difference": lambda fast, slow: slow.p95 - fast.p95 > 0,
    "negative difference": lambda fast, slow: fast.p95 - slow.p95 < 0,
}


@pytest.mark.parametrize("claim", SLOWER.values(), ids=SLOWER)
@pytest.mark.parametrize(("common", "outcome"), [(True, "held"), (False, "undecided")])
def test_one_question_has_one_answer_however_it_is_written(
    claim: Callable[[Measurement, Measurement], Claim], common: bool, outcome: str
) -> None:
    assert claim(*two_arms(common)).decide().outcome == outcome


@pytest.mark.parametrize(
    ("common", "interval"), [(True, (-0.11, -0.09)), (False, (2.0 * 0.9 - 2.1 * 1.1, 2.0 * 1.1 - 2.1 * 0.9))]
)
def test_a_difference_is_as_uncertain_as_its_sides(common: bool, interval: tuple[float, float]) -> None:
    fast, slow = two_arms(common)
    found = (fast.p95 - slow.p95 <= 1.0).decide().left
    assert (found.low, found.high) == pytest.approx(interval)
    assert found.value == pytest.approx(-0.1)


def test_an_error_that_cancels_is_not_shown() -> None:
    fast, slow = two_arms(common=True)
    found = (slow.p95 / fast.p95 <= 2).decide()
    assert found.left.low == found.left.value == found.left.high
    assert "calibration error" not in found.reason


@pytest.mark.parametrize(("threshold", "outcome"), [(2.3, "held"), (2.1, "undecided"), (1.7, "false")])
def test_a_count_below_a_latency_leaves_its_error(threshold: float, outcome: str) -> None:
    m = deterministic_lab(2.0, 0.1).measure(WORKLOAD, PROFILE)
    assert (m.p95 / m.delivery_ratio <= threshold).decide().outcome == outcome


@pytest.mark.parametrize(("threshold", "outcome"), [(2.5, "held"), (2.4, "undecided")])
def test_a_latency_over_a_rate_doubles_the_error(threshold: float, outcome: str) -> None:
    """2 s over 1 request/s; where the server is 10 % slower 2.2 s over 0.9 requests/s."""
    m = deterministic_lab(2.0, 0.1).measure(WORKLOAD, PROFILE)
    assert (m.p95 / m.request_rate <= threshold).decide().outcome == outcome


@pytest.mark.parametrize(
    ("above", "below", "outcome"), [(0.0, 0.0, "undecided"), (math.nan, 0.0, "undecided"), (3.0, 0.0, "held")]
)
def test_nothing_over_nothing_is_unknown(above: float, below: float, outcome: str) -> None:
    def run(profile: Profile, seed: int) -> Run:
        count = above if profile.engine_args.max_num_seqs == 1 else below
        return replace(known_run(1.0, seed=seed), totals={"num_preemptions_total": count})

    lab = known_lab(run)
    ratio = lab.measure(WORKLOAD, arm(1)).preemptions / lab.measure(WORKLOAD, arm(2)).preemptions
    assert (ratio >= 2).decide().outcome == outcome


@pytest.mark.parametrize(("delivered", "outcome"), [(200, "held"), (100, "false")])
def test_a_constant_may_be_infinite(delivered: int, outcome: str) -> None:
    m = measure(run=lambda _, seed: known_run(1.0, seed=seed, delivered=delivered))
    assert (m.p95 < math.inf).decide().outcome == outcome


def test_two_undelivered_percentiles_say_nothing_of_one_another() -> None:
    lab = known_lab(lambda _, seed: known_run(1.0, seed=seed, delivered=100))
    claim = lab.measure(WORKLOAD, arm(1)).p95 <= 0.9 * lab.measure(WORKLOAD, arm(2)).p95
    assert claim.decide().outcome == "undecided"


# --- validity ------------------------------------------------------------------------------------------------


def test_an_invalid_run_makes_its_gates_undecided() -> None:
    m = measure(run=lambda _, seed: known_run(1.0, seed=seed, problems=("send lag p99 14 ms",) if seed == 3 else ()))
    decided = (m.p95 <= 9.0).decide()
    assert decided.outcome == "undecided"
    assert "invalid evidence (seed 3): send lag p99 14 ms" in decided.reason


def test_a_queue_that_no_server_showed_decides_nothing() -> None:
    m = measure(run=lambda _, seed: replace(known_run(1.0, seed=seed), totals={}))
    assert (m.queue_delay <= 1.0).decide().outcome == "undecided"
    assert (m.queue_delay > 1.0).decide().outcome == "undecided"


def test_a_queue_from_which_requests_were_given_up_decides_nothing() -> None:
    """vLLM counts none of them: the mean over the others may be anything below."""
    counted = {"request_queue_time_seconds_sum": 1.0, "request_queue_time_seconds_count": 199.0}
    m = measure(
        run=lambda _, seed: replace(known_run(1.0, seed=seed), totals={**counted, "client_failed_timeout": 1})
    )
    decided = (m.queue_delay <= 1.0).decide()
    assert decided.outcome == "undecided"
    assert "unknown against 1 s" in decided.reason
    assert (m.queue_delay > 1.0).decide().outcome == "undecided"


def test_requests_that_no_server_got_do_not_hide_its_queue() -> None:
    counted = {"request_queue_time_seconds_sum": 1.0, "request_queue_time_seconds_count": 100.0}
    m = measure(
        run=lambda _, seed: replace(known_run(1.0, seed=seed), totals={**counted, "client_failed_dropped": 100})
    )
    assert (m.queue_delay <= 1.0).decide().outcome == "held"


def test_a_percentile_of_too_few_requests_is_undecided() -> None:
    m = measure(run=lambda _, seed: known_run(1.0, seed=seed, requests=129))
    assert (m.p95 <= 9.0).decide().outcome == "undecided"
    assert "needs 130 requests a run" in (m.p95 <= 9.0).decide().reason
    assert (m.e2e.p50 <= 9.0).decide().outcome == "held"


@pytest.mark.parametrize(
    ("percent", "floor"), [(5, 130), (50, 11), (90, 64), (94, 108), (95, 130), (98, 330), (99, 662), (99.9, 6636)]
)
def test_a_percentile_needs_two_requests_beyond_it(percent: float, floor: int) -> None:
    assert sample_floor(percent) == floor
    for requests, outcome in ((floor, "held"), (floor - 1, "undecided")):
        m = measure(run=lambda _, seed, n=requests: known_run(1.0, seed=seed, requests=n))
        assert (m.e2e.percentile(percent) <= 9.0).decide().outcome == outcome


@pytest.mark.parametrize("percent", [-5, 0, 0.95, 100, 101, math.nan])
def test_a_percentile_lies_between_1_and_100(percent: float) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1 and less than 100 .*, got"):
        measure().e2e.percentile(percent)


@pytest.mark.parametrize(("percent", "rank"), [(55, 55), (7, 7), (99.5, 100), (0.1, 1)])
def test_ranks_are_exact(percent: float, rank: int) -> None:
    assert percentile(np.arange(1.0, 101.0), percent) == rank


# --- claims ---------------------------------------------------------------------------------------------------


def test_units_must_agree() -> None:
    m = measure()
    with pytest.raises(TypeError, match=r"same unit, got p95 e2e .* in s and request rate .* in requests/s"):
        m.p95 <= m.request_rate  # noqa: B015


def test_a_ratio_of_estimates_has_no_unit_and_pairs() -> None:
    lab = known_lab(spread)
    ratio = lab.measure(WORKLOAD, arm(2)).p50 / lab.measure(WORKLOAD, arm(1)).p50
    assert ratio.unit == "ratio"
    assert (ratio >= 1.9).decide().outcome == "held"


@pytest.mark.parametrize("nonsense", [True, "2 s", None])
def test_an_estimate_is_compared_with_estimates_and_numbers_only(nonsense: object) -> None:
    with pytest.raises(TypeError, match="plain number"):
        measure().p95 <= nonsense  # type: ignore[operator]  # noqa: B015


def test_numbers_of_numpy_are_numbers() -> None:
    assert (measure().p95 <= np.int64(3)).decide().outcome == (measure().p95 <= 3).decide().outcome


@pytest.mark.parametrize(
    ("nonsense", "error", "words"),
    [
        (lambda m: m.ttft <= 3, TypeError, r"ttft has many percentiles: compare one of them, e.g. `ttft.p95 <= 2.0`"),
        (lambda m: m.p96, AttributeError, r"unknown figure 'p96': write e2e.percentile\(96\)"),
        (lambda m: m.ttft_p95, AttributeError, r"unknown figure 'ttft_p95': did you mean 'ttft'\? "),
        (lambda m: 1 - m.delivery_ratio, TypeError, r"compare the estimate itself, e.g. `estimate >= 0.9`"),
    ],
    ids=["all-percentiles", "another-percentile", "unknown-figure", "number-minus-estimate"],
)
def test_what_cannot_be_asked_is_refused_with_advice(
    nonsense: Callable[[Measurement], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        nonsense(measure())


def test_equality_of_estimates_is_refused_with_advice() -> None:
    with pytest.raises(TypeError, match="state a margin"):
        measure().p95 == 2.0  # noqa: B015


def test_any_of_holds_with_one_and_splits_the_error() -> None:
    lab = known_lab(spread)
    one, two = lab.measure(WORKLOAD, arm(1)), lab.measure(WORKLOAD, arm(2))
    decided = any_of(two.p50 <= 1.5, one.p50 <= 1.5).decide()
    assert decided.outcome == "held"
    assert decided.left.n > 6
    refuted = any_of(two.p50 <= 1.5, two.p50 <= 0.5).decide()
    assert (refuted.outcome, refuted.left.n) == ("false", 6)


def test_six_repeats_may_refute_any_of_three_and_never_believe_it() -> None:
    """What a quick campaign can decide."""
    lab = known_lab(spread, max_repeats=6)
    one, two = lab.measure(WORKLOAD, arm(1)), lab.measure(WORKLOAD, arm(2))
    assert any_of(two.p50 <= 1.5, two.p50 <= 0.5, two.p50 <= 1.0).decide().outcome == "false"
    undecided = any_of(two.p50 <= 1.5, one.p50 <= 1.5, two.p50 <= 1.0).decide()
    assert undecided.outcome == "undecided"
    assert "one of 3 alternatives needs more repeats" in undecided.reason


# --- gates in a ledger ----------------------------------------------------------------------------------------


def test_a_held_gate_is_recorded_once_with_its_line() -> None:
    m = measure()
    with collecting(Ledger("item")) as ledger:
        claim = m.p95 <= 3.0
        assert claim
        assert claim
    (gate,) = ledger.gates
    assert (gate.outcome, gate.role) == ("held", "gate")
    assert gate.file == __file__
    assert "6 of 6 repeats held" in gate.reason


def test_the_gate_shows_the_source_of_a_single_claim() -> None:
    with collecting(Ledger("item")) as ledger:
        m = measure()
        assert m.p95 <= 3.0
    assert ledger.gates[0].text == "m.p95 <= 3.0"


def test_a_false_gate_raises_at_its_own_line() -> None:
    m = measure()
    with collecting(Ledger("item")) as ledger, pytest.raises(AssertionError) as failure:
        assert m.p95 <= 1.0
    assert ledger.gates[0].line <= failure.traceback[-1].lineno + 1 <= ledger.gates[0].last_line


def test_chains_and_conjunctions_record_each_claim() -> None:
    m = measure()
    with collecting(Ledger("item")) as ledger:
        assert 1.0 <= m.p95 <= 3.0
        assert m.p50 <= 3.0 and m.p95 <= 4.0
    assert [gate.outcome for gate in ledger.gates] == ["held"] * 4


def test_an_undecided_gate_does_not_raise() -> None:
    m = measure(run=lambda _, seed: known_run(1.0 + seed % 2, seed=seed))
    with collecting(Ledger("item")) as ledger:
        assert m.p50 <= 1.5
    assert ledger.gates[0].outcome == "undecided"


def test_a_caveat_never_raises() -> None:
    m = measure()
    with collecting(Ledger("item")) as ledger:
        caveat(m.p95 <= 1.0, "slow")
    (gate,) = ledger.gates
    assert (gate.role, gate.outcome, gate.note, gate.text) == ("caveat", "false", "slow", "m.p95 <= 1.0")


def test_an_unmet_requirement_leaves_later_gates_undecided() -> None:
    m = measure()
    with collecting(Ledger("item")) as ledger:
        requires(m.p95 >= 5.0, "underutilized: this run cannot answer")
        assert m.p95 <= 1.0
    assert [gate.outcome for gate in ledger.gates] == ["false", "undecided"]
    assert "underutilized" in ledger.gates[1].reason


def test_a_gate_in_a_fixture_is_an_error() -> None:
    m = measure()
    with collecting(Ledger("item", in_test=False)), pytest.raises(RuntimeError, match="not in a fixture"):
        assert m.p95 <= 3.0


def ask_or(m):  # type: ignore[no-untyped-def]
    assert m.p95 <= 1.0 or m.p95 <= 3.0


def ask_not(m):  # type: ignore[no-untyped-def]
    assert not m.p95 <= 1.0


def ask_if(m):  # type: ignore[no-untyped-def]
    if m.p95 <= 3.0:
        pass


def ask_all(m):  # type: ignore[no-untyped-def]
    assert all([m.p95 <= 3.0])


def ask_generator(m):  # type: ignore[no-untyped-def]
    assert any(claim for claim in [m.p95 <= 3.0])


def ask_conditional(m):  # type: ignore[no-untyped-def]
    assert 1 if m.p95 <= 3.0 else 0


def ask_bool(m):  # type: ignore[no-untyped-def]
    assert bool(m.p95 <= 3.0)


def ask_assignment(m):  # type: ignore[no-untyped-def]
    return m.p95 <= 1.0 and m.p95 <= 3.0


def ask_filter(m):  # type: ignore[no-untyped-def]
    assert [claim for claim in [m.p95 <= 3.0] if claim]


def ask_nested_not(m):  # type: ignore[no-untyped-def]
    assert isinstance(not m.p95 <= 1.0, bool)


@pytest.mark.parametrize(
    "ask",
    [
        ask_or,
        ask_not,
        ask_if,
        ask_all,
        ask_generator,
        ask_conditional,
        ask_bool,
        ask_assignment,
        ask_filter,
        ask_nested_not,
    ],
)
def test_truth_is_refused_where_undecided_would_be_lost(ask) -> None:  # type: ignore[no-untyped-def]
    with (
        collecting(Ledger("item")) as ledger,
        pytest.raises(TypeError, match=r"assert any_of"),
    ):
        ask(measure())
    assert ledger.gates == []


def helper(m, limit_s):  # type: ignore[no-untyped-def]
    assert m.p95 <= limit_s


def test_a_helper_may_hold_the_assert() -> None:
    with collecting(Ledger("item")) as ledger:
        helper(measure(), 3.0)
    assert ledger.gates[0].text == "m.p95 <= limit_s"


def test_requests_of_one_token_say_nothing_of_the_time_between_tokens() -> None:
    """12 of 200 requests have a second token: too few for a p95 of it, enough for a median."""
    tokens = [64 if i < 12 else 1 for i in range(200)]
    m = known_lab(lambda _, seed: known_run(2.0, seed=seed, output_tokens=tokens)).measure(WORKLOAD, PROFILE)
    decided = (m.tpot.p95 <= 1.0).decide()
    assert decided.outcome == "undecided"
    assert "needs 130 requests of two tokens or more a run" in decided.reason
    assert decided.reason.endswith("offered 12")
    assert (m.tpot.p50 <= 1.0).decide().outcome == "held"


def test_what_never_has_a_value_is_not_asked_again() -> None:
    asked: list[int] = []

    def run(_: object, seed: int) -> Run:
        asked.append(seed)
        return known_run(2.0, seed=seed)

    m = known_lab(run).measure(WORKLOAD, PROFILE)
    decided = (m.preemptions / m.preemptions <= 1).decide()
    assert decided.outcome == "undecided"
    assert "it has no value in any of 6 runs" in decided.reason
    assert asked == [0, 1, 2, 3, 4, 5]


def test_nothing_is_compared_with_nan() -> None:
    with pytest.raises(ValueError, match="must be given a number, got nan"):
        _ = known_lab(lambda *_: known_run(1.0)).measure(WORKLOAD, PROFILE).p50 <= math.nan


@pytest.mark.parametrize(
    ("accelerator", "outcome"), [("t4", "undecided"), ("h200", "held")], ids=["one accelerator", "two"]
)
def test_arms_of_different_servers_are_no_pairs(accelerator: str, outcome: str) -> None:
    """Unless the accelerator is what is compared."""
    other = Profile(model="qwen2.5-0.5b", accelerator=accelerator, engine_args={"max_num_seqs": 2})
    lab = known_lab(
        lambda profile, seed: (
            known_run(2.0, seed=seed, server="vllm 0.9.0")
            if profile == other
            else known_run(1.0, seed=seed, server="vllm 0.25.1")
        )
    )
    decided = (lab.measure(WORKLOAD, PROFILE).p50 <= 0.9 * lab.measure(WORKLOAD, other).p50).decide()
    assert decided.outcome == outcome
    if outcome == "undecided":
        assert "measured on different servers (vllm 0.25.1; vllm 0.9.0)" in decided.reason
