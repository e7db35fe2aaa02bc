"""What of a cluster is still there, and what that costs: found by tags, not by what the lab remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gpulab.aws import prices
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError, CredentialsError, error_code, explained
from pytest_gpulab.aws.ledger import Site
from pytest_gpulab.aws.stack import CLUSTER_TAG, REAL_TIME, RUN_TAG, Clock

_POLL_S = 10.0
_TAGGED_AT_ONCE = 20
"""Load balancers whose tags AWS tells in one call."""


@dataclass(frozen=True)
class Leak:
    """One thing that is left; `usd_per_hour` is None where the price is not known."""

    kind: str
    id: str
    usd_per_hour: float | None

    def __str__(self) -> str:
        cost = "price not known" if self.usd_per_hour is None else f"{self.usd_per_hour:.4f} USD/h"
        return f"{self.kind} {self.id} ({cost})"


class LeakError(AwsError):
    """Something is left; `leaks` is what."""

    def __init__(self, leaks: Sequence[Leak]) -> None:
        known = sum(leak.usd_per_hour or 0.0 for leak in leaks)
        listed = "\n  ".join(map(str, leaks))
        super().__init__(
            f"{len(leaks)} resources are left in AWS and cost at least {known:.4f} USD/h:\n  {listed}\n"
            "Repeat `gpulab reap`; what stays then must be removed by hand."
        )
        self.leaks = tuple(leaks)


def owner_tags(site: Site) -> dict[str, str]:
    """Tags, any of which says that a thing is the site's: CloudFormation's, Auto Mode's and EKS's own.

    On an adopted cluster only the run's own things are.
    """
    if site.adopted:
        return {RUN_TAG: site.run}
    return {
        CLUSTER_TAG: site.name,
        "eks:eks-cluster-name": site.name,
        "aws:eks:cluster-name": site.name,
    }


def scan(clients: Clients, site: Site) -> list[Leak]:
    """Everything in the region that carries one of the site's tags, costly things first."""
    tags = owner_tags(site)
    found = {(leak.kind, leak.id): leak for search in _SEARCHES for leak in search(clients, site, tags)}
    return sorted(found.values(), key=lambda leak: (-(leak.usd_per_hour or 0.0), leak.kind, leak.id))


def require_none(clients: Clients, site: Site, *, deadline_s: float, clock: Clock = REAL_TIME) -> None:
    """Wait until nothing is left: AWS shows what it has deleted for a while. LeakError lists what stays."""
    end = clock.now() + deadline_s
    while left := scan(clients, site):
        if clock.now() >= end:
            raise LeakError(left)
        clock.sleep(_POLL_S)


def sweep(clients: Clients, site: Site, *, deadline_s: float, clock: Clock = REAL_TIME) -> list[str]:
    """Delete what Kubernetes left behind of the site; what AWS refused to the last, with its reason.

    A load balancer holds its security group for minutes after it is deleted, so refusals are tried again. Only what
    no stack owns is touched: a stack's own resources are its deletion's.
    """
    end = clock.now() + deadline_s
    while (refused := _sweep_once(clients, site)) and clock.now() < end:
        clock.sleep(_POLL_S)
    return refused


def _sweep_once(clients: Clients, site: Site) -> list[str]:
    refused = []
    left = [leak for leak in scan(clients, site) if leak.kind in _SWEEP_ORDER]
    for leak in sorted(left, key=lambda leak: _SWEEP_ORDER[leak.kind]):
        try:
            with explained(f"deleting the {leak.kind} {leak.id}"):
                _DELETIONS[leak.kind](clients, leak.id)
        except CredentialsError:
            raise
        except AwsError as refusal:
            refused.append(str(refusal))
    return refused


