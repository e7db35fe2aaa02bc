"""Runs of a profile with a fleet on a cluster: what the load met, what became of the fleet, and its bill."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pytest_gpulab.aws.billing import Meter
from pytest_gpulab.experiment import Profile
from pytest_gpulab.run import Run
from pytest_gpulab.targets.base import Deploying, Tariff

if TYPE_CHECKING:
    from pytest_gpulab.endpoint import Endpoint
    from pytest_gpulab.load.servers import Servers


class LoadFleet(Protocol):
    """Sends the workload of a run."""

    def __call__(self, *, endpoint: Endpoint, servers: Servers) -> Run: ...


def loading_refusal(profile: Profile, load_from: str) -> str:
    """Why the load of a profile cannot come from there; empty when it can."""
    if profile.fleet is None or load_from == "client":
        return ""
    return (
        "a fleet is loaded through its load balancer, which answers before the first replica does: leave out "
        f"--gpulab-load-from={load_from}"
    )


def run_fleet(load: LoadFleet, profile: Profile, deploying: Deploying, tariff: Tariff) -> Run:
    """A Run of a fresh deployment of the profile's fleet, billed from the run's start to zero nodes.

    A machine is billed until its NodeClaim is gone: a little longer than EC2 does, never too short.
    """
    meter = Meter(fixed_usd_per_hour=0.0, price_of=tariff.price_of, budget_usd=math.inf, started=time.time())
    with deploying(profile, meter.observe) as fleet:
        run = load(endpoint=fleet.endpoint, servers=fleet)
    bill = meter.bill(profile.machine, fleet.started, time.time())
    prices = ((0.0, f"prices: {tariff.prices}"),) if tariff.prices else ()
    return replace(
        run,
        totals={**run.totals, "gpu_seconds": bill.gpu_seconds * tariff.gpus, "cost_usd": bill.usd},
        timeline=tuple(sorted((*prices, *run.timeline, *fleet.timeline()), key=lambda entry: entry[0])),
        problems=(*run.problems, *fleet.problems),
    )
