"""What AWS offers of an instance type: zones, quota, prices, and its reason where there is nothing to be had."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, NamedTuple

from pytest_gpulab.aws import prices
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import error_code, explained
from pytest_gpulab.aws.prices import Price

CapacityType = Literal["spot", "on-demand"]

_BLOCK_HOURS = 24
"""The step of a Capacity Block's duration."""


class _Quota(NamedTuple):
    """An EC2 quota in vCPUs, and the instance types that share it."""

    code: str
    name: str
    types: tuple[str, ...]


_QUOTAS: dict[CapacityType, tuple[_Quota, ...]] = {
    "on-demand": (
        _Quota("L-DB2E81BA", "Running On-Demand G and VT instances", ("g*", "vt*")),
        _Quota("L-417A185B", "Running On-Demand P instances", ("p*",)),
    ),
    "spot": (
        _Quota("L-3819A6DF", "All G and VT Spot Instance Requests", ("g*", "vt*")),
        _Quota("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests", ("p2*", "p3*", "p4*")),
        _Quota("L-C4BD4855", "All P5 Spot Instance Requests", ("p5*",)),
    ),
}


@dataclass(frozen=True)
class Need:
    """`nodes` machines of a type at once in each of `capacities`, the ways of buying, first choice first."""

    instance_type: str
    nodes: int
    capacities: tuple[CapacityType, ...] = ("spot", "on-demand")


@dataclass(frozen=True)
class Supply:
    """What AWS offers for a need: its zones, the price of each way of buying that is open, why others are closed."""

    need: Need
    gpus: int
    zones: tuple[str, ...]
    prices: dict[CapacityType, Price]
    closed: tuple[str, ...]

    @property
    def reason(self) -> str | None:
        """Why the need cannot be met; None if it can."""
        return None if self.prices else f"{self.need.instance_type}: {'; '.join(self.closed)}"

    @property
    def usd_per_hour(self) -> float:
        """The most that the need costs, Auto Mode's fee not included: all of it in each way that is open, as each way
        has a NodePool with a limit of its own."""
        return self.need.nodes * sum(price.usd_per_hour for price in self.prices.values())


def offering_zones(clients: Clients, instance_type: str) -> list[str]:
    """Where in the region EC2 offers a type."""
    with explained(f"asking which zones offer {instance_type}"):
        answer = clients("ec2").describe_instance_type_offerings(
            LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": [instance_type]}]
        )
    return sorted(offering["Location"] for offering in answer["InstanceTypeOfferings"])


def find_supply(
    clients: Clients, need: Need, offered: Sequence[str], *, region: str, within: Collection[str], hours: float
) -> Supply:
    """What is to be had for `need` in the zones `within`, of those where EC2 offers it.

    Args:
        hours: how long, which a Capacity Block must cover.
    """
    zones = tuple(zone for zone in offered if zone in within)
    if not zones:
        elsewhere = f"in {', '.join(offered)}, but the cluster is in {', '.join(within)}"
        where = elsewhere if offered else f"in no zone of {region}"
        return Supply(need, 0, (), {}, (f"EC2 offers it {where}",))
    vcpus, gpus = _size(clients, need.instance_type)
    closed: list[str] = []
    open_prices: dict[CapacityType, Price] = {}
    for capacity in need.capacities:
        short = _shortage(clients, need, vcpus, capacity)
        price = None if short else _price(clients, need.instance_type, region, zones, capacity)
        if price is not None:
            open_prices[capacity] = price
        else:
            closed.append(short or f"EC2 has no {capacity} price for it in {region}")
    if not open_prices and need.instance_type.startswith("p"):
        closed.append(_capacity_block(clients, need, hours))
    return Supply(need, gpus * need.nodes, zones, open_prices, tuple(closed))


def _size(clients: Clients, instance_type: str) -> tuple[int, int]:
    """vCPUs and GPUs of one machine."""
    with explained(f"asking for the size of {instance_type}"):
        answer = clients("ec2").describe_instance_types(InstanceTypes=[instance_type])["InstanceTypes"][0]
    gpus = sum(gpu["Count"] for gpu in answer.get("GpuInfo", {}).get("Gpus", ()))
    return answer["VCpuInfo"]["DefaultVCpus"], gpus


