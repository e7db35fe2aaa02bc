"""What one engine step costs: a calibration's coefficients applied to a batch."""

from __future__ import annotations

from typing import NamedTuple

from pytest_gpulab.engine.calibration import Variant
from pytest_gpulab.engine.scheduler import Batch


class Load(NamedTuple):
    """What a step computes, in the order of `StepCost.gpu`.

    One sequence decodes when it adds a single token behind its prompt, else it prefills. A decoding sequence reads
    its whole context, the new token included. `attended_tokens` is the sum over prefills of
    chunk * (start + chunk / 2).
    """

    decodes: int
    context_tokens: int
    prefills: int
    prefill_tokens: int
    attended_tokens: float


def load_of(batch: Batch) -> Load:
    """The load of a scheduled batch."""
    decodes = context = prefills = tokens = 0
    attended = 0.0
    for request, start, chunk in batch.chunks:
        if chunk == 1 and start >= request.prompt_tokens:
            decodes += 1
            context += start + 1
        else:
            prefills += 1
            tokens += chunk
            attended += chunk * (start + chunk / 2)
    return Load(decodes, context, prefills, tokens, attended)


class StepCost:
    """Seconds of GPU and CPU for a step.

    Steps with prefill and more than `graph_tokens` in all run without CUDA graphs and pay the larger launch cost.
    `eager`: no CUDA graphs, so that every step launches its kernels.
    """

    __slots__ = (
        "_eager",
        "_graph_tokens",
        "_launch_large",
        "_launch_small",
        "_per_attended",
        "_per_context",
        "_per_context_mixed",
        "_per_decode",
        "_per_prefill",
        "_per_sequence",
        "_per_token",
        "_prepare",
        "_step",
    )

    def __init__(self, variant: Variant, graph_tokens: int, eager: bool = False) -> None:
        gpu, cpu = variant.gpu, variant.cpu
        self._step = gpu.step_s
        self._per_token = gpu.per_token_s
        self._per_decode = gpu.per_decode_s
        self._per_context = gpu.per_context_token_s
        self._per_context_mixed = gpu.per_context_token_mixed_s
        self._per_attended = gpu.per_attended_token_s
        self._prepare = cpu.step_s
        self._per_sequence = cpu.per_sequence_s
        self._per_prefill = cpu.per_prefill_s
        self._launch_small = cpu.launch_small_s
        self._launch_large = cpu.launch_large_s
        self._graph_tokens = graph_tokens
        self._eager = eager

    def gpu(
        self, decodes: int, context_tokens: int, prefills: int, prefill_tokens: int, attended_tokens: float
    ) -> float:
        """Seconds on the GPU for the load of a step."""
        if prefills == 0:
            return self.decode(decodes, context_tokens)
        return (
            max(self._step, self._per_token * (decodes + prefill_tokens))
            + self._per_decode * decodes
            + self._per_context_mixed * context_tokens
            + self._per_attended * attended_tokens
        )

    def decode(self, decodes: int, context_tokens: int) -> float:
        """Seconds on the GPU for a step without prefill."""
        return (
            max(self._step, self._per_token * decodes)
            + self._per_decode * decodes
            + self._per_context * context_tokens
        )

    def decode_growth(self, decodes: int) -> float:
        """How many seconds longer the next decode step takes, because each sequence is a token longer then."""
        return self._per_context * decodes

    def prepare(self, decodes: int, prefills: int) -> float:
        """Seconds on the CPU before the GPU can start a step of that many sequences."""
        return self._prepare + self._per_sequence * decodes + self._per_prefill * prefills

    def launch(self, decodes: int, prefill_tokens: int) -> float:
        """Seconds on the CPU while the GPU already runs; the step cannot end before."""
        if prefill_tokens == 0 and not self._eager:
            return 0.0
        return self._launch_large if decodes + prefill_tokens > self._graph_tokens else self._launch_small
