"""The target `plan`: asks the simulator instead of the machine, to learn which runs a campaign would make."""

from __future__ import annotations

from pytest_gpulab.run import Basis
from pytest_gpulab.targets.base import MEASURED_REPEATS
from pytest_gpulab.targets.sim import Sim


class Plan(Sim):
    """The simulator with a measured target's repeats."""

    name = "plan"
    basis: Basis = "simulated"
    max_repeats = MEASURED_REPEATS
