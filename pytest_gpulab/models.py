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
    repository: str
    """Where its weights are published, as vLLM's ``--model`` takes it."""
    parameters: int
    layers: int
    kv_heads: int
    head_size: int
    max_position: int
    """Longest sequence in tokens, vLLM's default ``max_model_len``."""
    hidden_size: int
    intermediate_size: int
    vocab_size: int
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
            "qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, 24, 2, 64, 32_768, 896, 4_864, 151_936, True
        ),
        Model(
            "llama-3.1-8b",
            "meta-llama/Llama-3.1-8B-Instruct",
            8_030_261_248,
            32,
            8,
            128,
            131_072,
            4_096,
            14_336,
            128_256,
            False,
        ),
    )
}


def find_model(name: str) -> Model:
    """The model called `name`; ValueError lists the known ones."""
    if name not in MODELS:
        raise ValueError(unknown_name("model", name, MODELS))
    return MODELS[name]
