"""Fleets through the API: the embedded cluster in real time, at brief stages, beside the same fleet simulated."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pytest_gpulab import Profile
from pytest_gpulab.cluster.fleet import simulate_fleet
from pytest_gpulab.experiment import BoundedQueue, Constant, Shape, SpikeToZero, Workload
from pytest_gpulab.figures import delivery_ratio, gpu_seconds, gpu_utilization, peak_replicas, seconds_without_replica
from pytest_gpulab.fleet import Autoscaling, Faults, Fleet, Shortage
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.nodes import gpu_capacity
from pytest_gpulab.kube.pool import Pool
from pytest_gpulab.run import Run
from pytest_gpulab.timeline import STAGES, cold_start, counts
from tests.kube.fleets import USD_PER_HOUR, play, real_time_pool
from tests.kube.project import CONFTEST, Project, until
from tests.load.loads import failures, without_lag

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 2048})
SHAPE = Shape(prompt_tokens=64, output_tokens=16)
LONG_ANSWERS = Shape(prompt_tokens=64, output_tokens=256)
BRIEF = {"stages": "brief", "readiness_period_s": 1}
ONE = Fleet(autoscaling=None, **BRIEF)
DELETED_S = 8.0


@pytest.fixture
def pool(ledger: Ledger) -> Iterator[Pool]:
    with real_time_pool(ledger) as pool:
        yield pool


def both(pool: Pool, fleet: Fleet, workload: Workload) -> tuple[Run, Run]:
    """A run on the cluster and one in virtual time."""
    run = play(pool, T4.on(fleet), workload)
    assert without_lag(run.problems) == []
    return run, simulate_fleet(T4.on(fleet), workload)


def wanted(run: Run, replicas: int) -> float:
    """When so many replicas were first asked for."""
    return min((count.at for count in counts(run.timeline) if count.wanted >= replicas), default=np.inf)


def said(run: Run, line: str) -> float:
    """When a line of the timeline was first written."""
    return next(at for at, text in run.timeline if re.fullmatch(line, text))


def story(run: Run) -> dict[str, list[str]]:
    """What happened to each kind of object, in order; kinds are watched one by one, so between them it may differ."""
    lines = [text.split(" ", 2) for _, text in run.timeline]
    kinds = ("NodeClaim", "Node", "Pod", "Deployment")
    return {kind: [line[2] for line in lines if line[0] == kind] for kind in kinds}


@pytest.mark.slow
def test_from_zero_it_is_the_simulations_story_twice(pool: Pool) -> None:
    """Direct clients lose what comes before the first replica; the second run is as cold as the first."""
    workload = Workload(arrivals=Constant(rate=4), shape=SHAPE, duration_s=20)
    for _ in range(2):
        assert gpu_capacity(pool.kube) == []
        run, simulated = both(pool, ONE, workload)
        first, last = counts(run.timeline)[0], counts(run.timeline)[-1]
        assert (first.nodes, first.nodeclaims) == (last.nodes, last.nodeclaims) == (0, 0)
        assert story(run) == story(simulated)
        measured, expected = cold_start(run.timeline), cold_start(simulated.timeline)
        assert sorted(measured, key=measured.__getitem__) == list(STAGES)
        assert measured == pytest.approx(expected, abs=2.0)
        assert delivery_ratio(run) == pytest.approx(delivery_ratio(simulated), abs=0.1)
        assert failures(run).keys() == {"http_503"}
        early = run.requests["scheduled"] < measured["ready"]
        assert not run.requests["ok"][early].any() and run.requests["ok"][~early].all()
        launched, ended = (said(run, r"NodeClaim \S+ " + word) for word in ("launched", "terminating"))
        assert gpu_seconds(run) == pytest.approx(ended - launched, abs=3.0), "stamps are whole seconds"
        assert run.totals["cost_usd"] == pytest.approx(gpu_seconds(run) / 3600 * USD_PER_HOUR * 0.4)
        assert gpu_utilization(run) > 0


@pytest.mark.slow
def test_a_bounded_queue_waits_for_the_first_replica_as_in_the_simulation(pool: Pool) -> None:
    queue = BoundedQueue(capacity=200, max_wait_s=60.0)
    spike = Workload(arrivals=SpikeToZero(rate=8, spike_s=8), shape=SHAPE, duration_s=25, admission=queue)
    run, simulated = both(pool, ONE, spike)
    assert delivery_ratio(run) == delivery_ratio(simulated) == 1.0
    up = cold_start(run.timeline)["ready"]
    assert up <= run.requests["sent"].min() < up + 1.5, "the client asks four times a second"
    assert run.duration_s == 25.0
    assert run.totals["request_success_total"] == len(run.requests), "nothing is sent twice"


@pytest.mark.slow
def test_the_autoscaler_asks_for_more_as_in_the_simulation(pool: Pool) -> None:
    scaling = Autoscaling(target=4, max_replicas=3)
    fleet = Fleet(warm=1, autoscaling=scaling, **BRIEF)
    run, simulated = both(pool, fleet, Workload(arrivals=Constant(rate=5), shape=LONG_ANSWERS, duration_s=55))
    assert delivery_ratio(run) == delivery_ratio(simulated) == 1.0
    assert peak_replicas(run) == peak_replicas(simulated) == 3
    sooner, later = sorted((wanted(run, 2), wanted(simulated, 2)))
    assert later < 45.0, "a scrape, and a sync of the autoscaler, every 15 s each"
    assert later - sooner < 30.0
    assert any("SuccessfulRescale" in text for _, text in run.timeline)
    assert run.totals["generation_tokens_total"] == simulated.totals["generation_tokens_total"]
    assert "nodes 0" in counts(run.timeline)[-1].text


@pytest.mark.slow
def test_faults_are_those_of_the_simulation(pool: Pool) -> None:
    """A pod is deleted through the API, spot is sold out in the emulated cloud; the next run knows nothing of it."""
    workload = Workload(arrivals=Constant(rate=4), shape=SHAPE, duration_s=16)
    deleted = ONE.model_copy(update={"warm": 1, "faults": Faults(pod_deletions=(DELETED_S,))})
    run, simulated = both(pool, deleted, workload)
    assert seconds_without_replica(run) == pytest.approx(seconds_without_replica(simulated), abs=1.5)
    assert delivery_ratio(run) == pytest.approx(delivery_ratio(simulated), abs=0.1)
    assert any("1 server ended during the run" in text for _, text in run.timeline)

    sold_out = ONE.model_copy(update={"faults": Faults(shortages=(Shortage(capacity_type="spot"),))})
    run, simulated = both(pool, sold_out, workload)
    assert any("InsufficientCapacityError" in text for _, text in run.timeline)
    names = [text.split(" ")[1] for _, text in run.timeline if text.endswith("launched")]
    assert len(names) == 1 and names[0].startswith("gpu-on-demand-")
    assert cold_start(run.timeline) == pytest.approx(cold_start(simulated.timeline), abs=2.0)

    run, _ = both(pool, ONE, workload)
    assert not any("InsufficientCapacityError" in text for _, text in run.timeline)


@pytest.mark.slow
def test_faults_without_a_victim_are_problems_as_in_the_simulation(pool: Pool) -> None:
    faults = Faults(interruptions=(0.0,), losses=(0.0,), pod_deletions=(0.0,))
    few = Workload(arrivals=Constant(rate=4), shape=SHAPE, duration_s=4)
    fleet = ONE.model_copy(update={"faults": faults})
    run, simulated = play(pool, T4.on(fleet), few), simulate_fleet(T4.on(fleet), few)
    assert len(simulated.problems) == 3
    assert sorted(without_lag(run.problems)) == sorted(simulated.problems)


REAL_TIME = CONFTEST.replace("return 300.0", "return 1.0")
STAYS = """
    import time
    from pathlib import Path
    from pytest_gpulab import Fleet

    def test_stays(deploying):
        with deploying(PROFILE.on(Fleet(stages="brief")), lambda claims, now: None) as run:
            run.begin(time.time())
            while not any("NodeClaim" in text for _, text in run.timeline()):
                time.sleep(0.1)
            Path("up").touch()
            time.sleep(100)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_fleets_run_leaves_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", STAYS, REAL_TIME)
    with project.start() as session:
        assert until((project.folder / "up").exists, 60)
        session.send_signal(signal.SIGINT)
        output = session.communicate(timeout=60)[0]
    assert session.returncode == 2, output
    assert project.left() == []


@pytest.mark.slow
def test_a_killed_fleets_run_is_reaped(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", STAYS, REAL_TIME)
    with project.start() as session:
        assert until((project.folder / "up").exists, 60)
        session.kill()
        session.communicate(timeout=60)
    assert project.left() != []
    status, output = project.reap()
    assert status == 0, output
    assert "NodePool gpu-spot" in output and "Deployment gpulab/vllm-" in output
    assert project.left() == []


@pytest.mark.parametrize(
    ("conftest", "options", "reason"),
    [
        (CONFTEST, [], "must share one clock, but cluster_speed is 300"),
        (REAL_TIME, ["-n", "1"], "a fleet needs the session's GPU pool for itself: run without -n"),
    ],
    ids=["clocks", "xdist"],
)
def test_where_a_fleet_cannot_run_it_is_blocked(
    tmp_path: Path, conftest: str, options: list[str], reason: str
) -> None:
    project = Project(tmp_path / "p", STAYS, conftest)
    status, output = project.run("-rs", *options)
    assert status == 0 and "1 skipped" in output, output
    assert reason in " ".join(output.split())
    assert not project.state.exists()
