"""What preflight finds out before anything costs: offers, quotas, prices, and what stands against a plan."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatch
from typing import Any

import pytest
from botocore.exceptions import ClientError

from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError
from pytest_gpulab.aws.lifecycle import make_cluster
from pytest_gpulab.aws.preflight import Request, choose_zones, preflight
from pytest_gpulab.aws.supply import Need
from tests.aws.conftest import ACCOUNT, REGION, Stub, price_list, spot_history

ZONES = [f"{REGION}{letter}" for letter in "abcd"]
PRICES = {
    "c6a.large": 0.0765,
    "g4dn.xlarge": 0.526,
    "p4d.24xlarge": 21.96,
    "p5.4xlarge": 6.88,
    "p6-b200.48xlarge": 114.0,
}
SIZES = {"g4dn.xlarge": (4, 1), "p4d.24xlarge": (96, 8), "p5.4xlarge": (16, 1), "p6-b200.48xlarge": (192, 8)}


class World:
    """An account as preflight sees it; tests change it."""

    def __init__(self) -> None:
        self.account = ACCOUNT
        self.zones = {zone: f"usw2-az{number}" for number, zone in enumerate(ZONES, 1)}
        self.offered = {"g4dn.xlarge": ZONES[1:], "p5.4xlarge": ZONES[:1]}
        self.quotas = {"L-DB2E81BA": 8.0, "L-3819A6DF": 8.0, "L-417A185B": 0.0}
        self.quotas |= {"L-7212CCBC": 0.0, "L-C4BD4855": 0.0}
        self.spot = {"g4dn.xlarge": {ZONES[1]: 0.21, ZONES[2]: 0.25, f"{REGION}z": 9.0}}
        self.running: list[dict[str, str]] = []
        self.blocks: Callable[..., Any] = lambda **_: {"CapacityBlockOfferings": []}

    def __call__(self, service: str) -> Stub:
        return getattr(self, service.replace("-", "_"))()

    def sts(self) -> Stub:
        arn = f"arn:aws:sts::{self.account}:assumed-role/researcher/me"
        return Stub(get_caller_identity=lambda: {"Account": self.account, "Arn": arn})

    def iam(self) -> Stub:
        arn = f"arn:aws:iam::{self.account}:role/team/researcher"
        return Stub(get_role=lambda RoleName: {"Role": {"Arn": arn}} if RoleName == "researcher" else {})

    def eks(self) -> Stub:
        def describe_cluster(name: str) -> Any:
            raise refusal("ResourceNotFoundException", f"No cluster found for name: {name}.")

        return Stub(describe_cluster=describe_cluster)

    def service_quotas(self) -> Stub:
        return Stub(get_service_quota=lambda ServiceCode, QuotaCode: {"Quota": {"Value": self.quotas[QuotaCode]}})

    def pricing(self) -> Stub:
        return price_list(PRICES)

    def ec2(self) -> Stub:
        def offerings(LocationType: str, Filters: Any) -> Any:
            kind = Filters[0]["Values"][0]
            return {"InstanceTypeOfferings": [{"Location": zone} for zone in self.offered.get(kind, [])]}

        def types(InstanceTypes: list[str]) -> Any:
            vcpus, gpus = SIZES[InstanceTypes[0]]
            size = {"VCpuInfo": {"DefaultVCpus": vcpus}, "GpuInfo": {"Gpus": [{"Count": gpus}]}}
            return {"InstanceTypes": [size]}

        def running(Filters: list[dict[str, Any]]) -> Any:
            wanted = {one["Name"]: one["Values"] for one in Filters}
            assert "running" in wanted["instance-state-name"] and "stopped" not in wanted["instance-state-name"]
            kinds = [
                one for one in self.running if any(fnmatch(one["InstanceType"], w) for w in wanted["instance-type"])
            ]
            return [{"Reservations": [{"Instances": [one]}]} for one in kinds]  # a page each

        return Stub(
            get_paginator=lambda operation: Stub(paginate={"describe_instances": running}[operation]),
            describe_availability_zones=lambda **_: {
                "AvailabilityZones": [{"ZoneName": zone, "ZoneId": ids} for zone, ids in self.zones.items()]
            },
            describe_instance_type_offerings=offerings,
            describe_instance_types=types,
            describe_spot_price_history=lambda InstanceTypes, **_: spot_history(self.spot.get(InstanceTypes[0], {})),
            describe_capacity_block_offerings=lambda **asked: self.blocks(**asked),
        )


def refusal(code: str, message: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": message}}, "Operation")


def request(*needs: Need, **changes: Any) -> Request:
    values = {
        "name": "lab",
        "run": "run-1",
        "region": REGION,
        "needs": needs,
        "hours": 2.0,
        "budget_usd": 20.0,
        "allowed_accounts": frozenset({ACCOUNT}),
        "client_cidrs": ("203.0.113.7/32",),
    }
    return Request(**{**values, **changes})


@pytest.fixture
def world() -> World:
    return World()


def test_the_plan_adds_up(world):
    plan = preflight(world, request(Need("g4dn.xlarge", 2)))
    fixed = 0.10 + 0.045 + 0.005 + 0.0225 + 2 * 0.0765 * 1.12
    gpus = 2 * (0.25 + 0.526) + 2 * 2 * 0.526 * 0.12  # two on spot and two on demand: each has a limit of its own
    assert plan.usd_per_hour == pytest.approx(fixed + gpus)
    assert plan.campaign_usd == pytest.approx(2 * (fixed + gpus))
    assert plan.identity.principal_arn == f"arn:aws:iam::{ACCOUNT}:role/team/researcher"
    shown = str(plan)
    assert "2 x g4dn.xlarge of each: " in shown
    assert f"create lab in {REGION}, account {ACCOUNT}" in shown
    assert "on-demand 0.526 USD/h (Pricing API, 2026-11-20)" in shown
    # Of the zones that sell the machine, and not the dearest of all.
    assert f"spot 0.25 USD/h (Spot API, {ZONES[2]}, 2026-11-23)" in shown


def test_zones_with_the_machine_come_first(world):
    assert preflight(world, request(Need("g4dn.xlarge", 1))).zones == tuple(ZONES[1:])


def test_a_machine_that_is_only_where_the_others_are_not_is_blocked(world):
    world.offered = {"g4dn.xlarge": ZONES[1:], "p5.4xlarge": ZONES[:1]}
    plan = preflight(world, request(Need("g4dn.xlarge", 1), Need("g4dn.xlarge", 1), Need("p5.4xlarge", 1)))
    assert plan.blocked["p5.4xlarge"].startswith(f"p5.4xlarge: EC2 offers it in {ZONES[0]}, but the cluster is in")


def test_zones_without_eks_are_left_out(world):
    world.offered = {"g4dn.xlarge": ZONES}
    world.zones[ZONES[0]] = "use1-az3"
    assert preflight(world, request(Need("g4dn.xlarge", 1))).zones == tuple(ZONES[1:])


def test_zones_serve_most_instance_types():
    assert choose_zones([["b", "c"], ["c", "d"]], ["a", "b", "c", "d"]) == ("b", "c", "d")
    with pytest.raises(AwsError, match="must have 3 zones"):
        choose_zones([], ["a", "b"])


def test_a_closed_way_of_buying_is_not_priced(world):
    world.quotas["L-DB2E81BA"] = 0.0
    plan = preflight(world, request(Need("g4dn.xlarge", 2)))
    (supply,) = plan.supplies
    assert supply.gpus == 2
    assert list(supply.prices) == ["spot"]
    assert plan.blocked == {}
    assert "'Running On-Demand G and VT instances' (L-DB2E81BA) is 0 vCPUs, but 2 machines need 8" in supply.closed[0]


def test_what_runs_already_counts_against_the_quota(world):
    """8 vCPUs each way; on demand 4 of them are taken by a G machine, and spot by nobody whose quota it is."""
    world.running = [
        {"InstanceType": "g4dn.xlarge"},
        {"InstanceType": "p5.4xlarge"},
        {"InstanceType": "p5.4xlarge", "InstanceLifecycle": "spot"},
    ]
    (one,) = preflight(world, request(Need("g4dn.xlarge", 1))).supplies
    assert set(one.prices) == {"spot", "on-demand"}
    (two,) = preflight(world, request(Need("g4dn.xlarge", 2))).supplies
    assert set(two.prices) == {"spot"}
    assert "(L-DB2E81BA) is 8 vCPUs, 4 of them in use, but 2 machines need 8" in two.closed[0]
    world.running += [{"InstanceType": "g4dn.xlarge", "InstanceLifecycle": "spot"}] * 2
    (none,) = preflight(world, request(Need("g4dn.xlarge", 2))).supplies
    assert "(L-3819A6DF) is 8 vCPUs, 8 of them in use" in none.reason


def test_a_capacity_block_of_somebody_counts_against_no_quota(world):
    world.quotas["L-417A185B"] = 16.0
    world.offered = {"p5.4xlarge": ZONES}
    world.running = [{"InstanceType": "p5.4xlarge", "InstanceLifecycle": "capacity-block"}]
    (supply,) = preflight(world, request(Need("p5.4xlarge", 1, ("on-demand",)))).supplies
    assert supply.reason is None


@pytest.mark.parametrize(
    ("machine", "quota"),
    [
        ("p4d.24xlarge", "'All P4, P3 and P2 Spot Instance Requests' (L-7212CCBC)"),
        ("p5.4xlarge", "'All P5 Spot Instance Requests' (L-C4BD4855)"),
    ],
)
def test_p5_has_a_spot_quota_of_its_own(world, machine, quota):
    world.offered = {machine: ZONES}
    world.spot = {machine: dict.fromkeys(ZONES, 2.5)}
    vcpus = SIZES[machine][0]
    code = quota[-11:-1]
    enough = dict.fromkeys(world.quotas, 1000.0)
    world.quotas = {**enough, code: vcpus - 1.0}
    short = preflight(world, request(Need(machine, 1, ("spot",)), budget_usd=100.0)).blocked[machine]
    assert f"the quota {quota} is {vcpus - 1} vCPUs, but 1 machine needs {vcpus}: ask for more" in short
    world.quotas = {**dict.fromkeys(enough, 0.0), code: float(vcpus)}
    others = {"p4d.24xlarge", "p5.4xlarge"} - {machine}
    world.running = [{"InstanceType": other, "InstanceLifecycle": "spot"} for other in others]
    assert preflight(world, request(Need(machine, 1, ("spot",)), budget_usd=100.0)).blocked == {}
    world.running.append({"InstanceType": machine, "InstanceLifecycle": "spot"})
    taken = preflight(world, request(Need(machine, 1, ("spot",)), budget_usd=100.0)).blocked[machine]
    assert f"{quota} is {vcpus} vCPUs, {vcpus} of them in use" in taken


def test_p6_is_not_bought_on_spot_whose_quota_is_not_known(world):
    world.quotas = dict.fromkeys(world.quotas, 1000.0)
    world.offered = {"p6-b200.48xlarge": ZONES}
    (supply,) = preflight(world, request(Need("p6-b200.48xlarge", 1), budget_usd=1000.0)).supplies
    assert list(supply.prices) == ["on-demand"]
    assert supply.closed == ("which quota its spot machines count against is not known, so none is bought",)


def test_what_is_not_offered_is_blocked_and_the_rest_goes_on(world):
    plan = preflight(world, request(Need("g4dn.xlarge", 1), Need("p6-b200.48xlarge", 1)))
    assert plan.blocked == {
        "p6-b200.48xlarge": f"p6-b200.48xlarge: EC2 offers it in no zone of {REGION}",
    }
    assert not any("p6" in what for what, _ in plan.items)


def test_p_machines_without_quota_name_the_capacity_block(world):
    world.blocks = lambda **asked: {
        "CapacityBlockOfferings": [
            {
                "CapacityBlockDurationHours": asked["CapacityDurationHours"],
                "StartDate": datetime(2026, 12, 1, 11, 30, tzinfo=UTC),
                "AvailabilityZone": ZONES[0],
                "UpfrontFee": "132.50",
            }
        ]
    }
    wanted = request(Need("p5.4xlarge", 1), hours=24.5, budget_usd=100.0)
    reason = preflight(world, wanted).blocked["p5.4xlarge"]
    assert "'Running On-Demand P instances' (L-417A185B) is 0 vCPUs, but 1 machine needs 16" in reason
    assert f"Capacity Block (48 h from 2026-12-01 in {ZONES[0]} for 132 USD" in reason


def test_aws_says_why_there_is_no_capacity_block(world):
    def refuse(**_: Any) -> Any:
        raise refusal("InvalidParameterValue", "The instance type is not supported for Capacity Blocks")

    world.blocks = refuse
    reason = preflight(world, request(Need("p5.4xlarge", 1))).blocked["p5.4xlarge"]
    assert "AWS said The instance type is not supported for Capacity Blocks" in reason


def test_the_budget_is_held_against_the_campaign(world):
    with pytest.raises(AwsError, match=r"may cost .* USD \(.*for 100 h\), more than the budget of 20\.00 USD"):
        preflight(world, request(Need("g4dn.xlarge", 1), hours=100.0))


def test_another_account_is_refused_before_anything_is_asked(world):
    world.account = "999999999999"
    world.offered = None  # any further question would fail
    with pytest.raises(AwsError, match=f"in the account 999999999999, which is not one of those allowed: {ACCOUNT}"):
        preflight(world, request(Need("g4dn.xlarge", 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Lab_1"}, "name must match"),
        ({"name": "x" * 31}, "name must match"),
        ({"budget_usd": 0.0}, "must be above 0"),
        ({"hours": float("nan")}, "must be above 0"),
        ({"client_cidrs": ()}, "no open default"),
    ],
)
def test_what_is_no_request(world, changes, message):
    with pytest.raises(ValueError, match=message):
        preflight(world, request(**changes))


def test_access_denied_names_what_was_asked(world, monkeypatch):
    def refuse(**_: Any) -> Any:
        raise refusal("AccessDeniedException", "no identity-based policy allows servicequotas:GetServiceQuota")

    monkeypatch.setattr(World, "service_quotas", lambda _: Stub(get_service_quota=refuse))
    with pytest.raises(AwsError, match=r"quota 'All G and VT Spot.*servicequotas:GetServiceQuota.*docs/eks\.md"):
        preflight(world, request(Need("g4dn.xlarge", 1)))


class Mixed:
    """moto's account, with stubs for what moto has not: quotas, the price list and spot prices."""

    def __init__(self, clients: Clients, world: World) -> None:
        self._clients, self._world = clients, world

    def __call__(self, service: str) -> Any:
        if service in ("service-quotas", "pricing"):
            return self._world(service)
        return Spotted(self._clients("ec2"), self._world) if service == "ec2" else self._clients(service)


class Spotted:
    """An EC2 client with spot prices."""

    def __init__(self, ec2: Any, world: World) -> None:
        self._ec2, self._world = ec2, world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.ec2() if name == "describe_spot_price_history" else self._ec2, name)


def test_create_and_adopt_against_moto(clients, clock, world):
    mixed = Mixed(clients, world)
    plan = preflight(mixed, request(Need("g4dn.xlarge", 1)))
    assert plan.identity.account == ACCOUNT
    assert len(plan.zones) == 3
    assert (plan.supplies[0].gpus, plan.blocked) == (1, {})

    make_cluster(clients, plan, clock)
    with pytest.raises(AwsError, match="adopt it with --gpulab-cluster lab"):
        preflight(mixed, request(Need("g4dn.xlarge", 1)))
    adopted = preflight(mixed, request(Need("g4dn.xlarge", 1), adopt=True, client_cidrs=()))
    assert adopted.zones == plan.zones
    # Somebody else pays for the control plane and the NAT gateway of an adopted cluster.
    assert [what.split(":")[0] for what, _ in adopted.items] == [
        "load balancer",
        "1 x g4dn.xlarge of each",
        "Auto Mode's fee for them, 12% of on-demand",
    ]
