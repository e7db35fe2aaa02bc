"""What vLLM decides itself at start-up: scheduler limits from the accelerator, KV blocks from its memory."""

from __future__ import annotations

import math

from pytest_gpulab.accelerators import GIB, Accelerator, find_accelerator
from pytest_gpulab.engine.scheduler import EngineRefused, SchedulerConfig
from pytest_gpulab.experiment import Profile
from pytest_gpulab.models import Model, find_model

_BYTES_PER_VALUE = 2
"""Of weights, activations and KV cache without quantization: bfloat16 and float16."""

_WEIGHT_BYTES = {None: 2.0, "fp8": 1.0, "modelopt_fp4": 0.5 + 1 / 16}
"""Per quantized weight; FP4 keeps an FP8 scale for each 16 weights."""

# What else vLLM 0.25.1 held on an H200, bytes: constants that reproduce six measured KV cache sizes (two models,
# three token budgets, FP8 KV cache and FP8 weights) within 0.1 %; tests/test_defaults.py has them.
_RUNTIME_BYTES = 1_376_000_000
"""CUDA context, libraries and workspaces."""
_BYTES_PER_LAYER = 17_140_000
"""CUDA graphs and what else grows with the depth."""
_WARM_UP_BYTES = 820_000_000
"""Peak of start-up work that does not depend on the token budget: smaller activations cost nothing extra."""


def scheduler_limits(accelerator: Accelerator) -> tuple[int, int]:
    """vLLM's defaults of (max_num_seqs, max_num_batched_tokens) for its API server."""
    if accelerator.memory_bytes >= 160 * GIB:
        return 1024, 16384
    if accelerator.memory_bytes >= 70 * GIB and "a100" not in accelerator.name:
        return 1024, 8192
    return 256, 2048


def weight_bytes(model: Model, quantization: str | None) -> int:
    """Bytes of the weights; embedding and output layer are not quantized."""
    embeddings = model.embedding_parameters if quantization else 0
    quantized = model.parameters - embeddings
    return int(quantized * _WEIGHT_BYTES[quantization] + embeddings * _BYTES_PER_VALUE)


def activation_bytes(model: Model, batched_tokens: int) -> int:
    """Bytes that the largest step adds to the peak of start-up.

    The residual stream and its copy always count; the three tensors of the gated MLP only as far as they exceed
    what start-up has needed anyway.
    """
    residual = 2 * model.hidden_size * _BYTES_PER_VALUE * batched_tokens
    mlp = 3 * model.intermediate_size * _BYTES_PER_VALUE * batched_tokens
    return residual + max(0, mlp - _WARM_UP_BYTES)


def bytes_per_block(profile: Profile) -> int:
    """Bytes of one KV block over all layers; an FP8 cache halves them."""
    args = profile.engine_args
    value_bytes = _BYTES_PER_VALUE if args.kv_cache_dtype == "auto" else 1
    return find_model(profile.model).kv_bytes_per_token(value_bytes) * args.block_size


def kv_blocks(profile: Profile, reserved_bytes: int = 0) -> int:
    """KV blocks that vLLM allocates, the null block included. EngineRefused when the memory holds no block.

    `reserved_bytes` is the calibration's: measured bytes that neither weights nor KV cache took, at the
    accelerator's default token budget. 0 means not measured; then a formula estimates it.
    """
    args = profile.engine_args
    if args.num_gpu_blocks_override is not None:
        return args.num_gpu_blocks_override
    model, accelerator = find_model(profile.model), find_accelerator(profile.accelerator)
    default_tokens = scheduler_limits(accelerator)[1]
    base = reserved_bytes - activation_bytes(model, default_tokens)
    if not reserved_bytes:
        base = _RUNTIME_BYTES + _BYTES_PER_LAYER * model.layers
    reserved = base + activation_bytes(model, args.max_num_batched_tokens or default_tokens)
    allowed = math.ceil(accelerator.memory_bytes * args.gpu_memory_utilization)
    left = allowed - weight_bytes(model, args.quantization) - reserved
    blocks = left // bytes_per_block(profile)
    if blocks < 2:
        raise EngineRefused(
            f"the KV cache of {profile.model} on {profile.accelerator} must have at least 2 blocks, but weights and "
            f"activations leave {left} bytes at gpu_memory_utilization={args.gpu_memory_utilization}; raise it, "
            "lower max_num_batched_tokens, quantize, or take an accelerator with more memory"
        )
    return blocks


def scheduler_config(profile: Profile, reserved_bytes: int = 0) -> SchedulerConfig:
    """The profile's engine arguments with vLLM's defaults filled in. EngineRefused for what cannot be served."""
    args = profile.engine_args
    if not args.enable_chunked_prefill:
        raise EngineRefused(
            "enable_chunked_prefill must be True, got False: the engine models vLLM's V1 scheduler with chunked "
            "prefill; raise max_num_batched_tokens to max_model_len to keep prompts whole"
        )
    max_num_seqs, max_num_batched_tokens = scheduler_limits(find_accelerator(profile.accelerator))
    batched_tokens = args.max_num_batched_tokens or max_num_batched_tokens
    return SchedulerConfig(
        num_blocks=kv_blocks(profile, reserved_bytes),
        # vLLM lowers its own default to the token budget; what the user asks for must fit.
        max_num_seqs=args.max_num_seqs or min(max_num_seqs, batched_tokens),
        max_num_batched_tokens=batched_tokens,
        max_model_len=profile.max_model_len,
        block_size=args.block_size,
        enable_prefix_caching=args.enable_prefix_caching,
        async_scheduling=args.async_scheduling,
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        scheduler_reserve_full_isl=args.scheduler_reserve_full_isl,
    )
