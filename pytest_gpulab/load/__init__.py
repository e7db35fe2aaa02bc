"""The load generator: sends a workload to a real server on the clock, and brings back a Run.

The names are loaded on first use: a pod that sends a shard has no more of this package than that takes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpulab.load.generator import LoadInterrupted as LoadInterrupted
    from pytest_gpulab.load.generator import run_load as run_load
    from pytest_gpulab.load.headroom import BeyondHeadroom as BeyondHeadroom
    from pytest_gpulab.load.headroom import Headroom as Headroom
    from pytest_gpulab.load.headroom import NoHeadroom as NoHeadroom
    from pytest_gpulab.load.headroom import measure_headroom as measure_headroom

_HOMES = {
    "BeyondHeadroom": "headroom",
    "Headroom": "headroom",
    "LoadInterrupted": "generator",
    "NoHeadroom": "headroom",
    "measure_headroom": "headroom",
    "run_load": "generator",
}

__all__ = ["BeyondHeadroom", "Headroom", "LoadInterrupted", "NoHeadroom", "measure_headroom", "run_load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
