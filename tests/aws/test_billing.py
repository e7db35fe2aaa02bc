"""What machines cost, and what ends a run: NodeClaims in, USD and refusals out."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulab.aws.billing import BudgetError, Meter, read_machine, usd_per_useful_request
from pytest_gpulab.aws.errors import AwsError
from pytest_gpulab.aws.guard import Guard, make_guard
from pytest_gpulab.aws.ledger import Site
from pytest_gpulab.aws.prices import Price
from pytest_gpulab.aws.supply import Need, Supply
from tests.aws.conftest import make_plan, price_list

START = 1_800_000_000.0


def stamp(at: float) -> str:
    """Kubernetes writes whole seconds in UTC."""
    return datetime.fromtimestamp(START + at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def claim(name: str, launched: float | None, ready: float | None = None, deleted: float | None = None) -> Any:
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": stamp(at)}
        for kind, at in (("Launched", launched), ("Initialized", ready))
        if at is not None
    ]
    labels = {"node.kubernetes.io/instance-type": "g4dn.xlarge", "karpenter.sh/capacity-type": "spot"}
    meta = {"name": name, "uid": f"uid-of-{name}", "labels": labels, "creationTimestamp": stamp(0)}
    if deleted is not None:
        meta["deletionTimestamp"] = stamp(deleted)
    return {"metadata": meta, "status": {"conditions": conditions}}


def meter(budget_usd: float = 100.0, fixed: float = 0.0, price: float = 3.6) -> Meter:
    """At 3.6 USD an hour a second costs 0.001 USD."""
    return Meter(fixed_usd_per_hour=fixed, price_of=lambda *_: price, budget_usd=budget_usd, started=START)


def test_a_machine_is_billed_from_launch_to_its_end():
    one = meter()
    one.observe([claim("a", 100, 300)], START + 400)
    one.observe([claim("a", 100, 300, deleted=1000)], START + 1010)
    one.observe([], START + 1100)
    one.observe([], START + 5000)
    assert one.usd(START + 9000) == pytest.approx(1.000)
    (machine,) = one.machines.values()
    assert machine.stages_s(START + 9000) == {"provisioning": 200.0, "ready": 700.0, "draining": 100.0}


def test_a_machine_is_billed_until_karpenter_has_it_terminated():
    """Its NodeClaim stays until it is gone, which EC2 does not charge for."""
    one = meter()
    ended = claim("a", 100, 300, deleted=1000)
    ended["status"]["conditions"].append(
        {"type": "InstanceTerminating", "status": "True", "lastTransitionTime": stamp(1010)}
    )
    one.observe([claim("a", 100, 300)], START + 900)
    one.observe([ended], START + 1015)
    one.observe([], START + 1100)
    assert one.usd(START + 9000) == pytest.approx(0.910)


def test_a_machine_that_never_launched_costs_nothing():
    one = meter()
    one.observe([claim("a", None)], START + 10)
    assert one.usd(START + 1000) == 0.0


def test_a_machine_that_is_never_ready_costs_all_the_same():
    """A GPU that does not register hangs for ever, and is paid for as long."""
    one = meter()
    one.observe([claim("a", 50)], START + 100)
    assert one.usd(START + 1050) == pytest.approx(1.0)
    assert read_machine(claim("a", 50)).stages_s(START + 1050)["provisioning"] == 1000.0


def test_what_always_runs_counts_from_the_start():
    assert meter(fixed=7.2).usd(START + 500) == pytest.approx(1.0)


def test_the_budget_ends_the_run_when_the_meter_reaches_it():
    one = meter(budget_usd=1.0)
    one.observe([claim("a", 0)], START + 1)
    one.check(START + 999)
    assert one.exhausted_at(START + 400) == pytest.approx(START + 1000)
    with pytest.raises(BudgetError, match=r"cost 1\.00 USD of its budget of 1\.00 USD"):
        one.check(START + 1000)


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000)),
        min_size=1,
        max_size=8,
    ),
    st.lists(st.integers(1, 4000), min_size=1, max_size=12, unique=True).map(sorted),
)
def test_the_meter_never_charges_too_little_nor_beyond_the_next_look(lives, looks):
    """Against the truth: launched at a, gone at a + ready + rest, seen only at the looks."""
    one = meter()
    spans = [(launched, launched + ready + rest) for launched, ready, rest in lives]
    for look in looks:
        seen = [claim(f"n{i}", a) for i, (a, b) in enumerate(spans) if a <= look < b]
        one.observe(seen, START + look)
    last = looks[-1]
    charged = one.usd(START + last) * 1000
    seen_once = [(a, b) for a, b in spans if any(a <= look < b for look in looks)]
    least = sum(min(b, last) - a for a, b in seen_once)
    most = sum(min((look for look in looks if look >= b), default=last) - a for a, b in seen_once)
    assert least - 1e-6 <= charged <= most + 1e-6


def test_cost_per_useful_request():
    assert usd_per_useful_request(0.5, 250) == pytest.approx(0.002)
    assert usd_per_useful_request(0.5, 0) == math.inf


class Switchboard:
    """The scheduler, and a cluster with one machine."""

    def __init__(self) -> None:
        self.moved: list[str] = []

    def __call__(self, service: str) -> Any:
        assert service == "scheduler"
        return self

    def get_schedule(self, Name: str) -> Any:
        return {"Name": Name, "FlexibleTimeWindow": {"Mode": "OFF"}, "Target": {"Arn": "a", "RoleArn": "r"}}

    def update_schedule(self, *, ScheduleExpression: str, **_: Any) -> None:
        self.moved.append(ScheduleExpression)

    def list(self, api_version: str, kind: str, *, labels: str) -> Any:
        assert (api_version, kind) == ("karpenter.sh/v1", "NodeClaim")
        return [claim("a", 0)]


@pytest.mark.parametrize(
    ("ends", "budget", "until"),
    [
        (100_000.0, 1000.0, 100.0 + 3600.0),  # an hour of grace
        (1000.0, 1000.0, 1000.0 + 1800.0),  # the TTL is nearer
        (100_000.0, 1.5, 1500.0 + 1800.0),  # the budget is nearer
        (101.0, 1000.0, 101.0 + 1800.0),  # the next heartbeat ends it: the teardown has half an hour
    ],
)
def test_a_heartbeat_puts_the_switch_off_within_time_and_money_and_what_a_teardown_takes(ends, budget, until):
    world = Switchboard()
    site = Site("lab", "us-west-2", "123456789012", "run-1", adopted=False)
    guard = Guard(world, site, meter(budget), START + ends, now=lambda: START + 100.0)
    guard.heartbeat(world)
    assert world.moved == [f"at({stamp(until).removesuffix('Z')})"]


def test_a_heartbeat_after_the_ttl_ends_the_run():
    world = Switchboard()
    site = Site("lab", "us-west-2", "123456789012", "run-1", adopted=False)
    guard = Guard(world, site, meter(), START + 50, now=lambda: START + 50.0)
    with pytest.raises(BudgetError, match="the time of the run on lab is over"):
        guard.heartbeat(world)
    assert world.moved == []


def test_the_guard_charges_the_plans_prices_and_auto_modes_fee():
    need = Need("g4dn.xlarge", 1)
    supply = Supply(need, 1, ("us-west-2a",), {"spot": Price(0.2, "Spot API", "2026-11-23")}, ())
    plan = replace(make_plan(), supplies=(supply,))
    guard = make_guard({"pricing": price_list({"g4dn.xlarge": 0.5})}.__getitem__, plan, START)
    guard.meter.observe([claim("a", 0)], START + 3600)
    fixed = 0.10 + 0.045 + 0.005 + 0.0225
    assert guard.meter.usd(START + 3600) == pytest.approx(fixed + 0.2 + 0.12 * 0.5)
    assert guard.ends == START + 2 * 3600  # the plan's hours


def test_a_machine_that_is_not_launched_has_no_type_and_no_price_yet():
    guard = make_guard({"pricing": price_list({})}.__getitem__, make_plan(), START)
    waiting = claim("a", None)
    waiting["metadata"]["labels"] = {}
    guard.meter.observe([waiting], START)
    assert guard.meter.usd(START) == 0.0


def test_a_heartbeat_on_an_adopted_cluster_moves_no_switch():
    world = Switchboard()
    site = Site("lab", "us-west-2", "123456789012", "run-1", adopted=True)
    Guard(world, site, meter(), START + 5000, now=lambda: START + 100.0).heartbeat(world)
    assert world.moved == []


def test_a_machine_without_a_price_ends_the_run():
    guard = make_guard({"pricing": price_list({})}.__getitem__, make_plan(), START)
    guard.meter.observe([claim("a", 0)], START + 10)
    with pytest.raises(AwsError, match=r"no price for g4dn\.xlarge"):
        guard.meter.usd(START + 10)
