"""Facts of the models the lab knows: what their weights and their KV cache take in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pytest_gpulab.catalog import VARIABLE, with_own
from pytest_gpulab.errors import unknown_name

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only transformer with full attention.

    Sources: the ``config.json`` published with each model. ``parameters`` counts every weight once
    (tied embeddings are not doubled).
    """

    name: str
    repository: str
    """Where its weights are published, as vLLM's ``--model`` takes it."""
    parameters: Count
    layers: Count
    kv_heads: Count
    head_size: Count
    max_position: Count
    """Longest sequence in tokens, vLLM's default ``max_model_len``."""
    hidden_size: Count
    intermediate_size: Count
    vocab_size: Count
    tied_embeddings: bool
    """Whether the output layer is the input embedding."""

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and of the output layer: quantization leaves them in 16 bits."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token keeps in the cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * bytes_per_value


MODELS = {
    model.name: model
    for model in (
        Model(
            name="qwen2.5-0.5b",
            repository="Qwen/Qwen2.5-0.5B-Instruct",
            parameters=494_032_768,
            layers=24,
            kv_heads=2,
            head_size=64,
            max_position=32_768,
            hidden_size=896,
            intermediate_size=4_864,
            vocab_size=151_936,
            tied_embeddings=True,
        ),
        Model(
            name="llama-3.1-8b",
            repository="meta-llama/Llama-3.1-8B-Instruct",
            parameters=8_030_261_248,
            layers=32,
            kv_heads=8,
            head_size=128,
            max_position=131_072,
            hidden_size=4_096,
            intermediate_size=14_336,
            vocab_size=128_256,
            tied_embeddings=False,
        ),
    )
}
"""Those that are shipped."""


def models() -> Mapping[str, Model]:
    """All that are known, by name: shipped, and in the user's catalog. ValueError for a wrong file there."""
    return with_own("models", Model, MODELS)


def find_model(name: str) -> Model:
    """The model called `name`; ValueError lists the known ones."""
    known = models()
    if name not in known:
        raise ValueError(f"{unknown_name('model', name, known)}; --gpulab-catalog or {VARIABLE} adds your own")
    return known[name]
