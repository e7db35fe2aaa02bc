"""The simulated engine: both drivers agree, and runs obey what is known without them."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pytest_gpulab.engine import simulate
from pytest_gpulab.engine.calibration import find_variant
from pytest_gpulab.engine.jumping import NeedsStepping, run_jumping
from pytest_gpulab.engine.outcome import Outcome
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.simulation import run_plan
from pytest_gpulab.engine.stepping import run_stepping
from pytest_gpulab.experiment import (
    Arrivals,
    BoundedQueue,
    ClosedLoop,
    Constant,
    Direct,
    Gamma,
    Lengths,
    Mix,
    Poisson,
    Profile,
    Shape,
    Workload,
)
from pytest_gpulab.figures import mean_queue_delay, output_tokens_per_s, request_rate
from pytest_gpulab.fleet import FROM_ZERO
from tests.engine_plans import plan, variant

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4")
H200 = Profile(model="llama-3.1-8b", accelerator="h200")
SMALL = Shape(prompt_tokens=512, output_tokens=128)


def poisson(rate: float, requests: int, shape: Any = SMALL, **fields: Any) -> Workload:
    return Workload(arrivals=Poisson(rate=rate), shape=shape, requests=requests, **fields)


# --- two drivers, one result --------------------------------------------------------------------------


def times(most: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | st.floats(most / 1000, most)


COSTS = st.builds(
    lambda step, **costs: variant(step_s=step, front_per_request_s=1e-4, front_latency_s=1e-3, **costs),
    step=st.floats(1e-4, 2e-2),
    per_token_s=times(1e-4),
    per_decode_s=times(1e-4),
    per_context_token_s=times(1e-6),
    per_context_token_mixed_s=times(1e-6),
    per_attended_token_s=times(1e-8),
    cpu_step_s=times(5e-3),
    cpu_per_sequence_s=times(1e-4),
    cpu_per_prefill_s=times(1e-3),
    cpu_launch_small_s=times(1e-2),
    cpu_launch_large_s=times(2e-2),
    front_per_prompt_token_s=times(1e-6),
    front_per_output_token_s=times(1e-4),
    front_per_chunk_s=times(1e-4),
    front_prompt_token_latency_s=times(1e-6),
)

SHAPES = st.one_of(
    st.builds(Shape, prompt_tokens=st.integers(1, 700), output_tokens=st.integers(1, 60)),
    st.just(
        Lengths(
            prompt_median=100,
            prompt_sigma=1.0,
            prompt_max=1500,
            output_median=20,
            output_sigma=1.0,
            output_max=300,
        )
    ),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Workloads from idle to overload on servers of every size, some with too few KV blocks."""
    rate = draw(st.sampled_from([1.0, 6.0, 30.0, 150.0]))
    arrivals: Arrivals = draw(
        st.sampled_from(
            [
                Poisson(rate=rate),
                Gamma(rate=rate, burstiness=0.3),
                Constant(rate=rate),
                ClosedLoop(concurrency=1 + int(rate) % 19),
            ]
        )
    )
    admission = Direct()
    if not isinstance(arrivals, ClosedLoop):
        admission = draw(
            st.sampled_from(
                [Direct(), Direct(max_outstanding=5), BoundedQueue(capacity=5, max_wait_s=0.5, max_outstanding=4)]
            )
        )
    workload = Workload(
        arrivals=arrivals,
        shape=draw(SHAPES),
        requests=draw(st.integers(1, 60)),
        admission=admission,
        timeout_s=draw(st.sampled_from([None, None, None, 1.0, 10.0])),
    )
    return plan(
        workload,
        draw(COSTS),
        seed=draw(st.integers(0, 1000)),
        num_blocks=draw(st.sampled_from([150, 400, 100_000, 100_000])),
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 16, 64])),
        max_num_batched_tokens=draw(st.sampled_from([64, 300, 2048])),
        max_model_len=2048,
        async_scheduling=draw(st.booleans()),
        enable_prefix_caching=draw(st.booleans()),
    )


def assert_same_tables(ours: np.ndarray, others: np.ndarray, tolerance: float) -> None:
    assert len(ours) == len(others)
    for name in ours.dtype.names:
        np.testing.assert_allclose(ours[name], others[name], rtol=0, atol=tolerance, err_msg=name)


