"""What one engine step costs: a calibration's coefficients applied to a batch."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gpulab.engine.calibration import Variant
from pytest_gpulab.engine.scheduler import Batch

GRAPH_TOKENS = 512
"""Steps with prefill and more tokens in all than this run without CUDA graphs and pay the larger launch cost
(vLLM's largest captured size)."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a step computes. One sequence decodes when it adds a single token behind its prompt, else it prefills.

    A decoding sequence reads its whole context, the new token included.
    """

    decodes: int
    context_tokens: int
    prefills: int
    prefill_tokens: int
    attended_tokens: float

    @classmethod
    def of(cls, batch: Batch) -> Load:
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
        return cls(decodes, context, prefills, tokens, attended)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of GPU and CPU for a step. `eager`: no CUDA graphs, so that every step launches its kernels."""

    variant: Variant
    eager: bool = False

    def gpu(self, load: Load) -> float:
        """Seconds on the GPU."""
        gpu = self.variant.gpu
        per_context = gpu.per_context_token_mixed_s if load.prefills else gpu.per_context_token_s
        return (
            max(gpu.step_s, gpu.per_token_s * (load.decodes + load.prefill_tokens))
            + gpu.per_decode_s * load.decodes
            + per_context * load.context_tokens
            + gpu.per_attended_token_s * load.attended_tokens
        )

    def prepare(self, load: Load) -> float:
        """Seconds on the CPU before the GPU can start."""
        cpu = self.variant.cpu
        return cpu.step_s + cpu.per_sequence_s * load.decodes + cpu.per_prefill_s * load.prefills

    def launch(self, load: Load) -> float:
        """Seconds on the CPU while the GPU already runs; the step cannot end before."""
        cpu = self.variant.cpu
        if not load.prefills and not self.eager:
            return 0.0
        return cpu.launch_large_s if load.decodes + load.prefill_tokens > GRAPH_TOKENS else cpu.launch_small_s
