"""Karpenter's rules as pure functions: when a batch of pods closes, what is bought for it, from which offering, and
which nodes go again.

Facts from sigs.k8s.io/karpenter v1 (pkg/controllers/provisioning, pkg/controllers/disruption) and
karpenter-provider-aws v1 (pkg/providers/instance). Times are seconds of the cluster's clock.

Not modelled: topology spread and pod affinity (a GPU node holds few pods), replacement by a cheaper node, and budgets
with a schedule (the API refuses them).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pytest_gpulab.cluster.cloud import CapacityType, Offering
from pytest_gpulab.cluster.placement import holds, pod_requirements, untolerated
from pytest_gpulab.cluster.quantity import Amounts, amounts, duration, fits, plus

BATCH_IDLE_S: Final = 1.0
BATCH_MAX_S: Final = 10.0
UNAVAILABLE_S: Final = 180.0
"""How long an offering that had no capacity, or was interrupted, is not asked for again."""
LAUNCH_TIMEOUT_S: Final = 300.0
REGISTRATION_TIMEOUT_S: Final = 900.0
DISRUPTION_POLL_S: Final = 10.0
VALIDATION_S: Final = 15.0
"""consolidationTTL: a decision is executed when it still holds this much later."""
GARBAGE_POLL_S: Final = 120.0

NODE_POOL_LABEL: Final = "karpenter.sh/nodepool"
REGISTERED_LABEL: Final = "karpenter.sh/registered"
INITIALIZED_LABEL: Final = "karpenter.sh/initialized"
DO_NOT_DISRUPT: Final = "karpenter.sh/do-not-disrupt"
TERMINATION: Final = "karpenter.sh/termination"
UNREGISTERED_TAINT: Final = {"key": "karpenter.sh/unregistered", "effect": "NoExecute"}
DISRUPTED_TAINT: Final = {"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}

CAPACITY_ORDER: Final[tuple[CapacityType, ...]] = ("reserved", "spot", "on-demand")


# --- batching ---------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """A window that closes 1 s after the last pod, 10 s after the first."""

    opened: float | None = None
    last: float = 0.0

    def trigger(self, now: float) -> None:
        """A pod is waiting."""
        if self.opened is None:
            self.opened = now
        self.last = now

    @property
    def closes(self) -> float:
        """When the window closes; infinity while it is not open."""
        return math.inf if self.opened is None else min(self.last + BATCH_IDLE_S, self.opened + BATCH_MAX_S)

    def close(self) -> None:
        """The batch is taken; the next pod opens another."""
        self.opened = None


# --- pools and offerings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """A NodePool's spec."""

    name: str
    weight: int = 0
    requirements: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, Any], ...] = ()
    startup_taints: tuple[Mapping[str, Any], ...] = ()
    limits: Amounts | None = None
    consolidate_after: float | None = 0.0
    """None: never."""
    policy: str = "WhenEmptyOrUnderutilized"
    budgets: tuple[Mapping[str, Any], ...] = ({"nodes": "10%"},)

    @classmethod
    def of(cls, obj: Mapping[str, Any]) -> Pool:
        """From a NodePool object."""
        spec, template = obj["spec"], obj["spec"]["template"]
        disruption = spec.get("disruption") or {}
        inner = template["spec"]
        limits = spec.get("limits")
        return cls(
            name=obj["metadata"]["name"],
            weight=spec.get("weight", 0),
            requirements=tuple(inner.get("requirements") or ()),
            labels=(template.get("metadata") or {}).get("labels") or {},
            taints=tuple(inner.get("taints") or ()),
            startup_taints=tuple(inner.get("startupTaints") or ()),
            limits=amounts(limits) if limits else None,
            consolidate_after=duration(disruption.get("consolidateAfter", "0s")),
            policy=disruption.get("consolidationPolicy", "WhenEmptyOrUnderutilized"),
            budgets=tuple(disruption.get("budgets") or ({"nodes": "10%"},)),
        )

    def node_labels(self, offering: Offering) -> dict[str, str]:
        """Of a node this pool buys."""
        return {**offering.labels(), **self.labels, NODE_POOL_LABEL: self.name}

    def allows(self, offering: Offering) -> bool:
        """Whether the pool's requirements hold for nodes of this offering."""
        labels = self.node_labels(offering)
        return all(holds(requirement, labels) for requirement in self.requirements)


