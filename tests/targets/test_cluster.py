"""The target `cluster`: a session that measures over HTTP on the embedded cluster, and leaves nothing."""

from __future__ import annotations

import json

import pytest

from pytest_gpulab import ClosedLoop, Profile, Shape, Workload
from pytest_gpulab.engine import simulate
from tests.conftest import Project

# Cluster, servers and client share the machine's cores here: how late the client sends is another test's subject.
PATIENT = """
from pytest_gpulab.load import headroom, reconcile

reconcile.MOST_LAG_S = headroom._MOST_LAG_S = 60.0
"""
STUDY = """
from pytest_gpulab import ClosedLoop, Fleet, Profile, Shape, Workload

T4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 4096})
FOUR = Workload(arrivals=ClosedLoop(concurrency=4), shape=Shape(prompt_tokens=128, output_tokens=32), requests=16)


def test_served(measure):
    served = measure(FOUR, T4, label="four users")
    assert served.delivery_ratio >= 0.999
    assert served.output_tokens_per_s >= 1.0


def test_fleet(measure):
    assert measure(FOUR, T4.on(Fleet())).delivery_ratio >= 0.999
"""


@pytest.mark.slow
def test_study_runs_over_http_and_the_cluster_is_gone(project: Project, monkeypatch, tmp_path) -> None:
    """Emulated evidence that the simulator agrees with; nothing of the run is left in its state folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    project.pytester.makeconftest(PATIENT)
    project.write(STUDY)
    result = project.spawn("--gpulab-target=cluster", "--gpulab-campaign=quick")
    result.assert_outcomes(passed=1, skipped=1)
    record = json.loads(project.file().read_text())
    served, fleet = sorted(record["evidence"], key=lambda item: item["nodeid"], reverse=True)
    assert (served["verdict"], served["basis"]) == ("supported", "emulated")
    assert fleet["verdict"] == "blocked"
    assert "must share one clock, but cluster_speed is 100" in fleet["reason"]
    assert list((tmp_path / "gpulab" / "runs").iterdir()) == []

    (run,) = served["runs"]
    assert run["server"] == "emulated by t4-qwen2.5-0.5b base"
    assert len(run["seeds"]) == 6
    figures = {figure["label"]: figure["value"] for figure in run["figures"]}
    t4 = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 4096})
    four = Workload(arrivals=ClosedLoop(concurrency=4), shape=Shape(prompt_tokens=128, output_tokens=32), requests=16)
    simulated = simulate(t4, four)
    rate = simulated.totals["generation_tokens_total"] / simulated.duration_s
    assert figures["output rate"] == pytest.approx(rate, rel=0.25)  # a machine under test may be busy


@pytest.mark.slow
def test_the_same_study_loaded_from_inside(project: Project, monkeypatch, tmp_path) -> None:
    """The record says so, and the load balancer that nobody needs was not made."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    project.pytester.makeconftest(PATIENT + WATCHED)
    project.write(STUDY)
    options = ("--gpulab-target=cluster", "--gpulab-load-from=cluster", "--gpulab-campaign=quick")
    result = project.spawn(*options)
    result.assert_outcomes(passed=1, skipped=1)
    (run,) = next(item for item in json.loads(project.file().read_text())["evidence"] if item["runs"])["runs"]
    assert run["server"] == "emulated by t4-qwen2.5-0.5b base, loaded from inside the cluster"
    assert len(run["seeds"]) == 6
    made = (project.pytester.path / "ledger.jsonl").read_text()
    assert made.count('"Job", "load-') == 6 and '"Ingress"' not in made
    assert list((tmp_path / "gpulab" / "runs").iterdir()) == []


WATCHED = """
import pytest


@pytest.fixture(autouse=True)
def ledger_is_kept(request, measure):
    yield
    pool = request.getfixturevalue("gpu_pool")
    (request.config.rootpath / "ledger.jsonl").write_bytes(pool.ledger.path.read_bytes())
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpulab-target=sim"], "the target sim has no cluster that could make the load"),
        (["--gpulab-target=vllm"], "choose --gpulab-target=cluster or eks"),
        (["--gpulab-target=cluster", "--gpulab-load-from=moon"], "must be one of client, cluster, got 'moon'"),
    ],
)
def test_a_place_that_does_not_exist_is_refused(project: Project, options: list[str], words: str) -> None:
    project.write(STUDY)
    result = project.spawn("--gpulab-load-from=cluster", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"--gpulab-load-from: {words}" in str(result.stderr) or words in str(result.stderr)
