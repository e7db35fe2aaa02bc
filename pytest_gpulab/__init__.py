"""pytest-gpulab: turn LLM serving measurements into architecture decisions.

Importing this package is cheap: names are loaded when they are first used, because the pytest plugin is imported in
every pytest session of the environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpulab.evidence import any_of, caveat, requires
    from pytest_gpulab.experiment import (
        BoundedQueue,
        ClosedLoop,
        Constant,
        Direct,
        EngineArgs,
        Gamma,
        Lengths,
        Mix,
        Poisson,
        Profile,
        Ramp,
        Shape,
        SpikeToZero,
        Workload,
    )
    from pytest_gpulab.fleet import Autoscaling, Faults, Fleet, Shortage
    from pytest_gpulab.gates import blocked
    from pytest_gpulab.knee import find_knee

_HOME = {
    "pytest_gpulab.evidence": ("any_of", "caveat", "requires"),
    "pytest_gpulab.experiment": (
        "BoundedQueue",
        "ClosedLoop",
        "Constant",
        "Direct",
        "EngineArgs",
        "Gamma",
        "Lengths",
        "Mix",
        "Poisson",
        "Profile",
        "Ramp",
        "Shape",
        "SpikeToZero",
        "Workload",
    ),
    "pytest_gpulab.fleet": ("Autoscaling", "Faults", "Fleet", "Shortage"),
    "pytest_gpulab.gates": ("blocked",),
    "pytest_gpulab.knee": ("find_knee",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Autoscaling",
    "BoundedQueue",
    "ClosedLoop",
    "Constant",
    "Direct",
    "EngineArgs",
    "Faults",
    "Fleet",
    "Gamma",
    "Lengths",
    "Mix",
    "Poisson",
    "Profile",
    "Ramp",
    "Shape",
    "Shortage",
    "SpikeToZero",
    "Workload",
    "any_of",
    "blocked",
    "caveat",
    "find_knee",
    "requires",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
