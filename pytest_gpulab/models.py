"""Facts of the models the lab knows: what their weights and their KV cache take in memory."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gpulab.errors import unknown_name


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer with full attention.

    Sources: the ``config.json`` published with each model. ``parameters`` counts every weight once
    (tied embeddings are not doubled).
    """

    name: str
    parameters: int
    layers: int
    kv_heads: int
    head_size: int
    max_position: int
    """Longest sequence in tokens, vLLM's default ``max_model_len``."""

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token keeps in the cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * bytes_per_value


MODELS = {
    model.name: model
    for model in (
        Model("qwen2.5-0.5b", 494_032_768, 24, 2, 64, 32_768),
        Model("llama-3.1-8b", 8_030_261_248, 32, 8, 128, 131_072),
    )
}


def find_model(name: str) -> Model:
    """The model called `name`; ValueError lists the known ones."""
    if name not in MODELS:
        raise ValueError(unknown_name("model", name, MODELS))
    return MODELS[name]