def assert_same_outcomes(drawn: Plan, ours: Outcome, others: Outcome, tolerance: float = 1e-9) -> None:
    assert_same_tables(ours.request_table(drawn.schedule), others.request_table(drawn.schedule), tolerance)
    assert_same_tables(ours.server_table(), others.server_table(), tolerance)
    assert ours.totals == pytest.approx(others.totals, abs=1e-6)
    assert ours.ended == pytest.approx(others.ended, abs=tolerance)


def events_coincide(drawn: Plan, stepped: Outcome) -> bool:
    """Whether the oracle itself changes when its costs do by less than matters: then rounding orders the events."""
    for factor in (1 - 1e-10, 1 + 1e-10):
        gpu = drawn.variant.gpu.model_copy(update={"step_s": drawn.variant.gpu.step_s * factor})
        nearly = replace(drawn, variant=drawn.variant.model_copy(update={"gpu": gpu}))
        try:
            assert_same_outcomes(drawn, run_stepping(nearly), stepped, 1e-6)
        except AssertionError:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(plans())
def test_jumping_equals_stepping(drawn):
    try:
        jumped = run_jumping(drawn)
    except NeedsStepping as reason:
        event(f"refused: {reason}")
        return
    stepped = run_stepping(drawn)
    try:
        assert_same_outcomes(drawn, jumped, stepped)
    except AssertionError:
        if not events_coincide(drawn, stepped):
            raise
        event("two events coincide")
    else:
        event("compared")


@pytest.mark.parametrize(
    ("fields", "settings", "eager"),
    [
        ({}, {"num_blocks": 300}, False),
        ({"shared_prefix_tokens": 64}, {}, False),
        ({"timeout_s": 1.0}, {}, False),
        ({}, {"long_prefill_token_threshold": 100}, False),
        ({}, {}, True),
    ],
    ids=["blocks", "prefix", "aborts", "chunks", "eager"],
)
def test_what_only_steps_can_do_is_refused_by_the_fast_driver(fields, settings, eager):
    drawn = plan(poisson(30.0, 40, **fields), variant(step_s=0.01), eager=eager, **settings)
    with pytest.raises(NeedsStepping):
        run_jumping(drawn)
    assert run_plan(drawn).totals == run_stepping(drawn).totals


def test_few_blocks_preempt():
    shape = Shape(prompt_tokens=100, output_tokens=200)
    drawn = plan(poisson(30.0, 40, shape), variant(step_s=0.01), num_blocks=80, max_num_seqs=16, max_model_len=512)
    outcome = run_plan(drawn)
    assert outcome.totals["num_preemptions_total"] > 0
    assert outcome.request_table(drawn.schedule)["ok"].all()
    assert outcome.totals["generation_tokens_total"] == 40 * 200


# --- costs, by hand -----------------------------------------------------------------------------------


def only_request(shape: Shape, costs: Any, **settings: Any) -> Any:
    drawn = plan(Workload(arrivals=Constant(rate=1.0), shape=shape, requests=1), costs, **settings)
    [row] = run_plan(drawn).request_table(drawn.schedule)
    return row


FRONT = {"front_per_request_s": 1e-3, "front_per_prompt_token_s": 1e-6, "front_latency_s": 2e-3}
FRONT |= {"front_per_output_token_s": 2e-5, "front_per_chunk_s": 4e-5}
GPU = {"step_s": 5e-3, "per_token_s": 2e-5, "per_decode_s": 1e-4, "per_context_token_s": 1e-7}
GPU |= {"per_context_token_mixed_s": 2e-7, "per_attended_token_s": 1e-9}


def test_latency_at_zero_load_is_the_sum_of_the_steps():
    costs = variant(**GPU, **FRONT, cpu_step_s=1e-3, cpu_per_sequence_s=1e-5, cpu_per_prefill_s=2e-3)
    row = only_request(Shape(prompt_tokens=500, output_tokens=4), costs, async_scheduling=False)
    take_in, send = 1e-3 + 500e-6, 2e-5 + 4e-5 + 2e-3
    prefill = 1e-3 + 2e-3 + max(5e-3, 500 * 2e-5) + 500 * 250 * 1e-9
    decode = 3 * (1e-3 + 1e-5 + 5e-3 + 1e-4) + (501 + 502 + 503) * 1e-7
    assert row["first_token"] == pytest.approx(take_in + prefill + send)
    assert row["last_token"] == pytest.approx(take_in + prefill + decode + send)


