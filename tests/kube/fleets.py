"""Fleets on an embedded cluster in real time, as the target `cluster` runs them, but for the client's headroom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from pytest_gpulab import render
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.fleet import FROM_ZERO
from pytest_gpulab.kube.embedded import start_cluster
from pytest_gpulab.kube.fleet import FleetRun, Observe, deployed
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.pool import Pool, bring_up
from pytest_gpulab.kube.teardown import tear_down
from pytest_gpulab.live.orders import orders
from pytest_gpulab.load import run_load
from pytest_gpulab.run import Run
from pytest_gpulab.targets.base import Tariff
from pytest_gpulab.targets.fleets import run_fleet

MACHINE = "g4dn.xlarge"
USD_PER_HOUR = 0.526


@contextmanager
def real_time_pool(ledger: Ledger) -> Iterator[Pool]:
    """A pool on a cluster of its own process at speed 1; nothing may be left of it."""
    kube = start_cluster(ledger, 1.0)
    try:
        yield bring_up(ledger, kube, render.pool_objects(FROM_ZERO, [MACHINE], run=ledger.run))
    finally:
        kube.close()
        assert tear_down(ledger).problems == []


def deploy(pool: Pool, profile: Profile, observe: Observe) -> AbstractContextManager[FleetRun]:
    """The profile's fleet on the pool."""
    fleet = profile.fleet
    assert fleet is not None
    return deployed(
        pool,
        fleet,
        render.serving_objects(profile, fleet, run=pool.run, api_key=pool.api_key),
        profile.model,
        capacity=render.gpu_capacity(fleet, [MACHINE], run=pool.run),
        restored=render.gpu_capacity(FROM_ZERO, [MACHINE], run=pool.run),
        orders=partial(orders, fleet.stages),
        observe=observe,
    )


def play(pool: Pool, profile: Profile, workload: Workload, seed: int = 0) -> Run:
    """A run of `workload` on the profile's fleet."""
    load = partial(
        run_load,
        workload,
        profile=profile,
        seed=seed,
        target="cluster",
        basis="emulated",
        server="under test",
        progress=lambda line: None,
    )
    tariff = Tariff(lambda machine, capacity: USD_PER_HOUR * (0.4 if capacity == "spot" else 1.0), gpus=1)
    return run_fleet(load, profile, partial(deploy, pool), tariff)
