"""Runs with a ledger of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_gpulab import Profile
from pytest_gpulab.fleet import FROM_ZERO
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.pool import Pool, bring_up, use_cluster
from pytest_gpulab.kube.process import Process
from pytest_gpulab.kube.state import ledger_path
from pytest_gpulab.render import pool_objects
from tests.kube.running import SPEED, Running, running

PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State folder of the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def ledger() -> Ledger:
    """Of a run that lives as long as this process."""
    return Ledger.create(ledger_path("20260101-000000-abcdef"), Process.of(os.getpid()))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Running]:
    """An empty cluster."""
    with running(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def raised(ledger: Ledger) -> Callable[[Running], Pool]:
    """``raised(cluster)``: the run's pool on a cluster."""

    def raise_pool(cluster: Running) -> Pool:
        kube = use_cluster(ledger, cluster.kubeconfig, speed=SPEED)
        return bring_up(ledger, kube, pool_objects(FROM_ZERO, ["g4dn.xlarge"], run=ledger.run))

    return raise_pool