def by_weight(pools: Iterable[Pool]) -> list[Pool]:
    """Heaviest first, then by name."""
    return sorted(pools, key=lambda pool: (-pool.weight, pool.name))


@dataclass
class Unavailable:
    """Offerings that EC2 had no capacity for, or has taken back, and until when they are not asked for again."""

    until: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def block(self, offerings: Iterable[Offering], now: float) -> None:
        """EC2 has too little of each."""
        self.until |= {offering.key: now + UNAVAILABLE_S for offering in offerings}

    def allows(self, offering: Offering, now: float) -> bool:
        """Whether it may be asked for."""
        return now >= self.until.get(offering.key, -math.inf)


def launch_order(options: Iterable[Offering]) -> list[Offering]:
    """What CreateFleet is asked for, in its order of preference: one capacity type only.

    Reserved before spot before on-demand. Spot is price-capacity-optimized: the deepest pools, the cheapest of them
    first. The others are lowest price.
    """
    options = list(options)
    for capacity in CAPACITY_ORDER:
        chosen = [offering for offering in options if offering.capacity_type == capacity]
        if chosen and capacity == "spot":
            deepest = max(offering.depth for offering in chosen)
            chosen = [offering for offering in chosen if offering.depth == deepest]
        if chosen:
            return sorted(chosen, key=lambda offering: (offering.price, offering.key))
    return []


# --- what to buy ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WaitingPod:
    """An unschedulable pod."""

    uid: str
    spec: Mapping[str, Any]
    requests: Amounts
    created: str = ""


@dataclass
class Room:
    """A node that exists or is on its way, and what is free on it."""

    name: str
    labels: Mapping[str, str]
    taints: Sequence[Mapping[str, Any]]
    free: Amounts

    def takes(self, pod: WaitingPod) -> bool:
        """Whether the pod could run there."""
        return (
            fits(pod.requests, self.free)
            and untolerated(pod.spec, self.taints) is None
            and _labels_fit(pod.spec, self.labels)
        )


@dataclass
class NewClaim:
    """A NodeClaim to be created: any of `options` carries all its pods."""

    pool: Pool
    options: list[Offering]
    requests: Amounts = field(default_factory=dict)
    pods: list[str] = field(default_factory=list)

    def add(self, pod: WaitingPod) -> bool:
        """Put the pod on it if an option is left that carries it too."""
        if untolerated(pod.spec, self.pool.taints) is not None:
            return False
        wanted = plus(self.requests, pod.requests)
        left = suitable(self.pool, self.options, pod.spec, wanted)
        if not left:
            return False
        self.options, self.requests = left, wanted
        self.pods.append(pod.uid)
        return True

    @property
    def largest(self) -> Amounts:
        """The most of each resource that any option would bring: what a limit has to bear."""
        names = {name for offering in self.options for name in offering.type.capacity}
        return {name: max(o.type.capacity[name] for o in self.options if name in o.type.capacity) for name in names}


@dataclass
class Plan:
    """What a batch comes to: claims to create, pods that fit what is there, and why others fit nowhere."""

    claims: list[NewClaim] = field(default_factory=list)
    nominated: dict[str, str] = field(default_factory=dict)
    """Pod uid to Room name."""
    errors: dict[str, str] = field(default_factory=dict)
    """Pod uid to why nothing can be bought for it."""


