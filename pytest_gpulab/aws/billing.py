"""What machines have cost, from their NodeClaims: from launch to the end of the drain, used or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

NodeClaim = Mapping[str, Any]
PriceOf = Callable[[str, str], float]
"""USD an hour of an instance type and a capacity type (``spot``, ``on-demand``), Auto Mode's fee included."""

_TYPE = "node.kubernetes.io/instance-type"
_CAPACITY = "karpenter.sh/capacity-type"


class BudgetError(RuntimeError):
    """The money or the time of a run is over: it must end."""


@dataclass(frozen=True)
class Machine:
    """One NodeClaim's machine; times in Unix seconds, None for what has not happened.

    It is billed from `launched` to `gone`: provisioning up to `ready`, then serving or idle, then `draining` on.
    It is `gone` when Karpenter has had EC2 terminate it, or its NodeClaim is not there any more.
    """

    name: str
    instance_type: str
    capacity_type: str
    launched: float | None
    ready: float | None
    draining: float | None
    gone: float | None = None

    def billed_s(self, now: float) -> float:
        """Seconds that cost money, until `now` at most."""
        if self.launched is None:
            return 0.0
        return max(0.0, (now if self.gone is None else min(self.gone, now)) - self.launched)

    def stages_s(self, now: float) -> dict[str, float]:
        """The billed seconds by stage: provisioning, ready, draining."""
        if self.launched is None:
            return {"provisioning": 0.0, "ready": 0.0, "draining": 0.0}
        end = self.launched + self.billed_s(now)
        drain = min(end, self.draining if self.draining is not None else end)
        ready = min(drain, self.ready if self.ready is not None else drain)
        return {"provisioning": ready - self.launched, "ready": drain - ready, "draining": end - drain}


class Bill(NamedTuple):
    """What machines have cost in a while."""

    gpu_seconds: float
    """Of their GPUs, busy or not."""
    usd: float


class Meter:
    """Price times time since `started` (Unix seconds), held against a budget.

    A NodeClaim that is not seen any more counts until the observation that missed it: never too little.
    """

    def __init__(self, *, fixed_usd_per_hour: float, price_of: PriceOf, budget_usd: float, started: float) -> None:
        self._fixed = fixed_usd_per_hour
        self.price_of = price_of
        self._started = started
        self.budget_usd = budget_usd
        self.machines: dict[str, Machine] = {}

    def observe(self, claims: Iterable[NodeClaim], now: float) -> None:
        """Take note of the NodeClaims that exist at `now`."""
        seen = {str(claim["metadata"]["uid"]): read_machine(claim) for claim in claims}
        for uid, machine in self.machines.items():
            if uid not in seen:
                seen[uid] = machine if machine.gone is not None else _ended(machine, now)
        self.machines = seen

    def usd(self, now: float) -> float:
        """What the run has cost until `now`."""
        launched = (machine for machine in self.machines.values() if machine.launched is not None)
        machines = sum(self._rate(machine) * machine.billed_s(now) for machine in launched)
        return (self._fixed * (now - self._started) + machines) / 3600

    def bill(self, instance_type: str, since: float, until: float) -> Bill:
        """What machines of a type, with one GPU each, have cost between two moments."""
        own = [one for one in self.machines.values() if one.instance_type == instance_type]
        billed = [(one, one.billed_s(until) - one.billed_s(since)) for one in own]
        usd = sum(self._rate(machine) * seconds for machine, seconds in billed if seconds) / 3600
        return Bill(sum(seconds for _, seconds in billed), usd)

    @property
    def running(self) -> list[Machine]:
        """Machines that cost money when they were last seen."""
        return [one for one in self.machines.values() if one.launched is not None and one.gone is None]

    def exhausted_at(self, now: float) -> float:
        """When the budget is over if what runs now goes on, Unix seconds."""
        left = self.budget_usd - self.usd(now)
        rate = self._fixed + sum(map(self._rate, self.running))
        return now + 3600 * left / rate if rate > 0 else math.inf

    def check(self, now: float) -> None:
        """BudgetError when the budget is spent."""
        if (spent := self.usd(now)) >= self.budget_usd:
            raise BudgetError(
                f"the run has cost {spent:.2f} USD of its budget of {self.budget_usd:.2f} USD: it ends here"
            )

    def _rate(self, machine: Machine) -> float:
        return self.price_of(machine.instance_type, machine.capacity_type)


def read_machine(claim: NodeClaim) -> Machine:
    """A NodeClaim's machine, as far as it has come."""
    meta = claim["metadata"]
    labels = meta.get("labels") or {}
    conditions = {one["type"]: one for one in (claim.get("status") or {}).get("conditions") or ()}

    def since(kind: str) -> float | None:
        found = conditions.get(kind)
        return _seconds(found["lastTransitionTime"]) if found and found["status"] == "True" else None

    ended = meta.get("deletionTimestamp")
    return Machine(
        name=meta["name"],
        instance_type=labels.get(_TYPE, ""),
        capacity_type=labels.get(_CAPACITY, ""),
        launched=since("Launched"),
        ready=since("Initialized"),
        draining=_seconds(ended) if ended else None,
        gone=since("InstanceTerminating"),
    )


def usd_per_useful_request(usd: float, useful: int) -> float:
    """Infinite where nothing useful came of it."""
    return usd / useful if useful else math.inf


def _ended(machine: Machine, now: float) -> Machine:
    """A launched one whose drain nobody saw begin is taken to have drained from now."""
    return Machine(**{**vars(machine), "gone": now, "draining": machine.draining if machine.draining else now})


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
