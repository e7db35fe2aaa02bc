"""The target `sim`: the engine in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Basis, Run

if TYPE_CHECKING:
    from pytest_gpulab.options import Options
    from pytest_gpulab.targets.base import Serving


class Sim:
    """The engine in virtual time, alone or as the replicas of a fleet."""

    name = "sim"
    basis: Basis = "simulated"
    max_repeats = 24
    repeatable = True

    @classmethod
    def from_options(cls, options: Options, tell: Callable[[str], None], serving: Serving) -> Self:
        return cls()

    def server(self, profile: Profile) -> str:
        """Virtual time: nothing serves."""
        return ""

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Simulate; refused without a calibration, where no engine would start, and where a fleet cannot follow."""
        from pytest_gpulab.engine import simulate
        from pytest_gpulab.engine.calibration import find_variant
        from pytest_gpulab.engine.scheduler import EngineRefused

        try:
            find_variant(profile)
        except ValueError as refusal:
            raise TargetRefused(str(refusal)) from None
        if profile.fleet is None:
            try:
                return simulate(profile, workload, seed=seed)
            except EngineRefused as refusal:
                raise TargetRefused(str(refusal)) from None
        from pytest_gpulab.cluster.fleet import FleetRefused, simulate_fleet

        try:
            return simulate_fleet(profile, workload, seed=seed)
        except FleetRefused as refusal:
            raise TargetRefused(str(refusal)) from None

    def close(self) -> None:
        """Nothing runs."""
