"""An emulated EC2: what can be bought, what is sold out, and what happens to the machines.

Karpenter's kwok provider is the model: instances are entries in a table. Prices are on demand in us-west-2, spot is a
share of that. Everything that goes wrong is stated up front in `fleet.Faults` or asked for by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from pytest_gpulab.accelerators import MIB, Accelerator, own_accelerators
from pytest_gpulab.cluster.clock import Clock, Timer
from pytest_gpulab.cluster.quantity import Amounts
from pytest_gpulab.errors import unknown_name
from pytest_gpulab.fleet import NO_FAULTS, Faults, Shortage, Zone, no_victim

GIB: Final = 1024**3
GPU: Final = "nvidia.com/gpu"
SPOT_NOTICE_S: Final = 120.0
"""EC2 announces a spot interruption two minutes ahead."""
SHORTEST_BILL_S: Final = 60.0
"""EC2 bills Linux instances by the second, a minute at least."""

CapacityType = Literal["reserved", "spot", "on-demand"]


@dataclass(frozen=True)
class InstanceType:
    """A machine one can order. Memory in bytes."""

    name: str
    cpu: int
    memory: int
    gpus: int
    gpu_name: str
    gpu_memory_mib: int
    price: float
    """USD per hour, on demand."""

    @property
    def capacity(self) -> Amounts:
        """What a node of it has."""
        whole = {"cpu": self.cpu, "memory": self.memory, "pods": 110}
        whole |= {GPU: self.gpus} if self.gpus else {}
        return {name: amount * 1000 for name, amount in whole.items()}

    @property
    def allocatable(self) -> Amounts:
        """What pods may use of it: system and kubelet keep 80m of CPU and about 7 % of memory."""
        kept = {"cpu": 80, "memory": self.memory * 7 // 100 * 1000}
        return {name: amount - kept.get(name, 0) for name, amount in self.capacity.items()}

    def labels(self) -> dict[str, str]:
        """Well-known node labels; Karpenter's and EKS Auto Mode's names for the instance."""
        family = self.name.partition(".")[0]
        labels = {
            "node.kubernetes.io/instance-type": self.name,
            "kubernetes.io/arch": "amd64",
            "kubernetes.io/os": "linux",
        }
        facts = {
            "instance-family": family,
            "instance-category": family[:1],
            "instance-cpu": str(self.cpu),
            "instance-memory": str(self.memory // 1024**2),
            "instance-generation": "".join(letter for letter in family if letter.isdigit())[:1],
        }
        if self.gpus:
            facts |= {
                "instance-gpu-name": self.gpu_name,
                "instance-gpu-manufacturer": "nvidia",
                "instance-gpu-count": str(self.gpus),
                "instance-gpu-memory": str(self.gpu_memory_mib),
            }
        for group in ("karpenter.k8s.aws", "eks.amazonaws.com"):
            labels |= {f"{group}/{name}": value for name, value in facts.items()}
        return labels


INSTANCE_TYPES: Final = (
    InstanceType("g4dn.xlarge", 4, 16 * GIB, 1, "t4", 16384, 0.526),
    InstanceType("g4dn.2xlarge", 8, 32 * GIB, 1, "t4", 16384, 0.752),
    InstanceType("g4dn.12xlarge", 48, 192 * GIB, 4, "t4", 16384, 3.912),
    InstanceType("g6.xlarge", 4, 16 * GIB, 1, "l4", 22888, 0.8048),
    InstanceType("p5.48xlarge", 192, 2048 * GIB, 8, "h100", 81920, 39.328),
    InstanceType("p5en.48xlarge", 192, 2048 * GIB, 8, "h200", 144384, 43.264),
    InstanceType("p6-b200.48xlarge", 192, 2048 * GIB, 8, "b200", 183296, 113.93),
)


def instance_types() -> tuple[InstanceType, ...]:
    """What is sold: INSTANCE_TYPES, and others that accelerators in the user's catalog name."""
    sold = {kind.name: kind for kind in INSTANCE_TYPES}
    for own in own_accelerators().values():
        sold.setdefault(own.instance_type, _machine(own))
    return tuple(sold.values())


