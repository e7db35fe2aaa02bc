"""What keeps a run within its money and its time while its session lives; the switch takes over when it does not."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from pytest_gpulab.aws import prices, switch
from pytest_gpulab.aws.billing import BudgetError, Meter, PriceOf
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError
from pytest_gpulab.aws.ledger import Site
from pytest_gpulab.aws.lifecycle import site_of
from pytest_gpulab.aws.preflight import Plan, fixed_items
from pytest_gpulab.aws.supply import CapacityType
from pytest_gpulab.kube.client import Kube

TEARDOWN_S = 1800.0
"""What an orderly end may take until it deletes the stack itself: load balancers, draining pods, machines. The switch
waits that long beyond time and money, or it would delete the cluster under it."""


@dataclass
class Guard:
    """Keeps a run within its money and its time; `heartbeat` is to be called every few minutes.

    Attributes:
        ends: Unix seconds after which the run must be over (the TTL).
    """

    clients: Clients
    site: Site
    meter: Meter
    ends: float
    now: Callable[[], float] = time.time

    def heartbeat(self, kube: Kube) -> None:
        """Note what runs, put the switch off: never beyond the end of a teardown that begins when time or money is
        over, at this rate.

        Raises:
            BudgetError: money or time is over: tear down.
            AwsError: the switch could not be moved.
        """
        now = self.observe(kube)
        self.meter.check(now)
        if now >= self.ends:
            raise BudgetError(f"the time of the run on {self.site.name} is over: it ends here")
        if not self.site.adopted:
            over = min(self.ends, self.meter.exhausted_at(now))
            switch.move(self.clients, self.site.name, min(now + switch.GRACE_S, over + TEARDOWN_S))

    def observe(self, kube: Kube) -> float:
        """Note what runs; when that was."""
        now = self.now()
        labels = "gpulab.dev/pool" if self.site.adopted else ""
        self.meter.observe(kube.list("karpenter.sh/v1", "NodeClaim", labels=labels), now)
        return now


def make_guard(clients: Clients, plan: Plan, started: float) -> Guard:
    """The guard of a run that began at `started` (Unix seconds), with the plan's budget, time and prices."""
    wanted = plan.request
    meter = Meter(
        fixed_usd_per_hour=sum(usd for _, usd in fixed_items(wanted)),
        price_of=_machine_price(clients, plan),
        budget_usd=wanted.budget_usd,
        started=started,
    )
    return Guard(clients, site_of(plan), meter, started + 3600 * wanted.hours)


def _machine_price(clients: Clients, plan: Plan) -> PriceOf:
    """Spot machines at the plan's price, others on demand; Auto Mode's fee goes by the latter."""
    planned = {
        (supply.need.instance_type, capacity): price.usd_per_hour
        for supply in plan.supplies
        for capacity, price in supply.prices.items()
    }

    @functools.cache
    def price_of(instance_type: str, capacity_type: str) -> float:
        on_demand = prices.on_demand_price(clients, instance_type, plan.request.region)
        if on_demand is None:
            raise AwsError(f"the Pricing API has no price for {instance_type}, so nothing would stop its costs")
        own = planned.get((instance_type, cast("CapacityType", capacity_type)), on_demand.usd_per_hour)
        return own + prices.AUTO_MODE_SHARE * on_demand.usd_per_hour

    return price_of
