"""What a lease refuses, what it bills, and when it gives up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest

from pytest_gpulab import ClosedLoop, Profile, Shape, Workload
from pytest_gpulab.aws import lease as lease_module
from pytest_gpulab.aws import lifecycle
from pytest_gpulab.aws.billing import Bill, BudgetError
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.errors import AwsError
from pytest_gpulab.aws.guard import Guard
from pytest_gpulab.aws.lease import Lease
from pytest_gpulab.aws.ledger import ClusterLedger, open_ledger
from pytest_gpulab.aws.preflight import preflight
from pytest_gpulab.aws.supply import Need
from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.figures import cost_usd, gpu_seconds
from pytest_gpulab.fleet import FROM_ZERO, Autoscaling, Faults, Fleet, Shortage
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.kube.client import KubeError
from pytest_gpulab.render import Machines
from pytest_gpulab.run import REQUEST_DTYPE, SERVER_DTYPE, Provenance, Run
from pytest_gpulab.targets.base import Served, Serving
from pytest_gpulab.targets.eks import EksTarget
from tests.aws.test_billing import START, claim, meter
from tests.aws.test_preflight import World, request

PRICE = {"gpu-spot": 0.25, "gpu-on-demand": 0.526}
"""USD an hour of a g4dn.xlarge."""
T4 = Profile(model="qwen2.5-0.5b", accelerator="t4")
FEW = Workload(arrivals=ClosedLoop(concurrency=1), shape=Shape(prompt_tokens=8, output_tokens=8), requests=4)


def made(
    need: str = "g4dn.xlarge",
    stop: Callable[[str], None] = print,
    machines: int = 1,
    tell: Callable[[str], None] = print,
) -> Lease:
    world = World()
    return Lease(world, preflight(world, request(Need(need, machines))), tell=tell, stop=stop)


def nothing_deployed(*_: object) -> NoReturn:
    raise AssertionError("nothing must be deployed")


def test_machines_that_are_not_the_sessions_are_refused_with_the_reason():
    one = made()
    assert one.refusal("g4dn.xlarge") == ""
    assert "EC2 offers it in us-west-2a, but the cluster is in us-west-2b" in one.refusal("p5.4xlarge")
    assert one.refusal("p6-b200.48xlarge").endswith("EC2 offers it in no zone of us-west-2")


def test_a_machine_that_cannot_be_had_is_refused_in_awss_words():
    assert "Running On-Demand P instances" in made("p5.4xlarge").refusal("p5.4xlarge")


def test_a_bill_is_what_machines_cost_between_two_moments():
    """At 3.6 USD an hour a second costs 0.001 USD."""
    one = meter()
    one.observe([claim("a", 100, 300), claim("b", 900)], START + 1000)
    one.observe([claim("b", 900)], START + 1100)
    assert one.bill("g4dn.xlarge", START, START + 1000) == pytest.approx((1000.0, 1.0))
    assert one.bill("g4dn.xlarge", START + 1000, START + 1200) == pytest.approx((300.0, 0.3))
    assert one.bill("g6.xlarge", START, START + 1000) == (0.0, 0.0)


class Heart:
    """A guard whose heartbeats go as told, and that then beats for ever."""

    def __init__(self, *beats: Exception | None) -> None:
        self.left = list(beats)
        self.done = threading.Event()

    def heartbeat(self, kube: Any) -> None:
        if not self.left:
            self.done.set()
            return
        beat = self.left.pop(0)
        if beat is not None:
            raise beat


NO = AwsError("no network")


@pytest.mark.parametrize(
    ("beats", "reason"),
    [
        ((NO, NO, NO), "3 heartbeats in a row have failed, the last one so: no network"),
        ((None, BudgetError("enough")), "enough"),
        ((KeyError("a bug"),), "the guard broke: KeyError('a bug')"),
    ],
)
def test_a_guard_that_cannot_guard_ends_the_session(beats: Any, reason: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease_module, "BEAT_S", 0.0)
    reasons: list[str] = []
    made(stop=reasons.append)._keep(Heart(*beats), None)
    assert reasons == [reason]


def test_a_heartbeat_may_fail_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease_module, "BEAT_S", 0.0)
    reasons: list[str] = []
    one, heart = made(stop=reasons.append), Heart(NO, NO, None, NO, NO, None)
    thread = threading.Thread(target=one._keep, args=(heart, None))
    thread.start()
    assert heart.done.wait(10)
    one._over.set()
    thread.join(10)
    assert reasons == [] and not thread.is_alive()


@pytest.mark.parametrize(
    ("answers", "cost"),
    [
        (True, "about 0.72 USD"),
        (False, "at most 2.22 USD"),  # until the stack is deleted
    ],
)
def test_machines_that_are_gone_cost_nothing_while_the_stack_is_deleted(
    clients: Clients, monkeypatch: pytest.MonkeyPatch, answers: bool, cost: str
) -> None:
    """Launched at 400 s, drained at 1120 s; the stack is gone at 2620 s. A second costs 0.001 USD."""
    now = START + 1000.0
    claims = [claim("a", 400)]

    def listed(*_: Any, **__: Any) -> list[Any]:
        if not claims and not answers:
            raise KubeError("no answer")
        return claims

    def drain(_: ClusterLedger) -> tuple[list[str], list[str]]:
        nonlocal now
        claims.clear()
        now += 120
        return ["NodePool gpu-spot"], []

    def remove(*_: Any) -> list[str]:
        nonlocal now
        now += 1500
        return ["stack lab"]

    monkeypatch.setattr(lifecycle, "_drain", drain)
    monkeypatch.setattr(lifecycle, "remove_cluster", remove)
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(time=lambda: now))
    told: list[str] = []
    one = made(tell=told.append)
    site = lifecycle.site_of(one.plan)
    one._ledger, one._kube = open_ledger(site), SimpleNamespace(list=listed)
    one._guard = Guard(clients, site, meter(), ends=now, now=lambda: now)
    one._guard.observe(one._kube)
    assert one.end(one._ledger) == []
    assert told[-1] == f"2 things are gone; all of it has cost {cost}, traffic not counted"


def empty_run(*_: Any, **__: Any) -> Run:
    provenance = Provenance("eks", "measured", 0, "hash", "vllm")
    return Run(np.zeros(0, REQUEST_DTYPE), np.zeros(0, SERVER_DTYPE), {}, 10.0, provenance, ((1.0, "first"),))


def test_a_run_costs_what_the_machines_cost_from_the_moment_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    moments: list[tuple[float, float]] = []

    def bill(since: float, until: float) -> Bill:
        moments.append((since, until))
        return Bill(720.0, 0.12)

    asked = iter([1000.0, 1600.0, 1610.0])
    monkeypatch.setattr("pytest_gpulab.targets.eks.time", SimpleNamespace(time=lambda: next(asked)))
    served = Served(Endpoint("http://lb", "m"), bill, "spot 0.6 USD/h (2026-11-24)")
    target = target_on(Serving(lambda _: served, nothing_deployed), tmp_path)
    monkeypatch.setattr(target, "_loading", SimpleNamespace(headroom=None, run=empty_run))
    run = target.run(FEW, T4, 0)
    assert moments == [(1000.0, 1610.0)]
    assert (gpu_seconds(run), cost_usd(run, 99.0)) == (720.0, 0.12)
    assert run.timeline == (
        (-600.0, "asked for; served after 600 s"),
        (0.0, "prices: spot 0.6 USD/h (2026-11-24)"),
        (1.0, "first"),
    )


def target_on(serving: Serving, folder: Path, load_from: str = "client") -> EksTarget:
    return EksTarget(serving, "us-west-2", "g4dn.xlarge", folder, print, load_from)


def test_only_the_sessions_machine_serves(tmp_path: Path):
    target = target_on(Serving(nothing_deployed, nothing_deployed), tmp_path)
    assert target.server(T4) == "vllm 0.25.1 on g4dn.xlarge, EKS in us-west-2, loaded from the client machine"
    assert target.server(Profile(model="llama-3.1-8b", accelerator="h200")) == ""
    assert target.server(T4.model_copy(update={"instance_type": "g4dn.2xlarge"})) == ""


def test_a_fleet_is_loaded_from_the_client_machine(tmp_path: Path):
    target = target_on(Serving(nothing_deployed, nothing_deployed), tmp_path, "cluster")
    assert target.server(T4.on(FROM_ZERO)) == ""
    with pytest.raises(TargetRefused, match="leave out --gpulab-load-from=cluster"):
        target.run(FEW, T4.on(FROM_ZERO), 0)


@pytest.mark.parametrize(
    ("faults", "names"),
    [
        (Faults(shortages=(Shortage(capacity_type="spot"),)), "shortages"),
        (Faults(losses=(5.0,), interruptions=(6.0,), pod_deletions=(7.0,)), "interruptions, losses"),
        (Faults(never_register=True), "never_register"),
    ],
)
def test_what_cannot_be_made_to_happen_on_eks_is_refused(faults: Faults, names: str, tmp_path: Path):
    target = target_on(Serving(nothing_deployed, nothing_deployed), tmp_path)
    harmed = T4.on(Fleet(faults=faults))
    assert target.server(harmed) == ""
    with pytest.raises(TargetRefused, match=f"^{names} cannot be made to happen on EKS"):
        target.run(FEW, harmed, 0)
    deleted = T4.on(Fleet(faults=Faults(pod_deletions=(7.0,))))
    assert target.server(deleted) == target.server(T4) != ""


def test_a_cold_start_on_eks_is_what_it_is(tmp_path: Path):
    target = target_on(Serving(nothing_deployed, nothing_deployed), tmp_path)
    lazy = T4.on(Fleet(stages="g4dn-soci"))
    assert target.server(lazy) == ""
    with pytest.raises(TargetRefused, match="stages=g4dn-soci cannot be had on EKS"):
        target.run(FEW, lazy, 0)


def test_a_fleet_has_as_many_machines_as_plan_and_budget_are_for():
    two = made(machines=2)
    assert two.fleet_refusal(Fleet(autoscaling=None, replicas=2)) == ""
    assert two.fleet_refusal(Fleet(autoscaling=Autoscaling(max_replicas=8), max_gpus=2)) == "", "the pool ends it"
    assert two.fleet_refusal(FROM_ZERO) == (
        "the fleet may ask for 4 machines at once, but plan, quota and budget of this session are for 2 of each "
        "capacity type: give --gpulab-machines 4"
    )


def test_the_plan_pays_for_all_that_the_pools_may_buy():
    """Each capacity type has a NodePool, and each NodePool a limit: both may be reached at once."""
    two = made(machines=2)
    two._machines = Machines("role", ("subnet-1",), ("sg-1",))
    pools = [obj for obj in two.capacity(FROM_ZERO, "run-1") if obj["kind"] == "NodePool"]
    most = {pool["metadata"]["name"]: int(pool["spec"]["limits"]["nvidia.com/gpu"]) for pool in pools}
    assert most == {"gpu-spot": 2, "gpu-on-demand": 2}
    (planned,) = (usd for what, usd in two.plan.items if "g4dn.xlarge" in what)
    assert planned == pytest.approx(sum(number * PRICE[name] for name, number in most.items()))


def test_a_fleet_beyond_the_quota_is_refused_in_awss_words():
    assert "is 8 vCPUs, but 3 machines need 12" in made(machines=3).fleet_refusal(Fleet(autoscaling=None, replicas=3))