def test_async_scheduling_hides_the_cpu():
    """The second step is prepared while the first runs: its CPU time is only seen where it is the longer one."""
    costs = variant(**GPU, cpu_step_s=1e-3)
    row = only_request(Shape(prompt_tokens=500, output_tokens=4), costs)
    prefill = 1e-3 + 500 * 2e-5 + 500 * 250 * 1e-9
    decodes = [5e-3 + 1e-4 + context * 1e-7 for context in (501, 502, 503)]
    assert row["last_token"] == pytest.approx(prefill + sum(decodes))
    slow = variant(**GPU, cpu_step_s=20e-3)
    row = only_request(Shape(prompt_tokens=500, output_tokens=4), slow)
    # Each step is prepared when the one before the last returns; its GPU time is over before the next is ready.
    assert row["last_token"] == pytest.approx(4 * 20e-3 + decodes[-1])


@pytest.mark.parametrize(("prompt_tokens", "launch"), [(512, 7e-3), (513, 30e-3)])
def test_a_step_with_prefill_waits_for_its_launch(prompt_tokens, launch):
    costs = variant(step_s=5e-3, cpu_step_s=1e-3, cpu_launch_small_s=7e-3, cpu_launch_large_s=30e-3)
    row = only_request(Shape(prompt_tokens=prompt_tokens, output_tokens=1), costs)
    assert row["first_token"] == pytest.approx(1e-3 + launch)


def test_eager_mode_launches_every_step():
    costs = variant(step_s=1e-3, cpu_step_s=1e-3, cpu_launch_small_s=7e-3)
    shape = Shape(prompt_tokens=10, output_tokens=11)
    graphs = only_request(shape, costs, async_scheduling=False)
    eager = plan(Workload(arrivals=Constant(rate=1.0), shape=shape, requests=1), costs, eager=True)
    [row] = run_plan(eager).request_table(eager.schedule)
    assert graphs["last_token"] == pytest.approx(8e-3 + 10 * 2e-3)
    assert row["last_token"] == pytest.approx(11 * 8e-3)


def test_a_prompt_above_the_budget_takes_several_steps():
    costs = variant(per_token_s=1e-4)
    row = only_request(Shape(prompt_tokens=250, output_tokens=1), costs, max_num_seqs=8, max_num_batched_tokens=100)
    assert row["first_token"] == pytest.approx(250e-4)


# --- what queueing theory says ------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_at_a_time_is_an_m_d_1_queue(load):
    service_s = 0.1
    workload = poisson(load / service_s, 100_000, Shape(prompt_tokens=10, output_tokens=10))
    drawn = plan(workload, variant(step_s=service_s / 10), max_num_seqs=1)
    rows = run_plan(drawn).request_table(drawn.schedule)
    waits = rows["last_token"] - rows["scheduled"] - service_s
    assert waits.mean() == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.05)
    expected = 0.0  # Lindley: the next wait is this one and the service, less the gap
    for gap, wait in zip(np.diff(rows["scheduled"])[:1000], waits[1:1001], strict=True):
        expected = max(0.0, expected + service_s - gap)
        assert wait == pytest.approx(expected, abs=1e-9)


def test_the_queue_time_metric_counts_what_waits_in_the_engine():
    drawn = plan(poisson(8.0, 2000, Shape(prompt_tokens=10, output_tokens=10)), variant(step_s=0.01), max_num_seqs=1)
    outcome = run_plan(drawn)
    rows = outcome.request_table(drawn.schedule)
    waits = rows["last_token"] - rows["scheduled"] - 0.1
    assert outcome.totals["request_queue_time_seconds_count"] == 2000
    assert 0 < outcome.totals["request_queue_time_seconds_sum"] <= waits.sum()
    # vLLM's clock starts when the engine takes a request over, between two steps.
    assert waits.sum() - outcome.totals["request_queue_time_seconds_sum"] < 2000 * 0.01


def test_littles_law():
    run = simulate(T4, Workload(arrivals=Poisson(rate=6.0), shape=SMALL, duration_s=2000.0))
    rows, server = run.requests, run.server[100:1900]
    in_engine = (server["num_requests_running"] + server["num_requests_waiting"]).mean()
    rate = len(rows) / 2000.0
    assert in_engine == pytest.approx(rate * (rows["last_token"] - rows["sent"]).mean(), rel=0.05)


