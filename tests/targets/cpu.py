"""A CPU as an accelerator and a model of two layers: what real vLLM serves in tests, and no measurement of a GPU.

The client's headroom is not asked for: it shares two cores with the server, and nothing here is about speed.
"""

from __future__ import annotations

from pytest_gpulab.accelerators import ACCELERATORS, GIB, Accelerator
from pytest_gpulab.models import MODELS, Model
from pytest_gpulab.targets.loading import Loading

CPU = Accelerator(
    name="cpu",
    memory_bytes=8 * GIB,
    bytes_per_s=20e9,
    operations_per_s=1e12,
    instance_type="c7i.large",
    price_usd_per_hour=0.1,
)
TINY = Model(
    name="tiny",
    repository="nobody/tiny",
    parameters=9_000_000,
    layers=2,
    kv_heads=2,
    head_size=64,
    max_position=2048,
    hidden_size=256,
    intermediate_size=512,
    vocab_size=32_768,
    tied_embeddings=True,
)


def register() -> None:
    """Make both known for the rest of this process, and let the client load what it cannot measure well."""
    Loading.headroom = None  # type: ignore[assignment,method-assign]
    ACCELERATORS[CPU.name] = CPU
    MODELS[TINY.name] = TINY
