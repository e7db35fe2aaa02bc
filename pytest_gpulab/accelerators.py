"""Facts of the accelerators the lab knows, and what a machine with one costs."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gpulab.errors import unknown_name


@dataclass(frozen=True)
class Accelerator:
    """One GPU type and the smallest EC2 instance type that carries it."""

    name: str
    memory_bytes: int
    """Total device memory as the driver reports it, bytes."""
    instance_type: str
    families: tuple[str, ...]
    """EC2 instance families that carry it, and nothing else."""
    price_usd_per_hour: float
    """Per hour of one accelerator, on demand in us-west-2 (Linux) unless said otherwise."""


GIB = 1024**3

ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("t4", 15_360 * 1024**2, "g4dn.xlarge", ("g4dn",), 0.526),
        Accelerator("l4", 23_034 * 1024**2, "g6.xlarge", ("g6", "gr6"), 0.8048),
        # One of eight GPUs, as EC2 Capacity Blocks in us-east-2 (price list valid to the end of 2024).
        Accelerator("h100", 81_559 * 1024**2, "p5.48xlarge", ("p5",), 4.916),
        Accelerator("h200", 143_771 * 1024**2, "p5en.48xlarge", ("p5e", "p5en"), 5.408),
        # One of eight GPUs.
        Accelerator("b200", 183_359 * 1024**2, "p6-b200.48xlarge", ("p6-b200",), 113.93 / 8),
    )
}


def find_accelerator(name: str) -> Accelerator:
    """The accelerator called `name`; ValueError lists the known ones."""
    if name not in ACCELERATORS:
        raise ValueError(unknown_name("accelerator", name, ACCELERATORS))
    return ACCELERATORS[name]
