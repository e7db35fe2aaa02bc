"""Ctrl-C in the middle of a run: the session ends at once, with what there is of the run, and leaves nothing."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.kube.project import CONFTEST, Project
from tests.load.golden import golden_server, truth

LONG = """
    import pytest
    from pytest_gpulab import Constant, Shape, Workload

    @pytest.mark.decision("long", "It may take long")
    def test_long(measure):
        long = Workload(arrivals=Constant(rate=4), shape=Shape(prompt_tokens=64, output_tokens=8), duration_s=300)
        assert measure(long, PROFILE).delivery_ratio >= 0.999
"""
SHOWN_SOON = """
from pytest_gpulab.load import generator
from pytest_gpulab.targets.loading import Loading

Loading.headroom = None  # no time is spent on measuring it
generator._PROGRESS_S = 1.0
"""


def interrupted(tmp_path: Path, target: str, *options: str, **environment: str) -> tuple[Project, float]:
    """A session of the target that SIGINT has ended while it loaded, and how many seconds that took."""
    project = Project(tmp_path / "p", LONG, CONFTEST + SHOWN_SOON)
    given = (f"--gpulab-target={target}", "--gpulab-accelerator=t4", "--gpulab-campaign=quick", *options)
    with project.start("-s", *given, **environment) as session:
        assert session.stdout is not None
        said = []
        for line in session.stdout:
            said.append(line)
            if " finished (" in line:
                break
        pressed = time.time()
        session.send_signal(signal.SIGINT)
        said += session.stdout.readlines()
        assert session.wait(60) == 2, "".join(said)
        took_s = time.time() - pressed
    (saved,) = (project.folder / "reports" / target / "interrupted").glob("*.npz")
    assert saved.stat().st_mtime - pressed < 2.0
    assert saved.name in "".join(said) and "planted-key" not in "".join(said)
    record = json.loads((project.folder / "reports" / "decision-record.partial.json").read_text())
    (decision,) = record["decisions"]
    assert decision["verdict"] == "open"
    assert not list((project.folder / "reports" / "runs").glob("*.npz")), "it is no evidence"
    return project, took_s


@pytest.mark.slow
def test_an_endpoint(tmp_path: Path) -> None:
    """What is kept of the run, the reports and the tests' own HTML show no key."""
    reports = ("--html=reports/index.html", "--self-contained-html", "--junitxml=reports/junit.xml")
    with golden_server() as url:
        serves = "--gpulab-endpoint-serves=--model qwen2.5-0.5b --max-model-len 9216"
        given = (f"--gpulab-endpoint={url}", serves, *reports)
        project, took_s = interrupted(tmp_path, "endpoint", *given, GPULAB_API_KEY="planted-key")
        assert {sent for one in truth(url) for sent in one["authorization"]} == {"Authorization: Bearer planted-key"}
    assert took_s < 2.0
    assert (project.folder / "reports" / "index.html").exists()
    assert project.holding("planted-key") == []


@pytest.mark.slow
def test_the_embedded_cluster(tmp_path: Path) -> None:
    """Its teardown comes on top."""
    project, _ = interrupted(tmp_path, "cluster")
    assert project.left() == []
