"""The load generator: sends a workload to a real server on the clock, and brings back a Run."""

from __future__ import annotations

from pytest_gpulab.load.generator import LoadInterrupted, run_load
from pytest_gpulab.load.headroom import BeyondHeadroom, Headroom, measure_headroom

__all__ = ["BeyondHeadroom", "Headroom", "LoadInterrupted", "measure_headroom", "run_load"]
