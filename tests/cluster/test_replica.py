"""A replica that is fed in pieces gives what the engine gives for the whole run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulab.cluster.replica import Ledger, NeedsStepping, Replica
from pytest_gpulab.engine.calibration import find_variant
from pytest_gpulab.engine.simulation import make_plan, run_plan
from pytest_gpulab.engine.stepping import run_stepping
from pytest_gpulab.experiment import Constant, Poisson, Profile, Shape, Workload
from tests.cluster.scene import T4

H200 = Profile(model="llama-3.1-8b", accelerator="h200", engine_args={"max_model_len": 16384})
SMALL = Profile(model="qwen2.5-0.5b", accelerator="h200", engine_args={"max_model_len": 4096})


def plan_of(profile, workload, seed=0):
    calibration, variant = find_variant(profile)
    return make_plan(profile, workload, calibration, variant, seed)


def feed(plan, piece, report=False):
    """Submit and advance in pieces of so many seconds."""
    ledger = Ledger(plan)
    replica = Replica(plan, ledger, 0.0, report=report)
    due, sent, now = plan.scheduled(), 0, 0.0
    while sent < len(due) or replica.busy:
        now += piece
        while sent < len(due) and due[sent] <= now:
            replica.submit(due[sent], sent)
            sent += 1
        replica.advance(now)
    return replica, ledger


def close(found, expected):
    return np.allclose(found, expected, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("piece", [15.0, 0.37])
@pytest.mark.parametrize(
    ("profile", "rate"), [(T4, 2), (T4, 8), (T4, 24), (H200, 10), (H200, 60), (SMALL, 10), (SMALL, 100), (SMALL, 250)]
)
def test_it_equals_the_engine(profile, rate, piece):
    workload = Workload(arrivals=Poisson(rate=rate), shape=Shape(prompt_tokens=512, output_tokens=128), duration_s=40)
    plan = plan_of(profile, workload)
    replica, ledger = feed(plan, piece)
    outcome = run_plan(plan)
    assert close(ledger.first_token, outcome.first_token)
    assert close(ledger.last_token, outcome.last_token)
    assert replica.queue_time == pytest.approx(outcome.totals["request_queue_time_seconds_sum"], abs=1e-6)
    assert replica.tokens == (outcome.totals["prompt_tokens_total"], outcome.totals["generation_tokens_total"])
    both = list(zip(replica.samples, outcome.samples, strict=False))
    assert len(both) >= 39
    assert all(mine[:2] == theirs[1:3] for mine, theirs in both), "running and waiting at every scrape"
    used = np.array([mine[2] for mine, _ in both]) / (plan.config.num_blocks - 1) / plan.config.block_size
    slack = (max(mine[0] for mine, _ in both) + 40 * 2) / (plan.config.num_blocks - 1)
    assert np.allclose(used, [theirs[3] for _, theirs in both], rtol=0.06, atol=slack), "what is in flight"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5000), st.integers(1, 300)), min_size=1, max_size=40),
    st.sampled_from([0.05, 1.7, 100.0]),
    st.sampled_from([{}, {"max_num_seqs": 4}, {"async_scheduling": False}]),
)
def test_it_equals_the_exact_scheduler_on_any_trace(rows, piece, args):
    workload = Workload.from_trace(sorted(rows))
    plan = plan_of(T4.with_engine_args(**args), workload)
    _, ledger = feed(plan, piece)
    outcome = run_stepping(plan)
    assert close(ledger.first_token, outcome.first_token)
    assert close(ledger.last_token, outcome.last_token)


def test_no_answer_comes_before_the_earliest():
    workload = Workload(arrivals=Poisson(rate=6), shape=Shape(prompt_tokens=300, output_tokens=60), duration_s=20)
    plan = plan_of(T4, workload)
    ledger = Ledger(plan)
    replica = Replica(plan, ledger, 0.0, report=True)
    for request, at in enumerate(plan.scheduled()):
        replica.advance(at)
        replica.completed.clear()
        replica.submit(at, request)
        for _ in range(50):
            bound = replica.earliest_answer
            replica.advance(bound - 1e-6)
            assert not replica.completed
            replica.advance(bound + 1e-6)
            replica.completed.clear()
            if not replica.busy:
                break


def test_a_server_that_ends_loses_what_it_has_not_answered():
    workload = Workload(arrivals=Constant(rate=10), shape=Shape(prompt_tokens=300, output_tokens=60), duration_s=10)
    plan = plan_of(T4, workload)
    ledger = Ledger(plan)
    replica = Replica(plan, ledger, 0.0)
    replica.submit_all(plan.scheduled(), range(100))
    lost = replica.kill(5.0)
    whole = run_plan(plan)
    answered = [at <= 5.0 for at in whole.last_token]
    assert sorted(lost) == [request for request in range(100) if not answered[request]]
    assert [not math.isnan(at) for at in ledger.last_token] == answered


@pytest.mark.parametrize(
    ("args", "workload", "why"),
    [
        ({"enforce_eager": True}, {}, "launches in decode steps"),
        ({}, {"shared_prefix_tokens": 64}, "prefix cache hits"),
        ({"long_prefill_token_threshold": 64}, {}, "several prompts in parts at once"),
    ],
)
def test_what_only_the_exact_scheduler_does_is_refused(args, workload, why):
    asked = Workload(
        arrivals=Constant(rate=1), shape=Shape(prompt_tokens=100, output_tokens=2), duration_s=2, **workload
    )
    plan = plan_of(T4.with_engine_args(**args), asked)
    with pytest.raises(NeedsStepping, match=why):
        Replica(plan, Ledger(plan), 0.0)


def test_a_short_kv_cache_is_refused_before_it_would_preempt():
    workload = Workload(arrivals=Poisson(rate=30), shape=Shape(prompt_tokens=512, output_tokens=512), duration_s=20)
    plan = plan_of(T4.with_engine_args(num_gpu_blocks_override=700), workload)
    with pytest.raises(NeedsStepping, match="more KV blocks than there are"):
        feed(plan, 5.0)


def test_whoever_waits_for_the_earliest_answer_gets_there():
    """A client that goes from bound to bound must not stand still while requests are still on their way."""
    plan = plan_of(
        H200, Workload(arrivals=Constant(rate=2000), shape=Shape(prompt_tokens=512, output_tokens=2), requests=8)
    )
    replica = Replica(plan, Ledger(plan), 0.0, report=True)
    replica.submit(0.1, 0)
    replica.advance(0.1)
    for request in range(1, 8):
        replica.submit(0.1 + 0.0001 * request, request)
    for _ in range(100):
        if len(replica.completed) == 8:
            break
        replica.advance(math.nextafter(replica.earliest_answer, math.inf))
    assert len(replica.completed) == 8