# --- accounting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", [T4, H200], ids=["t4", "h200"])
@pytest.mark.parametrize("rate", [2.0, 60.0])
def test_tokens_are_conserved(calibrated, rate):
    mix = Mix(parts=((2.0, SMALL), (1.0, Shape(prompt_tokens=1536, output_tokens=1))))
    run = simulate(calibrated, poisson(rate, 500, mix))
    rows = run.requests
    assert rows["ok"].all()
    assert run.problems == ()
    assert run.totals["prompt_tokens_total"] == rows["prompt_tokens"].sum()
    assert run.totals["generation_tokens_total"] == rows["output_tokens"].sum()
    assert run.totals["request_success_total"] == 500
    assert run.totals["prefix_cache_queries_total"] == rows["prompt_tokens"].sum()
    assert run.totals["prefix_cache_hits_total"] == 0
    assert (rows["scheduled"] <= rows["sent"]).all()
    assert (rows["sent"] < rows["first_token"]).all()
    assert (rows["first_token"] <= rows["last_token"]).all()
    assert run.duration_s == rows["last_token"].max()


def test_the_server_series_is_one_row_a_second():
    run = simulate(T4, Workload(arrivals=Poisson(rate=6.0), shape=SMALL, duration_s=60.0))
    server = run.server
    np.testing.assert_array_equal(server["time"], np.arange(math.ceil(run.duration_s)))
    for counter in ("prompt_tokens_total", "generation_tokens_total"):
        assert (np.diff(server[counter]) >= 0).all()
        assert server[counter][-1] <= run.totals[counter]
    assert ((server["kv_cache_usage"] > 0) == (server["num_requests_running"] > 0)).all()
    assert server["num_requests_running"].max() > 2


def test_a_run_lasts_as_long_as_its_workload_says():
    run = simulate(T4, Workload(arrivals=Constant(rate=0.1), shape=SMALL, duration_s=30.0))
    assert run.duration_s == 30.0
    assert len(run.server) == 30


def test_delivery_counts_drops():
    run = simulate(T4, poisson(60.0, 400, admission=Direct(max_outstanding=8)))
    rows = run.requests
    assert 0.01 < rows["ok"].mean() < 0.9
    np.testing.assert_array_equal(np.isnan(rows["sent"]), ~rows["ok"])
    assert run.totals["request_success_total"] == rows["ok"].sum()


def test_a_request_that_can_never_run_is_refused():
    shape = Shape(prompt_tokens=500, output_tokens=12)
    served = T4.with_engine_args(max_model_len=512, num_gpu_blocks_override=32)
    run = simulate(served, poisson(5.0, 10, shape))
    assert not run.requests["ok"].any()
    assert np.isnan(run.requests["first_token"]).all()
    assert run.problems == ("10 requests were refused: they can never fit the KV cache",)


def test_a_run_lasts_until_its_last_arrival_even_if_nothing_is_answered():
    served = T4.with_engine_args(max_model_len=512, num_gpu_blocks_override=32)
    run = simulate(served, poisson(5.0, 10, Shape(prompt_tokens=500, output_tokens=12)))
    assert run.duration_s == run.requests["scheduled"].max() > 0
    assert request_rate(run) == output_tokens_per_s(run) == 0
    assert math.isnan(request_rate(replace(run, duration_s=0.0))), "all was lost at once"


def test_a_workload_that_offers_nothing_is_no_evidence():
    run = simulate(T4, Workload(arrivals=Poisson(rate=0.01), shape=SMALL, duration_s=5))
    assert len(run.requests) == 0
    assert run.problems == (
        "the workload offered no request, so this run shows nothing; raise its rate or let it last longer",
    )


def test_a_fleet_is_not_simulated_as_one_warm_server():
    with pytest.raises(ValueError, match=r"got a profile with a fleet; call .*\.simulate_fleet, or leave"):
        simulate(T4.on(FROM_ZERO), poisson(1.0, 10))