def _labels_fit(spec: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return any(all(holds(item, labels) for item in terms) for terms in pod_requirements(spec))


def suitable(pool: Pool, offerings: Iterable[Offering], spec: Mapping[str, Any], requests: Amounts) -> list[Offering]:
    """Offerings of the pool whose nodes carry a pod of this spec, and these requests in all."""
    return [
        offering
        for offering in offerings
        if fits(requests, offering.type.allocatable) and _labels_fit(spec, pool.node_labels(offering))
    ]


def plan(
    pods: Iterable[WaitingPod],
    rooms: Sequence[Room],
    pools: Iterable[Pool],
    offerings: Iterable[Offering],
    used: Mapping[str, Amounts],
) -> Plan:
    """Place every pod: on what is there, on what this plan buys already, else on a new claim of the heaviest pool.

    Args:
        rooms: their `free` is reduced as pods are placed.
        offerings: what may be asked for now.
        used: capacity that each pool has bought, by its name.
    """
    result = Plan()
    offerings = list(offerings)
    ordered = by_weight(pools)
    remaining = {pool.name: _left(pool, used.get(pool.name, {})) for pool in ordered}
    for pod in sorted(pods, key=_largest_first):
        room = next((room for room in rooms if room.takes(pod)), None)
        if room is not None:
            room.free = plus(room.free, pod.requests, -1)
            result.nominated[pod.uid] = room.name
        elif not any(claim.add(pod) for claim in sorted(result.claims, key=lambda claim: len(claim.pods))):
            _buy(pod, ordered, offerings, remaining, result)
    return result


def _largest_first(pod: WaitingPod) -> tuple[Any, ...]:
    return (-pod.requests.get("cpu", 0), -pod.requests.get("memory", 0), pod.created, pod.uid)


def _buy(
    pod: WaitingPod,
    pools: Iterable[Pool],
    offerings: list[Offering],
    remaining: dict[str, Amounts | None],
    result: Plan,
) -> None:
    why = []
    for pool in pools:
        left = remaining[pool.name]
        taint = untolerated(pod.spec, pool.taints)
        if taint is not None:
            why.append(f'nodepool "{pool.name}": did not tolerate taint {taint["key"]}')
            continue
        fitting = suitable(pool, [o for o in offerings if pool.allows(o)], pod.spec, pod.requests)
        if not fitting:
            why.append(f'nodepool "{pool.name}": no instance type met the requirements and is available')
            continue
        options = [offering for offering in fitting if _within(offering.type.capacity, left)]
        if not options:
            why.append(f'nodepool "{pool.name}": all available instance types exceed limits for nodepool')
            continue
        claim = NewClaim(pool, options)
        claim.add(pod)
        result.claims.append(claim)
        if left is not None:
            # Whichever type EC2 gives, the limit holds: the largest is taken off.
            remaining[pool.name] = {name: left[name] - claim.largest.get(name, 0) for name in left}
        return
    result.errors[pod.uid] = "; ".join(why) or "no nodepools found"


def _left(pool: Pool, used: Amounts) -> Amounts | None:
    """What the pool may still buy of each resource that it limits."""
    if pool.limits is None:
        return None
    return {name: limit - used.get(name, 0) for name, limit in pool.limits.items()}


def _within(capacity: Amounts, left: Amounts | None) -> bool:
    return left is None or all(capacity.get(name, 0) <= amount for name, amount in left.items())


# --- what goes again ----------------------------------------------------------------------------------------


def must_not_be_disrupted(obj: Mapping[str, Any]) -> bool:
    """Whether a Node, a NodeClaim or a pod is annotated so."""
    return (obj["metadata"].get("annotations") or {}).get(DO_NOT_DISRUPT) == "true"


def consolidatable_at(
    initialized: float | None, last_pod_event: float | None, consolidate_after: float | None
) -> float:
    """When a node may be consolidated; infinity: not as things are.

    Counted from the last pod event (a pod was scheduled, ended or is being deleted), else from initialization.
    """
    if initialized is None or consolidate_after is None:
        return math.inf
    return (initialized if last_pod_event is None else last_pod_event) + consolidate_after


def allowed_disruptions(budgets: Iterable[Mapping[str, Any]], nodes: int, disrupting: int, reason: str) -> int:
    """How many more nodes of a pool may be disrupted: the strictest budget that is for the reason, or for any."""
    limits = [
        _limit(str(budget.get("nodes", "10%")), nodes)
        for budget in budgets
        if reason in (budget.get("reasons") or (reason,))
    ]
    return max(0, min(limits, default=nodes) - disrupting)


def _limit(budget: str, nodes: int) -> int:
    """Percentages are rounded up."""
    return math.ceil(nodes * int(budget[:-1]) / 100) if budget.endswith("%") else int(budget)
