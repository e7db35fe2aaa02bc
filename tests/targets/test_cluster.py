"""The target `cluster`: a session that measures over HTTP on the embedded cluster, and leaves nothing."""

from __future__ import annotations

import json

import pytest

from pytest_gpulab import ClosedLoop, Profile, Shape, Workload
from pytest_gpulab.engine import simulate
from tests.conftest import Project

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
    project.pytester.makeconftest("")
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
