"""The end of a run, as often as one likes and wherever it was cut off; and `gpulab reap`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from pytest_gpulab.cli import main
from pytest_gpulab.cluster.resources import INGRESS
from pytest_gpulab.fleet import FROM_ZERO
from pytest_gpulab.kube import teardown
from pytest_gpulab.kube.client import Kube
from pytest_gpulab.kube.embedded import start_cluster
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.nodes import wait_for_zero
from pytest_gpulab.kube.objects import Object, Ref
from pytest_gpulab.kube.pool import Pool
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.serving import serve
from pytest_gpulab.kube.state import ledger_path
from pytest_gpulab.kube.teardown import tear_down
from pytest_gpulab.render import serving_objects
from tests.kube.conftest import PROFILE
from tests.kube.running import Running, running, trouble

DEAD = Process(1, 0.0)
"""No process ever started in 1970."""


def test_it_may_be_repeated(raised: Callable[[Running], Pool], cluster: Running) -> None:
    pool = raised(cluster)
    names = [str(ref) for ref in pool.ledger.refs()]
    assert sorted(tear_down(pool.ledger).removed) == sorted(names)
    pool.ledger.path.parent.mkdir(parents=True, exist_ok=True)
    again = Ledger.create(pool.ledger.path, DEAD)
    again.cluster(cluster.kubeconfig, 1.0)
    again.object(Ref("v1", "Namespace", "gpulab"))
    again.object(Ref("v1", "ConfigMap", "a", "gpulab"))
    assert tear_down(again) == teardown.Teardown()
    assert cluster.labelled(pool.run) == []


def test_the_load_balancer_goes_before_the_pods_and_the_pods_before_their_machines(
    raised: Callable[[Running], Pool], cluster: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = raised(cluster)
    serve(pool, serving_objects(PROFILE, FROM_ZERO, run=pool.run, api_key=pool.api_key), PROFILE.model)
    store = cluster.live.embedded.store
    seen: dict[str, tuple[int, int]] = {}
    delete = Kube.delete

    def watched(self: Kube, ref: Ref) -> None:
        seen.setdefault(ref.kind, (len(store.list(INGRESS)), len(cluster.capacity())))
        delete(self, ref)

    monkeypatch.setattr(Kube, "delete", watched)
    assert tear_down(pool.ledger).problems == []
    order = list(seen)
    assert (order[0], order[-1]) == ("Ingress", "Namespace")
    assert seen["Deployment"][0] == seen["NodePool"][0] == 0, "no Ingress, so no load balancer"
    assert seen["NodeClass"] == (0, 0), "no machine that still needs it"


def test_what_another_run_has_put_in_its_place_stays(cluster: Running, ledger: Ledger) -> None:
    ledger.cluster(cluster.kubeconfig, 1.0)
    ledger.object(Ref("v1", "Namespace", "default"))
    assert tear_down(ledger) == teardown.Teardown()
    assert any(space["metadata"]["name"] == "default" for space in _namespaces(cluster))


def _namespaces(cluster: Running) -> list[Object]:
    store = cluster.live.embedded.store
    return store.list(store.resources.of("v1", "Namespace"))


def test_nodes_that_stay_are_named(
    raised: Callable[[Running], Pool], cluster: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = raised(cluster)
    meta = {"name": "stuck", "labels": {"gpulab.dev/pool": "gpu"}}
    pool.kube.apply({"apiVersion": "v1", "kind": "Node", "metadata": meta})
    monkeypatch.setattr(teardown, "wait_for_zero", partial(wait_for_zero, deadline_s=60.0))
    ended = tear_down(pool.ledger)
    assert len(ended.problems) == 1
    assert ended.problems[0].startswith("waited for zero GPU nodes: not within 60 s. Node stuck")
    assert "Namespace gpulab" in ended.removed, "what can go goes"
    assert pool.ledger.path.exists(), "to be tried again"


def test_what_is_refused_does_not_keep_the_rest(
    raised: Callable[[Running], Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An account that may not delete Services: the machines, which cost money, go all the same."""

    def refused(request: web.Request, number: int) -> int | None:
        return 403 if request.method == "DELETE" and "/services/" in request.path else None

    trouble(monkeypatch, refused)
    with running(tmp_path) as cluster:
        pool = raised(cluster)
        serve(pool, serving_objects(PROFILE, FROM_ZERO, run=pool.run, api_key=pool.api_key), PROFILE.model)
        assert cluster.machines()
        ended = tear_down(pool.ledger)
        services = [ref for ref in pool.ledger.refs() if ref.kind == "Service"]
        assert services and len(ended.problems) == len(services)
        for ref in services:
            assert f"delete {ref}: refused with 403: injected 403" in ended.problems
        assert cluster.machines() == cluster.capacity() == []
        assert "NodePool gpu-spot" in ended.removed
        assert pool.ledger.path.exists(), "to be tried again"