def _machine(own: Accelerator) -> InstanceType:
    """One GPU; nobody states its processors and memory, so they are more than a server asks for."""
    memory_mib = own.memory_bytes // MIB
    return InstanceType(own.instance_type, 8, 64 * GIB, 1, own.name, memory_mib, own.price_usd_per_hour)


def machine_for(instance_type: str, accelerator: str) -> InstanceType:
    """The machine that is sold under this name. ValueError when none is, or it carries another accelerator."""
    kinds = {kind.name: kind for kind in instance_types()}
    if instance_type not in kinds:
        raise ValueError(unknown_name("instance type of the emulated cloud", instance_type, kinds))
    kind = kinds[instance_type]
    if kind.gpu_name != accelerator:
        raise ValueError(
            f"the emulated cloud's {instance_type} must carry the profile's accelerator {accelerator}, it carries "
            f"{kind.gpu_name}; give the accelerator an instance type of its own"
        )
    return kind


ZONES: Final[tuple[str, ...]] = get_args(Zone)
SPOT_SHARE: Final = 0.4
"""Spot price as a share of the on-demand price; a round figure, the market's own moves."""


@dataclass(frozen=True)
class Offering:
    """One instance type in one zone, one way to pay."""

    type: InstanceType
    zone: str
    capacity_type: CapacityType
    price: float
    """USD per hour."""
    depth: int = 1
    """How much spare capacity the pool has, relative to others: what price-capacity-optimized looks at first."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What Karpenter remembers as unavailable."""
        return (self.type.name, self.zone, self.capacity_type)

    def labels(self) -> dict[str, str]:
        """Of a node bought this way."""
        return {
            **self.type.labels(),
            "topology.kubernetes.io/zone": self.zone,
            "topology.kubernetes.io/region": self.zone[:-1],
            "karpenter.sh/capacity-type": self.capacity_type,
        }


def catalog(types: Iterable[InstanceType] = INSTANCE_TYPES, zones: Iterable[str] = ZONES) -> tuple[Offering, ...]:
    """Every type in every zone, on demand and as spot."""
    return tuple(
        Offering(kind, zone, capacity, round(kind.price * (SPOT_SHARE if capacity == "spot" else 1.0), 6))
        for kind in types
        for zone in zones
        for capacity in ("spot", "on-demand")
    )


def covers(shortage: Shortage, offering: Offering, at: float) -> bool:
    """Whether EC2 would refuse the offering `at` seconds after the start that faults count from."""
    pairs = zip((shortage.instance_type, shortage.zone, shortage.capacity_type), offering.key, strict=True)
    lasts = shortage.start_s <= at and (shortage.end_s is None or at < shortage.end_s)
    return lasts and all(not wanted or wanted == has for wanted, has in pairs)


class InsufficientCapacity(Exception):
    """EC2 has none of the offerings asked for."""

    def __init__(self, offerings: Iterable[Offering]) -> None:
        self.offerings = tuple(offerings)
        names = ", ".join("/".join(offering.key) for offering in self.offerings)
        super().__init__(f"all requested instance types were unavailable during launch: {names}")


@dataclass
class Instance:
    """One machine and its life, Unix seconds."""

    id: str
    offering: Offering
    launched: float
    stopped: float | None = None
    """When it stops being billed: TerminateInstances, an interruption, or its death."""
    gone: float | None = None
    """When it is terminated."""

    @property
    def provider_id(self) -> str:
        """As in NodeClaims and Nodes."""
        return f"aws:///{self.offering.zone}/{self.id}"

    def billed_s(self, now: float) -> float:
        """Seconds on the bill so far."""
        return max((self.stopped if self.stopped is not None else now) - self.launched, SHORTEST_BILL_S)


Notice = Callable[[Instance], None]