def _instances(clients: Clients, site: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    reservations = _ec2(clients, "describe_instances", "Reservations", tags)
    for instance in (one for reservation in reservations for one in reservation["Instances"]):
        if instance["State"]["Name"] != "terminated":
            kind = instance["InstanceType"]
            yield Leak("instance", f"{instance['InstanceId']}, {kind}", _price(clients, kind, site.region))


def _volumes(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for volume in _ec2(clients, "describe_volumes", "Volumes", tags):
        yield Leak("volume", volume["VolumeId"], volume["Size"] * prices.VOLUME_USD_PER_GB_HOUR)


def _addresses(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for address in _ec2(clients, "describe_addresses", "Addresses", tags):
        yield Leak("address", address["AllocationId"], prices.PUBLIC_ADDRESS.usd_per_hour)


def _gateways(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for gateway in _ec2(clients, "describe_nat_gateways", "NatGateways", tags):
        if gateway["State"] != "deleted":
            yield Leak("NAT gateway", gateway["NatGatewayId"], prices.NAT_GATEWAY.usd_per_hour)


def _interfaces(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for interface in _ec2(clients, "describe_network_interfaces", "NetworkInterfaces", tags):
        yield Leak("network interface", interface["NetworkInterfaceId"], 0.0)


def _groups(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for group in _ec2(clients, "describe_security_groups", "SecurityGroups", tags):
        yield Leak("security group", group["GroupId"], 0.0)


def _networks(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for network in _ec2(clients, "describe_vpcs", "Vpcs", tags):
        yield Leak("VPC", network["VpcId"], 0.0)


def _balancers(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for arn in _tagged(clients, "describe_load_balancers", "LoadBalancers", "LoadBalancerArn", tags):
        yield Leak("load balancer", arn, prices.LOAD_BALANCER.usd_per_hour)


def _targets(clients: Clients, _: Site, tags: Mapping[str, str]) -> Iterator[Leak]:
    for arn in _tagged(clients, "describe_target_groups", "TargetGroups", "TargetGroupArn", tags):
        yield Leak("target group", arn, 0.0)


_Search = Callable[[Clients, Site, Mapping[str, str]], Iterator[Leak]]
_SEARCHES: tuple[_Search, ...] = (
    *(_instances, _balancers, _gateways, _addresses, _volumes),
    *(_targets, _interfaces, _groups, _networks),
)


def _price(clients: Clients, instance_type: str, region: str) -> float | None:
    """A leak must be shown even where its price cannot be."""
    try:
        price = prices.on_demand_price(clients, instance_type, region)
    except AwsError:
        return None
    return None if price is None else price.usd_per_hour


def _delete_balancer(clients: Clients, arn: str) -> None:
    clients("elbv2").delete_load_balancer(LoadBalancerArn=arn)


def _delete_target_group(clients: Clients, arn: str) -> None:
    clients("elbv2").delete_target_group(TargetGroupArn=arn)


def _terminate(clients: Clients, described: str) -> None:
    clients("ec2").terminate_instances(InstanceIds=[described.split(",")[0]])


def _delete_interface(clients: Clients, interface: str) -> None:
    clients("ec2").delete_network_interface(NetworkInterfaceId=interface)


def _delete_volume(clients: Clients, volume: str) -> None:
    clients("ec2").delete_volume(VolumeId=volume)


def _delete_group(clients: Clients, group: str) -> None:
    clients("ec2").delete_security_group(GroupId=group)


_DELETIONS: Mapping[str, Callable[[Clients, str], None]] = {
    "load balancer": _delete_balancer,
    "target group": _delete_target_group,
    "instance": _terminate,
    "network interface": _delete_interface,
    "volume": _delete_volume,
    "security group": _delete_group,
}
"""In this order: each may hold the next."""
_SWEEP_ORDER = {kind: place for place, kind in enumerate(_DELETIONS)}


def _ec2(clients: Clients, operation: str, key: str, tags: Mapping[str, str]) -> list[Any]:
    """What an EC2 Describe call finds, asked once for each tag: the filters of one call must all hold."""
    pages = clients("ec2").get_paginator(operation) if clients("ec2").can_paginate(operation) else None
    found: list[Any] = []
    for name, value in tags.items():
        filters = {"Filters": [{"Name": f"tag:{name}", "Values": [value]}]}
        with explained(f"{operation} of what carries {name}={value}"):
            answers = pages.paginate(**filters) if pages else [getattr(clients("ec2"), operation)(**filters)]
            found += [one for answer in answers for one in answer[key]]
    return found


def _tagged(clients: Clients, operation: str, key: str, arn: str, tags: Mapping[str, str]) -> list[str]:
    """ARNs of load balancers or target groups with one of the tags; they cannot be filtered by tag."""
    elb = clients("elbv2")
    with explained(f"{operation} of what carries the cluster's tags"):
        arns = [one[arn] for page in elb.get_paginator(operation).paginate() for one in page[key]]
        found = []
        for start in range(0, len(arns), _TAGGED_AT_ONCE):
            for one in _described(elb, arns[start : start + _TAGGED_AT_ONCE]):
                if any(tags.get(tag["Key"]) == tag["Value"] for tag in one["Tags"]):
                    found.append(str(one["ResourceArn"]))
    return found


def _described(elb: Any, arns: Sequence[str]) -> list[Any]:
    """Tags of those that are still there. AWS answers for none of them if one has gone since they were listed."""
    from botocore.exceptions import ClientError

    try:
        found: list[Any] = elb.describe_tags(ResourceArns=list(arns))["TagDescriptions"]
    except ClientError as refusal:
        if not error_code(refusal).endswith("NotFound"):
            raise
        return [tags for arn in arns for tags in _described(elb, [arn])] if len(arns) > 1 else []
    return found