def test_a_cluster_that_died_is_a_problem_with_its_last_words(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log goes with the run: nobody could read later why nothing answered."""
    monkeypatch.setattr(
        "pytest_gpulab.kube.embedded._command", lambda path, speed: ["/bin/sh", "-c", "echo out of memory; exit 3"]
    )
    with pytest.raises(teardown.KubeError):
        start_cluster(ledger, 1.0)
    ledger.object(Ref("v1", "Namespace", "gpulab"))
    (problem,) = tear_down(ledger).problems
    assert problem.startswith("the embedded cluster, process ") and problem.endswith("It wrote: out of memory")
    assert not ledger.path.exists(), "there is nothing to try again"


# --- gpulab reap


def test_reap_has_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reap"]) == 0
    assert capsys.readouterr().out == "no run has left anything\n"


def test_reap_leaves_the_living_alone(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reap"]) == 0
    assert capsys.readouterr().out == f"run {ledger.run}: its session is alive; left alone\n"
    assert ledger.path.exists()


def test_reap_leaves_alone_what_it_cannot_see_until_it_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "laptop")
        ledger = Ledger.create(ledger_path("far"), DEAD)
    assert main(["reap"]) == 1
    assert capsys.readouterr().out == (
        "run far: begun on laptop, which cannot be seen from here; left alone. "
        "`gpulab reap --run far --dead` if its session is dead\n"
    )
    assert main(["reap", "--dead"]) == 2
    assert "--dead must be said of one session: give --run or --cluster" in capsys.readouterr().err
    assert ledger.path.exists()
    assert main(["reap", "--run", "far", "--dead"]) == 0
    assert not ledger.path.exists()


def test_reap_takes_nobodys_word_for_a_session_that_is_seen_alive(ledger: Ledger) -> None:
    assert main(["reap", "--run", ledger.run, "--dead"]) == 0
    assert ledger.path.exists()


def test_reap_takes_the_dead(cluster: Running, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger.create(ledger_path("dead"), DEAD)
    other = Ledger.create(ledger_path("other"), DEAD)
    ledger.cluster(cluster.kubeconfig, 1.0)
    assert main(["reap", "--run", "dead"]) == 0
    assert not ledger.path.exists() and other.path.exists()
    assert main(["reap", "--run", "dead"]) == 0
    assert "run dead has left nothing" in capsys.readouterr().out


def test_reap_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger.create(ledger_path("dead"), DEAD)
    ledger.cluster(tmp_path / "no-such-kubeconfig", 1.0)
    ledger.object(Ref("v1", "Namespace", "gpulab"))
    assert main(["reap"]) == 1
    assert f"{tmp_path / 'no-such-kubeconfig'} must be a kubeconfig" in capsys.readouterr().out
    assert ledger.path.exists()


def test_reap_ends_an_embedded_cluster_and_what_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger.create(ledger_path("dead"), DEAD)
    start_cluster(ledger, 100.0).close()
    process = ledger.cluster_process()
    assert process is not None and process.alive()
    kubeconfig = ledger.connection()[0]
    assert kubeconfig.exists()
    assert os.getsid(process.pid) == process.pid, "out of reach of the terminal's Ctrl-C"
    assert main(["reap"]) == 0
    assert not process.alive() and not kubeconfig.exists() and not ledger.folder.exists()
    assert f"the embedded cluster, process {process.pid}" in capsys.readouterr().out


def test_a_pid_that_somebody_else_has_now_is_not_killed() -> None:
    ledger = Ledger.create(ledger_path("dead"), DEAD)
    ledger.process(replace(Process.of(os.getpid()), started=0))
    assert main(["reap"]) == 0
    assert not ledger.path.exists()


def test_a_cluster_that_does_not_hear_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gpulab.kube.process._STOP_S", 0.5)
    deaf = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    with subprocess.Popen(deaf, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        process = Process.of(child.pid)
        assert process.stop()
        assert not process.alive() and not process.stop()


def test_a_cluster_that_cannot_start_says_why(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pytest_gpulab.kube.embedded._command", lambda path, speed: ["/bin/sh", "-c", "echo no room; exit 3"]
    )
    with pytest.raises(teardown.KubeError, match=r"did not start.* It wrote: no room"):
        start_cluster(ledger, 1.0)
    assert tear_down(ledger).problems == []
    assert not ledger.path.exists()
