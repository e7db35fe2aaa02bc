"""A load on the emulated vLLM: client and server tell the same story."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Poisson, Shape, Workload
from pytest_gpulab.figures import delivery_ratio, mean_queue_delay
from pytest_gpulab.load import run_load
from tests.load.loads import PROFILE, failures, nothing_lost, without_lag

WORKLOAD = Workload(arrivals=Poisson(rate=8.0), shape=Shape(prompt_tokens=256, output_tokens=8), duration_s=4.0)


@contextlib.contextmanager
def emulated(*arguments: str):
    """`gpulab serve` in a process of its own; gives an endpoint."""
    model = ("--model", PROFILE.model, "--accelerator", PROFILE.accelerator, "--port", "0")
    command = [sys.executable, "-m", "pytest_gpulab", "serve", *model, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        yield Endpoint(url, PROFILE.model, metrics_urls=(f"{url}/metrics",))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        process.stdout.close()


def load(endpoint, workload=WORKLOAD, profile=PROFILE):
    settings = {"profile": profile, "seed": 1, "target": "cluster", "basis": "emulated", "server": "emulated"}
    return run_load(workload, endpoint=endpoint, **settings)


@pytest.mark.slow
def test_two_runs_of_one_seed_on_one_server():
    """The second finds no warm cache, and its totals are its own."""
    with emulated() as endpoint:
        for _ in range(2):
            run = load(endpoint)
            offered = len(run.requests)
            assert delivery_ratio(run) == 1.0
            assert without_lag(run.problems) == []
            assert run.totals["request_success_total"] == offered
            assert run.totals["prompt_tokens_total"] == 256 * offered
            assert run.totals["generation_tokens_total"] == 8 * offered
            assert run.totals["prefix_cache_hits_total"] == 0
            assert run.totals["request_queue_time_seconds_count"] == offered
            assert mean_queue_delay(run) >= 0.0
            assert run.duration_s >= 4.0
            assert len(run.server) >= 4
            assert (np.diff(run.server["time"]) > 0.5).all()
            assert run.server["generation_tokens_total"][-1] <= 8 * offered
            assert run.provenance.seed == 1


@pytest.mark.slow
def test_a_warm_cache_is_noticed(monkeypatch):
    """As if the run's own first tokens were not there."""
    monkeypatch.setattr("pytest_gpulab.load.generator.new_salt", lambda: (400, 401))
    with emulated() as endpoint:
        cold, warm = load(endpoint), load(endpoint)
    assert without_lag(cold.problems) == []
    assert any("came from a warm prefix cache" in problem for problem in warm.problems)


@pytest.mark.slow
def test_blocks_of_one_token_hold_what_starts_all_prompts_of_a_run():
    profile = PROFILE.with_engine_args(block_size=1)
    with emulated("--engine-args", '{"block_size": 1}') as endpoint:
        run = load(endpoint, profile=profile)
    assert run.totals["prefix_cache_hits_total"] >= 2 * (len(run.requests) - 1)
    assert without_lag(run.problems) == []


@pytest.mark.slow
def test_a_cache_that_the_workload_asks_for_is_none():
    with emulated() as endpoint:
        run = load(endpoint, WORKLOAD.model_copy(update={"shared_prefix_tokens": 128}))
    assert run.totals["prefix_cache_hits_total"] > 0
    assert without_lag(run.problems) == []


@pytest.mark.slow
def test_answers_that_are_given_up():
    with emulated() as endpoint:
        run = load(endpoint, WORKLOAD.model_copy(update={"timeout_s": 0.06}))
    assert nothing_lost(run, len(run.requests))
    assert failures(run)["timeout"] > 0
    assert np.isnan(mean_queue_delay(run)), "what the server counted is without those that waited longest"
    assert without_lag(run.problems) == []
