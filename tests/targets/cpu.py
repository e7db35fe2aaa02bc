"""A CPU as an accelerator and a model of two layers: what real vLLM serves in tests, and no measurement of a GPU.

The client's headroom is not asked for: it shares two cores with the server, and nothing here is about speed.
"""

from __future__ import annotations

from pytest_gpulab.accelerators import ACCELERATORS, GIB, Accelerator
from pytest_gpulab.models import MODELS, Model
from pytest_gpulab.targets.loading import Loading

CPU = Accelerator("cpu", 8 * GIB, "c7i.large", ("c7i",), 0.1)
TINY = Model("tiny", "nobody/tiny", 9_000_000, 2, 2, 64, 2048, 256, 512, 32_768, True)


def register() -> None:
    """Make both known for the rest of this process, and let the client load what it cannot measure well."""
    Loading.headroom = None  # type: ignore[assignment,method-assign]
    ACCELERATORS[CPU.name] = CPU
    MODELS[TINY.name] = TINY
