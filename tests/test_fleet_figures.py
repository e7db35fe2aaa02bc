"""Figures of fleets: from a run's timeline and bill, against timelines written by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from pydantic import ValidationError

from pytest_gpulab import figures
from pytest_gpulab.experiment import Constant, Profile, Shape, Workload
from pytest_gpulab.fleet import Autoscaling, Faults, Fleet, Shortage
from pytest_gpulab.lab import Lab
from pytest_gpulab.measurement import describe, summarize
from pytest_gpulab.targets.sim import Sim
from tests.known import PROFILE, WORKLOAD, known_run

COLD = (
    (0.0, "replicas 1 wanted 0 ready, nodes 0, nodeclaims 0"),
    (40.0, "Node a created"),
    (50.0, "replicas 3 wanted 1 ready, nodes 1, nodeclaims 3"),
    (90.0, "replicas 3 wanted 3 ready, nodes 3, nodeclaims 3"),
    (120.0, "replicas 3 wanted 0 ready, nodes 0, nodeclaims 3"),
    (150.0, "replicas 3 wanted 2 ready, nodes 2, nodeclaims 2"),
    (210.0, "replicas 0 wanted 0 ready, nodes 0, nodeclaims 0"),
)
"""The run ends at 200 s; what comes later is the teardown."""


def fleet_run(**totals):
    run = known_run(1.0)
    return replace(run, timeline=COLD, totals={**run.totals, **totals})


def test_moments_and_counts_of_a_timeline():
    run = fleet_run()
    assert [figures.replicas_ready(run, count) for count in (1, 2, 3, 4)] == [50.0, 90.0, 90.0, math.inf]
    assert figures.peak_replicas(run) == 3
    assert figures.seconds_without_replica(run) == 50.0 + 30.0
    assert figures.reached(run, "node") == 40.0
    assert figures.reached(run, "ready") == math.inf, "no line says so"


def test_what_was_ready_before_the_run_is_ready_at_its_start():
    early = tuple((at - 100.0, text) for at, text in COLD)
    run = replace(known_run(1.0), timeline=early)
    assert figures.replicas_ready(run, 3) == 0.0
    assert figures.peak_replicas(run) == 3
    assert figures.seconds_without_replica(run) == 30.0 + 90.0


def test_without_a_fleet_there_is_one_server_all_the_time():
    run = known_run(1.0)
    assert figures.replicas_ready(run, 1) == 0.0
    assert figures.replicas_ready(run, 2) == math.inf
    assert figures.seconds_without_replica(run) == 0.0
    assert figures.gpu_seconds(run) == 200.0
    assert figures.cost_usd(run, 3.6) == pytest.approx(0.2)


def test_a_fleets_bill_is_what_a_useful_request_costs():
    run = fleet_run(gpu_seconds=500.0, gpu_busy_seconds=125.0, cost_usd=4.0)
    assert figures.gpu_seconds(run) == 500.0
    assert figures.gpu_utilization(run) == 0.25
    assert figures.cost_per_useful_request(run, 3.6, {"e2e": 2.0}) == pytest.approx(4.0 / 200)
    assert figures.cost_per_useful_request(run, 3.6, {"e2e": 0.5}) == math.inf


def test_a_short_name_tells_how_a_fleet_differs():
    assert describe(WORKLOAD, PROFILE.on(Fleet())) == "1 req/s, from zero"
    scaled = Fleet(warm=2, autoscaling=Autoscaling(policy="running", target=128), faults=Faults(losses=(60.0,)))
    assert describe(WORKLOAD, PROFILE.on(scaled)) == "1 req/s, 2 warm, policy=running, target=128.0, losses=(60.0,)"
    assert describe(WORKLOAD, PROFILE.on(Fleet(autoscaling=None))) == "1 req/s, from zero, autoscaling=None"


def test_a_fleet_is_data_that_survives_json():
    fleet = Fleet(warm=1, autoscaling=None, faults=Faults(shortages=(Shortage(capacity_type="spot"),)))
    assert Fleet.model_validate_json(fleet.model_dump_json()) == fleet
    assert PROFILE.on(fleet).definition_hash != PROFILE.on(Fleet()).definition_hash
    assert PROFILE.on(fleet).with_engine_args(max_num_seqs=2).fleet == fleet


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"autoscaling": {"min_replicas": 5, "max_replicas": 4}},
            "min_replicas must be at most max_replicas, got 5 > 4",
        ),
        ({"warm": -1}, "greater than or equal to 0"),
        ({"warm": 5}, "warm must be at most max_replicas, got 5 > 4: the autoscaler would take them away"),
        ({"capacity": ()}, "at least 1 item"),
        ({"replica": 2}, "replicas"),
        ({"faults": {"losses": (-1.0,)}}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_deployed_is_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        Fleet.model_validate(wrong)


@pytest.mark.parametrize(
    "figure",
    [
        lambda arm: arm.downtime,
        lambda arm: arm.peak_replicas,
        lambda arm: arm.replicas_ready(2),
        lambda arm: arm.reached("node"),
    ],
    ids=["downtime", "peak_replicas", "replicas_ready", "reached"],
)
def test_figures_of_a_fleet_are_not_asked_of_one_server(figure):
    lab = Lab(Sim())
    with pytest.raises(ValueError, match=r"is a figure of a fleet.*write profile\.on\(Fleet"):
        figure(lab.measure(WORKLOAD, PROFILE))
    assert figure(lab.measure(WORKLOAD, PROFILE.on(Fleet()))) is not None


def test_cold_starts_differ_where_arrivals_do_not():
    """Constant arrivals make an engine deterministic, but not a fleet: its repeats count one by one."""
    lab = Lab(Sim(), max_repeats=6)
    profile = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 2048})
    shape = Shape(prompt_tokens=64, output_tokens=8)
    workload = Workload(arrivals=Constant(rate=1), shape=shape, duration_s=500)
    cold = lab.measure(workload, profile.on(Fleet(autoscaling=None)))
    ready = {cold.run(repeat).timeline for repeat in range(3)}
    assert len(ready) == 3
    told = summarize(cold)
    assert told.profile["fleet"]["autoscaling"] is None, "None says that there is none"
    labels = [figure.label for figure in told.figures]
    for label in ("first replica ready", "peak replicas", "GPU time", "cost"):
        assert label in labels
    alone = lab.measure(workload, profile)
    assert alone.run(0) is alone.run(1)
