"""Before anything is created: what can be had where, what it costs an hour and in all, and what stands against it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gpulab.aws import prices
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.cluster import find_cluster, require_usable
from pytest_gpulab.aws.errors import AwsError, explained
from pytest_gpulab.aws.identity import Identity, identify
from pytest_gpulab.aws.supply import Need, Supply, find_supply, offering_zones

ZONES = 3
"""The template's."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,29}")
"""Roles and the guard's stack get longer names from it."""
_WITHOUT_EKS = {"use1-az3", "usw1-az2", "cac1-az3"}
"""Zones that a control plane's subnets cannot be in (EKS user guide, 'Subnet requirements')."""
_GENERAL_NODES, _GENERAL_TYPE = 2, "c6a.large"
"""What Prometheus and the adapter are estimated to need; Auto Mode chooses the type."""


@dataclass(frozen=True)
class Request:
    """What a session wants, and within which bounds.

    Attributes:
        name: of the cluster and its stack.
        adopt: the cluster exists and is not the lab's: it is used, never deleted.
        hours: the campaign's estimated length, and the longest it may run (the TTL).
        client_cidrs: addresses that may reach the Kubernetes API.
        model_bucket: with model weights that the vLLM pods may read, through Pod Identity; empty: none.
    """

    name: str
    run: str
    region: str
    needs: tuple[Need, ...]
    hours: float
    budget_usd: float
    allowed_accounts: frozenset[str]
    client_cidrs: tuple[str, ...] = ()
    adopt: bool = False
    model_bucket: str = ""


@dataclass(frozen=True)
class Plan:
    """What will be created and what it costs; `items` are (what, USD an hour), GPU machines at their most."""

    request: Request
    identity: Identity
    zones: tuple[str, ...]
    supplies: tuple[Supply, ...]
    items: tuple[tuple[str, float], ...]

    @property
    def usd_per_hour(self) -> float:
        """With every GPU machine running."""
        return sum(usd for _, usd in self.items)

    @property
    def campaign_usd(self) -> float:
        """For all hours."""
        return self.usd_per_hour * self.request.hours

    @property
    def blocked(self) -> dict[str, str]:
        """Why an instance type cannot be had, by type."""
        return {supply.need.instance_type: supply.reason for supply in self.supplies if supply.reason}

    def __str__(self) -> str:
        wanted = self.request
        verb = "adopt" if wanted.adopt else "create"
        head = f"{verb} {wanted.name} in {wanted.region}, account {self.identity.account}"
        lines = [f"  {usd:9.3f} USD/h  {what}" for what, usd in self.items]
        total = f"  {self.usd_per_hour:9.3f} USD/h  at most; {self.campaign_usd:.2f} USD for {wanted.hours:g} h"
        blocked = [f"  blocked: {reason}" for reason in self.blocked.values()]
        return "\n".join([head, *lines, f"{total}, budget {wanted.budget_usd:.2f} USD", *blocked])


def preflight(clients: Clients, request: Request) -> Plan:
    """Ask AWS everything that can be known before the first dollar.

    Raises:
        AwsError: the caller may not, the name is taken, no three zones fit, or the campaign exceeds the budget. An
            instance type that cannot be had is no error: it is in the plan's `blocked`.
        ValueError: the request is not one.
    """
    _require_sane(request)
    identity = identify(clients, request.allowed_accounts)
    offered = [offering_zones(clients, need.instance_type) for need in request.needs]
    if request.adopt:
        zones = _zones_of(clients, require_usable(clients, request.name))
    else:
        _require_free(clients, request)
        zones = choose_zones(offered, _zones(clients))
    supplies = tuple(
        find_supply(clients, need, where, region=request.region, within=zones, hours=request.hours)
        for need, where in zip(request.needs, offered, strict=True)
    )
    plan = Plan(request, identity, zones, supplies, tuple(_items(clients, request, supplies)))
    if plan.campaign_usd > request.budget_usd:
        raise AwsError(
            f"the campaign may cost {plan.campaign_usd:.2f} USD ({plan.usd_per_hour:.2f} USD/h for {request.hours:g} "
            f"h), more than the budget of {request.budget_usd:.2f} USD: raise --gpulab-budget, or ask for less"
        )
    return plan


