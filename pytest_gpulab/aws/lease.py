"""An EKS cluster for as long as one session needs it: planned, brought up, guarded while it costs, taken down."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from pytest_gpulab import render
from pytest_gpulab.aws import lifecycle
from pytest_gpulab.aws.auth import write_kubeconfig
from pytest_gpulab.aws.billing import Bill, BudgetError
from pytest_gpulab.aws.clients import Clients
from pytest_gpulab.aws.cluster import machines_of, require_usable
from pytest_gpulab.aws.errors import AwsError
from pytest_gpulab.aws.guard import Guard, make_guard
from pytest_gpulab.aws.ledger import ClusterLedger, open_ledger
from pytest_gpulab.aws.preflight import Plan
from pytest_gpulab.aws.supply import Need, find_supply, offering_zones
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.kube.client import Kube, KubeError
from pytest_gpulab.kube.ledger import Ledger
from pytest_gpulab.kube.teardown import tear_down
from pytest_gpulab.render import Machines, Object, PublicAccess

BEAT_S: Final = 60.0
_PATIENCE: Final = 3
"""Heartbeats in a row that may fail: a minute without network is no reason to give a cluster up, and the switch is
an hour away."""


class Lease:
    """One planned cluster with machines of one type. Nothing is made before `start`; `end` must follow it.

    Args:
        tell: takes a line for the user.
        stop: is told, by another thread, why the session must end.
        public: how the internet reaches the load balancer; None: only the cluster's network does.
    """

    def __init__(
        self,
        clients: Clients,
        plan: Plan,
        *,
        tell: Callable[[str], None],
        stop: Callable[[str], None],
        public: PublicAccess | None = None,
    ) -> None:
        (self._supply,) = plan.supplies
        self.plan = plan
        self._clients = clients
        self._tell = tell
        self._stop = stop
        self._public = public
        self._refusals: dict[str, str] = {}
        self._machines: Machines | None = None
        self._ledger: ClusterLedger | None = None
        self._guard: Guard | None = None
        self._kube: Kube | None = None
        """The guard's own connection; used under the lock only, as the guard is."""
        self._lock = threading.Lock()
        self._over = threading.Event()

    def refusal(self, instance_type: str) -> str:
        """Why the session has no machine of the type, in AWS's words where they are AWS's; empty if it has."""
        if instance_type == self._supply.need.instance_type:
            return self._supply.reason or ""
        if instance_type not in self._refusals:
            self._refusals[instance_type] = self._ask(instance_type)
        return self._refusals[instance_type]

    def fleet_refusal(self, fleet: Fleet) -> str:
        """Why the session cannot have the fleet, which may ask for one GPU a replica; empty if it can."""
        bought = self._supply.need.nodes
        most = math.ceil(min(fleet.most_replicas, fleet.max_gpus) / self.gpus_of_one)
        if most > bought:
            return (
                f"the fleet may ask for {most} machines at once, but plan, quota and budget of this session are for "
                f"{bought} of each capacity type: give --gpulab-machines {most}"
            )
        if not set(fleet.capacity) & set(self._supply.prices):
            return f"the fleet is on {' or '.join(fleet.capacity)}: {'; '.join(self._supply.closed)}"
        return ""

    def start(self, run: Ledger) -> Kube:
        """Bring the cluster up for `run`, and guard it from now on.

        Raises:
            FileExistsError: another session has the cluster.
            AwsError, KubeError: it did not come up.
        """
        started = time.time()
        wanted = self.plan.request
        self._tell(f"{'adopting' if wanted.adopt else 'making'} the EKS cluster {wanted.name}")
        self._ledger = open_ledger(lifecycle.site_of(self.plan))
        run.cluster(self._ledger.kubeconfig, 1.0)
        kube = lifecycle.bring_up(self._clients, self.plan, self._ledger)
        cluster = require_usable(self._clients, self.plan.request.name)
        self._machines = machines_of(cluster)
        self._kube = lifecycle.enter(self._clients, cluster, self._ledger)
        self._guard = make_guard(self._clients, self.plan, started)
        threading.Thread(target=self._keep, args=(self._guard, self._kube), daemon=True).start()
        return kube

    def pool_objects(self, run: str) -> Iterator[Object]:
        """What makes the cluster a GPU pool; asked for when it is up, because its network is in it."""
        assert self._machines is not None, "the cluster must be up"
        fleet = Fleet(max_gpus=self._supply.gpus, capacity=tuple(self._supply.prices))
        yield from render.pool_objects(
            fleet, [self._supply.need.instance_type], run=run, machines=self._machines, public=self._public
        )
        if not self.plan.request.adopt:
            yield from render.owned_cluster_objects(run=run)

    def capacity(self, fleet: Fleet | None, run: str) -> list[Object]:
        """The NodeClass and the NodePools that a fleet asks for; None: those of `pool_objects`."""
        assert self._machines is not None, "the cluster must be up"
        fleet = fleet or Fleet(capacity=tuple(self._supply.prices))
        within = fleet.model_copy(update={"max_gpus": min(fleet.max_gpus, self._supply.gpus)})
        return render.gpu_capacity(within, [self._supply.need.instance_type], run=run, machines=self._machines)

    @property
    def gpus_of_one(self) -> int:
        """GPUs of one machine."""
        return max(1, self._supply.gpus // self._supply.need.nodes)

    def price_of(self, instance_type: str, capacity_type: str) -> float:
        """USD an hour of a machine, Auto Mode's fee included, as the budget is counted."""
        assert self._guard is not None, "the cluster must be up"
        return self._guard.meter.price_of(instance_type, capacity_type)

    def bill(self, since: float, until: float) -> Bill:
        """What the GPU machines have cost between two moments (Unix seconds), served or not."""
        assert self._guard is not None and self._kube is not None, "the cluster must be up"
        with self._lock:
            self._guard.observe(self._kube)
            bill = self._guard.meter.bill(self._supply.need.instance_type, since, until)
        return Bill(bill.gpu_seconds * self._supply.gpus / self._supply.need.nodes, bill.usd)

    @property
    def prices(self) -> str:
        """Of the machines, each with its source and date."""
        offers = ", ".join(f"{capacity} {price}" for capacity, price in self._supply.prices.items())
        return f"{self._supply.need.instance_type}: {offers}"

    def end(self, run: Ledger) -> list[str]:
        """Take down what `start` made, all of it; what is left."""
        self._over.set()
        if self._ledger is None:
            return tear_down(run).problems
        self._tell(f"taking down what was made on the EKS cluster {self.plan.request.name}")
        self._rescue(self._ledger)
        lost = self._ledger.loss()
        try:
            removed = lifecycle.tear_down(self._clients, self._ledger, drained=self._see_what_is_left)
        except (AwsError, KubeError) as left:
            site = lifecycle.site_of(self.plan)
            return [*lost, str(left), f"`gpulab reap --cluster {site.name} --region {site.region} --yes` tries again"]
        if self._guard is not None:
            meter = self._guard.meter
            about = f"{'at most' if meter.running else 'about'} {meter.usd(time.time()):.2f} USD"
            self._tell(f"{len(removed)} things are gone; all of it has cost {about}, traffic not counted")
        return lost

    def _rescue(self, ledger: ClusterLedger) -> None:
        """Write again what somebody removed: without the way in, machines in an adopted cluster would stay."""
        ledger.rescue()
        if self._kube is not None and not ledger.kubeconfig.exists():
            wanted = self.plan.request
            with suppress(AwsError):  # what then cannot be drained goes with its cluster, or is named
                write_kubeconfig(require_usable(self._clients, wanted.name), wanted.region, ledger.kubeconfig)

    def _see_what_is_left(self) -> None:
        """Once more: machines that are gone now do not cost what the cluster does until its stack is deleted."""
        if self._guard is None or self._kube is None:
            return
        with self._lock, suppress(AwsError, KubeError):  # what cannot be seen counts until the end
            self._guard.observe(self._kube)

    def _ask(self, instance_type: str) -> str:
        """About a type that the session does not buy."""
        wanted = self.plan.request
        offered = offering_zones(self._clients, instance_type)
        supply = find_supply(
            self._clients,
            Need(instance_type, 1),
            offered,
            region=wanted.region,
            within=self.plan.zones,
            hours=wanted.hours,
        )
        own = self._supply.need.instance_type
        return supply.reason or f"this session buys {own} only: ask for the accelerator of {instance_type} in its own"

    def _keep(self, guard: Guard, kube: Kube) -> None:
        """The heartbeat, until the session is over; a guard that cannot guard ends it."""
        failed = 0
        while not self._over.is_set():
            try:
                with self._lock:
                    guard.heartbeat(kube)
                failed = 0
            except (AwsError, KubeError) as trouble:
                failed += 1
                if failed == _PATIENCE:
                    return self._give_up(f"{failed} heartbeats in a row have failed, the last one so: {trouble}")
            except BudgetError as reason:
                return self._give_up(str(reason))
            except Exception as broken:  # whatever it is, nobody watches the costs any more
                return self._give_up(f"the guard broke: {broken!r}")
            self._over.wait(BEAT_S)
        return None

    def _give_up(self, reason: str) -> None:
        if not self._over.is_set():
            self._stop(reason)
