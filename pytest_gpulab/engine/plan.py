"""A run that is about to be simulated: everything a driver needs, resolved and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pytest_gpulab.engine.calibration import Variant
from pytest_gpulab.engine.scheduler import SchedulerConfig
from pytest_gpulab.experiment import Workload


@dataclass(frozen=True)
class Plan:
    """`schedule` holds SCHEDULE_DTYPE rows (see `pytest_gpulab.arrivals`)."""

    workload: Workload
    schedule: NDArray[Any]
    config: SchedulerConfig
    variant: Variant
    eager: bool = False

    def scheduled(self) -> list[float]:
        """When each request is due, seconds; NaN where an earlier answer decides it. A fresh list."""
        times: list[float] = self.schedule["scheduled"].tolist()
        return times