def choose_zones(offered: Sequence[Collection[str]], available: Sequence[str]) -> tuple[str, ...]:
    """Three zones of the region's: those that offer most of the instance types, then by name."""
    if len(available) < ZONES:
        raise AwsError(f"the region must have {ZONES} zones, but has {', '.join(available)}: choose another region")
    return tuple(sorted(sorted(available, key=lambda zone: (-sum(zone in one for one in offered), zone))[:ZONES]))


def _require_sane(request: Request) -> None:
    if not _NAME.fullmatch(request.name):
        raise ValueError(f"a cluster's name must match {_NAME.pattern}, got {request.name!r}")
    if not (request.hours > 0 and request.budget_usd > 0):
        raise ValueError(f"hours and budget must be above 0, got {request.hours:g} h and {request.budget_usd:g} USD")
    if not request.adopt and not request.client_cidrs:
        raise ValueError("say which addresses may reach the Kubernetes API: there is no open default")


def _require_free(clients: Clients, request: Request) -> None:
    if find_cluster(clients, request.name) is not None:
        raise AwsError(
            f"there is an EKS cluster {request.name} already: adopt it with --gpulab-cluster {request.name}, or "
            f"remove what an earlier run left with `gpulab reap --cluster {request.name}`"
        )


def _zones(clients: Clients) -> list[str]:
    with explained("asking for the region's zones"):
        answer = clients("ec2").describe_availability_zones(
            Filters=[
                {"Name": "zone-type", "Values": ["availability-zone"]},
                {"Name": "state", "Values": ["available"]},
            ]
        )
    zones = answer["AvailabilityZones"]
    return sorted(zone["ZoneName"] for zone in zones if zone["ZoneId"] not in _WITHOUT_EKS)


def _zones_of(clients: Clients, cluster: Any) -> tuple[str, ...]:
    with explained(f"asking for the subnets of the cluster {cluster['name']}"):
        answer = clients("ec2").describe_subnets(SubnetIds=list(cluster["resourcesVpcConfig"]["subnetIds"]))
    return tuple(sorted({subnet["AvailabilityZone"] for subnet in answer["Subnets"]}))


def fixed_items(request: Request) -> list[tuple[str, float]]:
    """What costs from start to end whatever runs, as (what, USD an hour); an adopted cluster's own does not count."""
    items = [("load balancer", prices.LOAD_BALANCER.usd_per_hour)]
    if not request.adopt:
        items += [
            ("EKS control plane", prices.CLUSTER.usd_per_hour),
            ("NAT gateway and its address", prices.NAT_GATEWAY.usd_per_hour + prices.PUBLIC_ADDRESS.usd_per_hour),
        ]
    return items


def _items(clients: Clients, request: Request, supplies: Sequence[Supply]) -> list[tuple[str, float]]:
    items = fixed_items(request)
    if not request.adopt:
        general = prices.on_demand_price(clients, _GENERAL_TYPE, request.region)
        if general is None:
            raise AwsError(f"the Pricing API has no price for {_GENERAL_TYPE} in {request.region}: check the region")
        each = general.usd_per_hour * (1 + prices.AUTO_MODE_SHARE)
        items.append((f"{_GENERAL_NODES} nodes without GPU, as {_GENERAL_TYPE}: {general}", _GENERAL_NODES * each))
    for supply in supplies:
        if supply.reason is None:
            kinds = ", ".join(f"{capacity} {price}" for capacity, price in supply.prices.items())
            both = " of each" if len(supply.prices) > 1 else ""
            what = f"{supply.need.nodes} x {supply.need.instance_type}{both}: {kinds}"
            items += [(what, supply.usd_per_hour), *_fee(clients, request, supply)]
    return items


def _fee(clients: Clients, request: Request, supply: Supply) -> list[tuple[str, float]]:
    """Auto Mode's, which goes by the on-demand price whichever way the machine is bought."""
    price = supply.prices.get("on-demand") or prices.on_demand_price(
        clients, supply.need.instance_type, request.region
    )
    if price is None:
        return []
    usd = supply.need.nodes * len(supply.prices) * price.usd_per_hour * prices.AUTO_MODE_SHARE
    return [(f"Auto Mode's fee for them, {prices.AUTO_MODE_SHARE:.0%} of on-demand", usd)]