def _shortage(clients: Clients, need: Need, vcpus: int, capacity: CapacityType) -> str | None:
    """Why the account's quota does not allow the need; None if it does."""
    quota = _quota_of(need.instance_type, capacity)
    if quota is None:
        return f"which quota its {capacity} machines count against is not known, so none is bought"
    with explained(f"asking for the quota {quota.name!r}"):
        answer = clients("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode=quota.code)
    most, wanted = answer["Quota"]["Value"], need.nodes * vcpus
    used = _vcpus_in_use(clients, quota, capacity) if most >= wanted else 0
    if most - used >= wanted:
        return None
    taken = f", {used} of them in use," if used else ","
    asked = f"{need.nodes} machines need" if need.nodes > 1 else "1 machine needs"
    return f"the quota {quota.name!r} ({quota.code}) is {most:g} vCPUs{taken} but {asked} {wanted}: ask for more"


def _quota_of(instance_type: str, capacity: CapacityType) -> _Quota | None:
    """The one that a machine counts against; None where that is not known, as for P6 on spot."""
    if instance_type[0] not in "gp":
        raise ValueError(f"GPU machines are of the families g and p, got {instance_type}")
    quotas = _QUOTAS[capacity]
    return next((one for one in quotas if any(fnmatch(instance_type, kind) for kind in one.types)), None)


def _vcpus_in_use(clients: Clients, quota: _Quota, capacity: CapacityType) -> int:
    """vCPUs of the machines that run now and count against a quota. Unused capacity reservations do so too, but are
    not looked for."""
    states = ["pending", "running", "shutting-down", "stopping"]
    filters = [
        {"Name": "instance-type", "Values": list(quota.types)},
        {"Name": "instance-state-name", "Values": states},
    ]
    with explained(f"asking which machines count against the quota {quota.name!r}"):
        pages = clients("ec2").get_paginator("describe_instances").paginate(Filters=filters)
        machines = [one for page in pages for group in page["Reservations"] for one in group["Instances"]]
    lifecycle = "spot" if capacity == "spot" else None  # a Capacity Block's is its own, and has no such quota
    counted = Counter(one["InstanceType"] for one in machines if one.get("InstanceLifecycle") == lifecycle)
    return sum(number * _size(clients, kind)[0] for kind, number in counted.items())


def _price(
    clients: Clients, instance_type: str, region: str, zones: Collection[str], capacity: CapacityType
) -> Price | None:
    if capacity == "spot":
        return prices.spot_price(clients, instance_type, zones)
    return prices.on_demand_price(clients, instance_type, region)


def _capacity_block(clients: Clients, need: Need, hours: float) -> str:
    """What a Capacity Block for the need would cost, or AWS's reason why there is none. The lab never buys one."""
    from botocore.exceptions import ClientError

    duration = _BLOCK_HOURS * math.ceil(hours / _BLOCK_HOURS)
    with explained(f"asking for a Capacity Block of {need.instance_type}"):
        try:
            offers = clients("ec2").describe_capacity_block_offerings(
                InstanceType=need.instance_type, InstanceCount=need.nodes, CapacityDurationHours=duration
            )["CapacityBlockOfferings"]
        except ClientError as refusal:
            if not error_code(refusal).startswith(("Invalid", "Unsupported")):
                raise
            return f"no Capacity Block: AWS said {refusal.response['Error'].get('Message', '')}"
    if not offers:
        return f"AWS offers no Capacity Block of {duration} h"
    best = min(offers, key=lambda offer: float(offer["UpfrontFee"]))
    return (
        f"it can be had as a Capacity Block ({best['CapacityBlockDurationHours']} h from {best['StartDate']:%Y-%m-%d}"
        f" in {best['AvailabilityZone']} for {float(best['UpfrontFee']):.0f} USD, paid at once), which must be bought"
        " by hand"
    )