@dataclass
class Cloud:
    """The account: instances by id, and who is told of interruptions and ends."""

    clock: Clock
    offerings: tuple[Offering, ...] = field(default_factory=catalog)
    faults: Faults = NO_FAULTS
    instances: dict[str, Instance] = field(default_factory=dict)
    on_notice: list[Notice] = field(default_factory=list)
    on_end: list[Notice] = field(default_factory=list)
    on_miss: list[Callable[[str], None]] = field(default_factory=list)
    """Told in words of a fault that found no victim."""
    _due: list[Timer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.suffer(self.faults)

    def suffer(self, faults: Faults) -> None:
        """From now on these faults happen, and no others; their times count from now."""
        for timer in self._due:
            timer.cancel()
        self.faults = faults
        self._start = self.clock.now()
        self._due = [self.clock.call_at(self._start + at, self._interrupt_oldest) for at in faults.interruptions]
        self._due += [self.clock.call_at(self._start + at, self._lose_oldest) for at in faults.losses]

    def launch(self, wanted: Iterable[Offering]) -> Instance:
        """An instance of the first offering that has capacity. InsufficientCapacity when none has."""
        wanted = tuple(wanted)
        now = self.clock.now()
        for offering in wanted:
            if not any(covers(shortage, offering, now - self._start) for shortage in self.faults.shortages):
                instance = Instance(f"i-{len(self.instances) + 1:017x}", offering, now)
                self.instances[instance.id] = instance
                return instance
        raise InsufficientCapacity(wanted)

    def find(self, provider_id: str) -> Instance | None:
        """The instance that a NodeClaim or Node names."""
        return self.instances.get(provider_id.rpartition("/")[2])

    def running(self, provider_id: str) -> bool:
        """Whether the machine works."""
        instance = self.find(provider_id)
        return instance is not None and instance.stopped is None

    def terminate(self, instance: Instance, takes_s: float) -> None:
        """TerminateInstances: billed no longer, gone after `takes_s`. Harmless when repeated."""
        if instance.stopped is not None:
            return
        instance.stopped = self.clock.now()
        self.clock.call_later(takes_s, lambda: self._gone(instance))

    def interrupt(self, instance: Instance) -> None:
        """The spot interruption notice; two minutes later the machine is taken."""
        for listener in self.on_notice:
            listener(instance)
        self.clock.call_later(SPOT_NOTICE_S, lambda: self.lose(instance))

    def lose(self, instance: Instance) -> None:
        """The machine is gone, at once."""
        if instance.gone is None:
            instance.stopped = self.clock.now() if instance.stopped is None else instance.stopped
            self._gone(instance)

    def _gone(self, instance: Instance) -> None:
        if instance.gone is None:
            instance.gone = self.clock.now()
            for listener in self.on_end:
                listener(instance)

    def miss(self, fault: str, victim: str) -> None:
        """A fault is due now, and there is no such `victim`."""
        text = no_victim(fault, self.clock.now() - self._start, victim)
        for listener in self.on_miss:
            listener(text)

    def _interrupt_oldest(self) -> None:
        spot = [one for one in self._running_gpus() if one.offering.capacity_type == "spot"]
        if spot:
            self.interrupt(spot[0])
        else:
            self.miss("interruption", "running spot instance")

    def _lose_oldest(self) -> None:
        running = self._running_gpus()
        if running:
            self.lose(running[0])
        else:
            self.miss("loss", "running instance")

    def _running_gpus(self) -> list[Instance]:
        """Oldest first. Faults are those of a fleet: what else a cluster runs on stays."""
        return [one for one in self.instances.values() if one.stopped is None and one.offering.type.gpus > 0]

    def gpu_seconds(self) -> float:
        """Billed seconds times GPUs of all instances."""
        now = self.clock.now()
        return sum(i.billed_s(now) * i.offering.type.gpus for i in self.instances.values())

    def cost_usd(self) -> float:
        """The bill for the instances so far."""
        now = self.clock.now()
        return sum(i.billed_s(now) / 3600 * i.offering.price for i in self.instances.values())
