"""vLLM in virtual time: `simulate` a profile under a workload, `replay_trace` a recorded scheduler trace.

The names are loaded on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_gpulab.engine.replay import replay_trace as replay_trace
    from pytest_gpulab.engine.simulation import simulate as simulate

_HOMES = {"replay_trace": "replay", "simulate": "simulation"}

__all__ = ["replay_trace", "simulate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
