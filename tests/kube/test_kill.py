"""SIGKILL at 50 points of a session, from bring-up to teardown; then `gpulab reap`: nothing is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.kube.project import CONFTEST, ELSEWHERE, Project, until
from tests.kube.running import Running, running

POINTS = 50
KILLED = -9
BODY = "def test_serves(serving):\n    assert serving(PROFILE).url"
PLUGIN = ("-p", "tests.kube.killer")


def sweep(trial: Callable[[int, int], tuple[bool, list[str]]], steps: int) -> None:
    """Run all trials, as many at once as there are cores. Each is given its number and the step to kill at, and says
    whether it was killed and what was left."""
    kill_at = [1 + number * steps // POINTS for number in range(POINTS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = list(pool.map(trial, range(POINTS), kill_at))
    assert {step: left for step, (_, left) in zip(kill_at, ended, strict=True) if left} == {}
    # A slower session polls less often and may be over before its last step comes.
    assert sum(killed for killed, _ in ended) >= 0.9 * POINTS


def steps_of(project: Project, **environment: str) -> int:
    """How many steps a session takes that nobody kills."""
    counted = project.folder / "steps"
    status, output = project.run(*PLUGIN, GPULAB_STEPS=str(counted), **environment)
    assert status == 0, output
    assert project.left() == []
    return int(counted.read_text())


def killed_and_reaped(project: Project, step: int, **environment: str) -> tuple[bool, list[str]]:
    status, output = project.run(*PLUGIN, GPULAB_KILL_AT=str(step), **environment)
    assert status in (KILLED, 0), output
    reaped, said = project.reap()
    left = project.left()
    return status == KILLED, left if reaped == 0 else [*left, f"reap exited {reaped}: {said}"]


@pytest.mark.slow
def test_with_its_own_cluster(tmp_path: Path) -> None:
    def trial(number: int, step: int) -> tuple[bool, list[str]]:
        return killed_and_reaped(Project(tmp_path / str(number), BODY), step)

    sweep(trial, steps_of(Project(tmp_path / "whole", BODY)))


@pytest.mark.slow
def test_on_a_cluster_that_goes_on(tmp_path: Path) -> None:
    """Nothing goes away with a process here, and what is left can be seen from behind the API."""

    def project(name: str) -> Project:
        return Project(tmp_path / name, BODY, CONFTEST + ELSEWHERE)

    def trial(number: int, step: int) -> tuple[bool, list[str]]:
        with running(project(str(number)).folder) as cluster:
            killed, left = killed_and_reaped(project(str(number)), step, GPULAB_ELSEWHERE=str(cluster.kubeconfig))
            return killed, [*left, *_remains(cluster)]

    with running(project("whole").folder) as cluster:
        steps = steps_of(project("whole"), GPULAB_ELSEWHERE=str(cluster.kubeconfig))
        assert _remains(cluster) == []
        assert cluster.launched() == 1
    sweep(trial, steps)


LOADS = """
    import pytest
    from pytest_gpulab import Constant, Shape, Workload

    @pytest.mark.decision("delivers", "It delivers")
    def test_loads(measure):
        load = Workload(arrivals=Constant(rate=4), shape=Shape(prompt_tokens=64, output_tokens=8), duration_s=60)
        assert measure(load, PROFILE).delivery_ratio >= 0.999
"""


@pytest.mark.slow
def test_a_session_that_loads_from_inside_the_cluster(tmp_path: Path) -> None:
    """Killed while its pods send: they end, and so do their processes."""
    project = Project(tmp_path / "loads", LOADS)
    with project.start("--gpulab-target=cluster", "--gpulab-load-from=cluster") as session:
        assert until(lambda: bool(senders(project)), 60)
        session.kill()
        session.wait()
    assert senders(project), "the cluster, and the load in it, go on"
    status, said = project.reap()
    assert status == 0 and "Job gpulab/load-" in said and "NodePool load" in said, said
    assert until(lambda: not senders(project))
    assert project.left() == []


def senders(project: Project) -> list[int]:
    """Processes of the load's pods."""
    return [
        child.pid
        for process in psutil.process_iter()
        if any(str(project.state) in word for word in words_of(process))
        for child in process.children(recursive=True)
        if "pytest_gpulab.load.pod" in words_of(child)
    ]


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _remains(cluster: Running) -> list[str]:
    return [*cluster.labelled(), *cluster.capacity(), *cluster.machines()]