def test_prefix_cache_hits_are_full_blocks_of_the_shared_prefix():
    workload = poisson(1.0, 50, Shape(prompt_tokens=500, output_tokens=10), shared_prefix_tokens=300)
    run = simulate(T4, workload)
    assert run.totals["prefix_cache_hits_total"] == 49 * (300 // 16) * 16  # all but the first
    alone = simulate(T4, workload.model_copy(update={"shared_prefix_tokens": 0}))
    assert run.requests["first_token"][1:].mean() < alone.requests["first_token"][1:].mean()
    off = simulate(T4.with_engine_args(enable_prefix_caching=False), workload)
    assert off.totals["prefix_cache_hits_total"] == off.totals["prefix_cache_queries_total"] == 0


def test_what_a_request_generates_is_no_part_of_the_shared_prefix():
    """Its prompt ends before the prefix does: a longer prompt finds that much and no more."""
    workload = Workload.from_trace([(0.0, 64, 500), (100.0, 2048, 16)], shared_prefix_tokens=1024)
    outcome = run_plan(plan(workload, variant(step_s=1e-3)))
    assert outcome.totals["prefix_cache_hits_total"] == 64


# --- the front end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_s", [None, 3.0, 1.2])
def test_giving_up_does_not_make_a_queue_short(timeout_s):
    """30 req/s where 8 at a time are served: who waits longest gives up, and is in no count of the server's."""
    workload = Workload(arrivals=Constant(rate=30.0), shape=SMALL, duration_s=20.0, timeout_s=timeout_s)
    assert not mean_queue_delay(simulate(H200.with_engine_args(max_num_seqs=8), workload)) <= 1.0


def test_a_timeout_that_nobody_needs_leaves_the_queue_known():
    workload = poisson(1.0, 20, timeout_s=60.0)
    assert 0.0 <= mean_queue_delay(simulate(H200, workload)) <= 1.0


def test_a_front_end_that_is_too_slow_holds_tokens_while_the_engine_has_no_queue():
    costs = variant(step_s=5e-4, per_decode_s=2e-6, front_per_request_s=1e-3, front_per_output_token_s=6e-5)
    drawn = plan(poisson(150.0, 3000), costs, max_num_seqs=1024)
    outcome = run_plan(drawn)
    rows = outcome.request_table(drawn.schedule)
    assert (rows["last_token"] - rows["scheduled"]).max() > 1.0
    assert outcome.totals["request_queue_time_seconds_sum"] < 0.01 * len(rows)


# --- the contract -------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run():
    first, again, other = (simulate(T4, poisson(8.0, 200), seed=seed) for seed in (3, 3, 4))
    assert first.requests.tobytes() == again.requests.tobytes()
    assert first.server.tobytes() == again.server.tobytes()
    assert first.requests.tobytes() != other.requests.tobytes()


def test_provenance_says_what_served():
    served = H200.with_engine_args(kv_cache_dtype="fp8")
    run = simulate(served, poisson(8.0, 20), calibration="h200-llama-3.1-8b", seed=5)
    assert (run.provenance.target, run.provenance.basis, run.provenance.seed) == ("sim", "simulated", 5)
    assert run.provenance.server == "h200-llama-3.1-8b fp8-kv"
    assert run.provenance.relative_error == find_variant(served)[1].relative_error
    assert run.provenance.definition_hash != simulate(H200, poisson(8.0, 20)).provenance.definition_hash


def test_traces_carry_their_own_shapes():
    run = simulate(T4, Workload.from_trace([(0.0, 100, 5), (0.5, 200, 1), (0.5, 300, 7)]))
    assert run.requests["scheduled"].tolist() == [0.0, 0.5, 0.5]
    assert run.requests["prompt_tokens"].tolist() == [100, 200, 300]
    assert run.requests["output_tokens"].tolist() == [5, 1, 7]
    assert run.requests["ok"].all()


def test_a_spike_without_arrivals_is_an_empty_run():
    run = simulate(T4, Workload(arrivals=Poisson(rate=1e-9), shape=SMALL, duration_s=5.0))
    assert len(run.requests) == 0
    assert run.duration_s == 5.0
    assert (run.server["num_requests_running"] == 0).all()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="every request must fit max_model_len"):
        simulate(T4.with_engine_args(max_model_len=600), poisson(1.0, 1))
    with pytest.raises(ValueError, match="the profile is qwen"):
        simulate(T4, poisson(1.0, 1), calibration="h200-llama-3.1-8b")


def test_importing_the_package_loads_no_numpy():
    code = "import sys, pytest_gpulab.engine; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_outcome_starts_with_nothing():
    outcome = Outcome.empty([0.0, 1.0], [math.nan, math.nan])
    assert outcome.received == [0, 0]
    assert len(outcome.server_table()) == 0
