"""Facts of the accelerators the lab knows, and what a machine with one costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Lt, MinLen

from pytest_gpulab.catalog import VARIABLE, own_facts, with_own
from pytest_gpulab.errors import unknown_name

Amount = Annotated[float, Gt(0), Lt(math.inf)]


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU type and the smallest EC2 instance type that carries it."""

    name: str
    memory_bytes: Annotated[int, Ge(1)]
    """Total device memory as the driver reports it, bytes."""
    bytes_per_s: Amount
    """Memory bandwidth by the data sheet."""
    operations_per_s: Amount
    """Dense 16-bit operations by the data sheet."""
    instance_type: Annotated[str, MinLen(1)]
    other_families: tuple[str, ...] = ()
    """EC2 instance families that carry it and nothing else, beside that of its instance type."""
    price_usd_per_hour: Amount
    """Per hour of one accelerator, on demand in us-west-2 (Linux) unless said otherwise."""

    @property
    def families(self) -> tuple[str, ...]:
        """EC2 instance families that carry it, and nothing else."""
        return (self.instance_type.partition(".")[0], *self.other_families)


MIB = 1024**2
GIB = 1024**3

ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            name="t4",
            memory_bytes=15_360 * MIB,
            bytes_per_s=320e9,
            operations_per_s=65e12,
            instance_type="g4dn.xlarge",
            price_usd_per_hour=0.526,
        ),
        Accelerator(
            name="l4",
            memory_bytes=23_034 * MIB,
            bytes_per_s=300e9,
            operations_per_s=121e12,
            instance_type="g6.xlarge",
            other_families=("gr6",),
            price_usd_per_hour=0.8048,
        ),
        # One of eight GPUs, as EC2 Capacity Blocks in us-east-2 (price list valid to the end of 2024).
        Accelerator(
            name="h100",
            memory_bytes=81_559 * MIB,
            bytes_per_s=3.35e12,
            operations_per_s=989e12,
            instance_type="p5.48xlarge",
            price_usd_per_hour=4.916,
        ),
        Accelerator(
            name="h200",
            memory_bytes=143_771 * MIB,
            bytes_per_s=4.8e12,
            operations_per_s=989e12,
            instance_type="p5en.48xlarge",
            other_families=("p5e",),
            price_usd_per_hour=5.408,
        ),
        # One of eight GPUs.
        Accelerator(
            name="b200",
            memory_bytes=183_359 * MIB,
            bytes_per_s=8e12,
            operations_per_s=2.25e15,
            instance_type="p6-b200.48xlarge",
            price_usd_per_hour=113.93 / 8,
        ),
    )
}
"""Those that are shipped."""


def accelerators() -> Mapping[str, Accelerator]:
    """All that are known, by name: shipped, and in the user's catalog. ValueError for a wrong file there."""
    return with_own("accelerators", Accelerator, ACCELERATORS)


def own_accelerators() -> Mapping[str, Accelerator]:
    """Those in the user's catalog, by name. ValueError for a wrong file there."""
    return own_facts("accelerators", Accelerator)


def find_accelerator(name: str) -> Accelerator:
    """The accelerator called `name`; ValueError lists the known ones."""
    known = accelerators()
    if name not in known:
        raise ValueError(f"{unknown_name('accelerator', name, known)}; --gpulab-catalog or {VARIABLE} adds your own")
    return known[name]
