"""The target `plan`: asks the simulator instead of the machine, to learn which runs a campaign would make."""

from __future__ import annotations

from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Basis, Run
from pytest_gpulab.targets.base import MEASURED_REPEATS
from pytest_gpulab.targets.sim import Sim


class Plan(Sim):
    """The simulator with a measured target's repeats, and without the fleets that one server is not."""

    name = "plan"
    basis: Basis = "simulated"
    max_repeats = MEASURED_REPEATS

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Simulate; refused without a calibration, and for a fleet."""
        if profile.fleet is not None:
            raise TargetRefused("one server is planned for, not a fleet")
        return super().run(workload, profile, seed)
