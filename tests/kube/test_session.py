"""The pool of a pytest session: one for all workers, and zero again however the session ends."""

from __future__ import annotations

import json
import os
import pty
import signal
from pathlib import Path

import pytest

from tests.kube.project import CONFTEST, Project, until

STAYS = """
    import time
    from pathlib import Path

    def test_stays(gpu_pool):
        Path("up").touch()
        time.sleep(100)
"""


@pytest.mark.slow
def test_a_pool_that_a_failing_test_used_is_torn_down(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", "def test_fails(gpu_pool):\n    assert not gpu_pool.run")
    status, output = project.run()
    assert status == 1 and "1 failed" in output
    assert project.left() == []


def test_a_session_without_a_pool_leaves_no_trace(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", "def test_passes():\n    pass")
    assert project.run()[0] == 0
    assert not project.state.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_a_signal_ends_it_at_zero(tmp_path: Path, number: signal.Signals, workers: list[str]) -> None:
    project = Project(tmp_path / "p", STAYS)
    with project.start(*workers) as session:
        assert until((project.folder / "up").exists, 30)
        assert project._processes()
        session.send_signal(number)
        output = session.communicate(timeout=60)[0]
    assert session.returncode == 2, output
    assert project.left() == []


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_it_at_zero(tmp_path: Path) -> None:
    """Nothing can be written there any more either."""
    project = Project(tmp_path / "p", STAYS)
    ours, theirs = pty.openpty()
    with project.start_on(theirs) as session:
        os.close(theirs)
        assert until((project.folder / "up").exists, 30)
        os.close(ours)
        session.wait(60)
    assert project.left() == []


@pytest.mark.slow
def test_with_nohup_a_terminal_may_be_closed(tmp_path: Path) -> None:
    body = """
    import os
    import signal

    def test_goes_on(gpu_pool):
        os.kill(os.getpid(), signal.SIGHUP)
    """
    project = Project(tmp_path / "p", body, CONFTEST + "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    status, output = project.run()
    assert status == 0 and "1 passed" in output, output
    assert project.left() == []


@pytest.mark.slow
def test_ctrl_c_during_the_teardown_says_what_finishes_it(tmp_path: Path) -> None:
    interrupts = """
from pytest_gpulab.kube import teardown

def tear_down(ledger):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("nobody waits that long")

teardown.tear_down = tear_down
"""
    project = Project(tmp_path / "p", "def test_uses(gpu_pool):\n    pass", CONFTEST + interrupts)
    status, output = project.run()
    assert status == 1 and "1 passed" in output, output
    assert "the teardown was interrupted before its end" in output
    assert "something is left: `gpulab reap` tries again" in output
    assert project.left() != []
    assert project.reap()[0] == 0
    assert project.left() == []


@pytest.mark.slow
def test_a_signal_while_it_comes_up(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", STAYS)
    with project.start() as session:
        assert until(lambda: bool(project._processes()), 30)
        session.send_signal(signal.SIGTERM)
        output = session.communicate(timeout=60)[0]
    assert session.returncode == 2, output
    assert project.left() == []


@pytest.mark.slow
def test_two_workers_share_one_pool(tmp_path: Path) -> None:
    body = """
    import json
    from pathlib import Path

    def test_notes(gpu_pool, worker_id):
        process = gpu_pool.ledger.cluster_process()
        nodepools = gpu_pool.kube.list("karpenter.sh/v1", "NodePool", labels=f"gpulab.dev/run={gpu_pool.run}")
        note = [gpu_pool.run, process.pid, sorted(pool["metadata"]["name"] for pool in nodepools)]
        Path(f"{worker_id}.json").write_text(json.dumps(note))
    """
    project = Project(tmp_path / "p", body)
    status, output = project.run("--tx", "2*popen", "--dist", "each")
    assert status == 0, output
    first, second = (json.loads((project.folder / f"gw{number}.json").read_text()) for number in range(2))
    assert first == second and first[2] == ["gpu-on-demand", "gpu-spot"]
    assert project.left() == []


@pytest.mark.slow
def test_a_node_that_stays_fails_the_session_and_is_named(tmp_path: Path) -> None:
    body = """
    def test_leaves_one(gpu_pool):
        meta = {"name": "stuck", "labels": {"gpulab.dev/pool": "gpu"}}
        gpu_pool.kube.apply({"apiVersion": "v1", "kind": "Node", "metadata": meta})
    """
    project = Project(tmp_path / "p", body)
    status, output = project.run()
    assert status == 1
    assert "1 passed" in output
    assert "the GPU pool was not torn down cleanly" in output
    assert "waited for zero GPU nodes: not within 900 s. Node stuck" in output
    assert project.left() == [], "an embedded cluster takes it along"


def test_a_target_without_a_cluster_is_blocked(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", "def test_never(gpu_pool):\n    assert False")
    status, output = project.run("--gpulab-target=vllm", "-rs")
    assert status == 0 and "1 skipped" in output, output
    assert "blocked: target vllm has no cluster; choose one of sim, cluster" in output
    assert not project.state.exists()


LOSES = """
    import os
    import shutil
    import signal

    def test_loses_what_is_known(gpu_pool):
        gpu_pool.ledger.path.unlink()
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
@pytest.mark.parametrize("more", ["", "        shutil.rmtree(gpu_pool.ledger.folder)\n"], ids=["ledger", "all"])
def test_a_ledger_that_somebody_removed_fails_the_session_at_zero(
    tmp_path: Path, workers: list[str], more: str
) -> None:
    project = Project(tmp_path / "p", LOSES + more)
    status, output = project.run(*workers)
    assert status == 1 and "1 passed" in output, output
    assert "must stay until its run is over, but somebody removed it" in output
    assert project.left() == []


@pytest.mark.slow
def test_a_signal_ends_it_at_zero_without_a_ledger_too(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", LOSES + "        os.kill(os.getpid(), signal.SIGTERM)\n")
    status, output = project.run()
    assert status == 2, output
    assert "must stay until its run is over, but somebody removed it" in output
    assert project.left() == []


@pytest.mark.slow
def test_a_ledger_that_is_lost_with_its_worker_fails_the_session(tmp_path: Path) -> None:
    project = Project(tmp_path / "p", LOSES + "        os.kill(os.getpid(), signal.SIGKILL)\n")
    status, output = project.run("-n", "1", "--max-worker-restart", "0")
    assert status == 1, output
    (folder,) = (project.state / "gpulab" / "runs").iterdir()
    assert f"end the processes whose command names {folder}" in output
    (cluster,) = project._processes()
    assert str(folder) in cluster
    os.kill(int(cluster.partition(":")[0]), signal.SIGKILL)
