"""Targets: where a workload runs on a profile."""

from __future__ import annotations

from typing import Protocol

from pytest_gpulab.errors import unknown_name
from pytest_gpulab.experiment import Profile, Workload
from pytest_gpulab.gates import TargetRefused
from pytest_gpulab.run import Basis, Run


class Target(Protocol):
    """Turns a workload, a profile and a seed into a Run."""

    @property
    def name(self) -> str: ...

    @property
    def basis(self) -> Basis: ...

    @property
    def max_repeats(self) -> int:
        """The most repeats a gate may pull: a look of the rule."""

    @property
    def repeatable(self) -> bool:
        """Whether an equal schedule gives an equal Run, so that a repeat with the same arrivals tells nothing."""

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """One execution. TargetRefused when this target cannot serve `profile`."""


class Sim:
    """The engine in virtual time."""

    name = "sim"
    basis: Basis = "simulated"
    max_repeats = 24
    repeatable = True

    def run(self, workload: Workload, profile: Profile, seed: int) -> Run:
        """Simulate; refused without a calibration."""
        from pytest_gpulab.engine import simulate
        from pytest_gpulab.engine.calibration import find_variant

        try:
            find_variant(profile)
        except ValueError as refusal:
            raise TargetRefused(str(refusal)) from None
        return simulate(profile, workload, seed=seed)


_TARGETS = {"sim": Sim}


def target_names() -> list[str]:
    """The targets that exist, sorted."""
    return sorted(_TARGETS)


def find_target(name: str) -> Target:
    """The target called `name`; ValueError lists the known ones."""
    if name not in _TARGETS:
        raise ValueError(unknown_name("target", name, _TARGETS))
    return _TARGETS[name]()
