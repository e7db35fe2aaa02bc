"""Plans of the simulated engine with costs that a test states itself."""

from __future__ import annotations

from pytest_gpulab.arrivals import schedule
from pytest_gpulab.engine.calibration import CpuCost, FrontEndCost, GpuCost, Variant
from pytest_gpulab.engine.plan import Plan
from pytest_gpulab.engine.scheduler import SchedulerConfig
from pytest_gpulab.experiment import Workload


def variant(**costs: float) -> Variant:
    """Costs by name, all others 0: those of `GpuCost`, and with ``cpu_`` or ``front_`` before it of the others."""

    def named(model: type, prefix: str) -> dict[str, float]:
        return {name: costs.pop(prefix + name, 0.0) for name in model.model_fields}  # type: ignore[attr-defined]

    cpu, front_end = named(CpuCost, "cpu_"), named(FrontEndCost, "front_")
    gpu = named(GpuCost, "")
    assert not costs, f"unknown costs: {costs}"
    return Variant(
        gpu=GpuCost(**gpu), cpu=CpuCost(**cpu), front_end=FrontEndCost(**front_end), relative_error=0.0, runs=1
    )


def config(**settings: object) -> SchedulerConfig:
    """A scheduler with room for everything, unless `settings` say otherwise."""
    defaults = {
        "num_blocks": 100_000,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "max_model_len": 4096,
    }
    return SchedulerConfig(**{**defaults, **settings})  # type: ignore[arg-type]


def plan(workload: Workload, costs: Variant, seed: int = 0, eager: bool = False, **settings: object) -> Plan:
    """A plan of `workload` with these costs and scheduler settings."""
    return Plan(workload, schedule(workload, seed), config(**settings), costs, eager)
