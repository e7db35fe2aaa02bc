"""vLLM's start-up decisions: limits by accelerator, KV blocks from memory."""

from __future__ import annotations

import pytest

from pytest_gpulab.accelerators import find_accelerator
from pytest_gpulab.engine.defaults import (
    bytes_per_block,
    kv_blocks,
    scheduler_config,
    scheduler_limits,
    weight_bytes,
)
from pytest_gpulab.experiment import Profile
from pytest_gpulab.models import find_model

# kv_cache_tokens that vLLM 0.25.1 reported on an H200 (pytest_gpulab/engine/calibrations/data).
MEASURED_TOKENS = [
    ("llama-3.1-8b", {}, 896_912),
    ("llama-3.1-8b", {"kv_cache_dtype": "fp8"}, 1_793_328),
    ("llama-3.1-8b", {"max_num_seqs": 16}, 896_912),
    ("llama-3.1-8b", {"max_num_batched_tokens": 2048}, 897_680),
    ("llama-3.1-8b", {"max_num_batched_tokens": 16384}, 891_392),
    ("llama-3.1-8b", {"quantization": "fp8"}, 949_584),
    ("qwen2.5-0.5b", {}, 10_813_360),
]


def profile(model: str = "llama-3.1-8b", accelerator: str = "h200", **args: object) -> Profile:
    return Profile(model=model, accelerator=accelerator, engine_args={"max_model_len": 9216, **args})


@pytest.mark.parametrize(("model", "args", "tokens"), MEASURED_TOKENS)
def test_kv_cache_of_an_h200_is_as_measured(model, args, tokens):
    served = profile(model, max_model_len=16384, gpu_memory_utilization=0.9, **args)
    assert kv_blocks(served) * 16 == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("args", "tokens"),
    [
        ({}, 462_944),
        ({"max_num_seqs": 32, "max_num_batched_tokens": 9216}, 462_816),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 2048}, 463_712),
    ],
)
def test_kv_cache_of_an_h100_follows_from_its_memory(args, tokens):
    """Sizes that vLLM 0.25.1 logged there; the formula's constants were found on the H200 alone."""
    served = profile(accelerator="h100", max_model_len=16384, **args)
    assert kv_blocks(served) * 16 == pytest.approx(tokens, rel=3e-3)


def test_a_measured_reserve_replaces_the_formula():
    served = profile(gpu_memory_utilization=0.9)
    allowed = -(-find_accelerator("h200").memory_bytes * 9 // 10)
    left = allowed - weight_bytes(find_model("llama-3.1-8b"), None)
    assert kv_blocks(served, 3_000_000_000) == (left - 3_000_000_000) // bytes_per_block(served)
    smaller = served.with_engine_args(max_num_batched_tokens=2048)
    assert kv_blocks(smaller, 3_000_000_000) > kv_blocks(served, 3_000_000_000)


def test_kv_cache_of_a_t4():
    """Nobody has measured it: most of the memory that vLLM may use, and what the bytes of a block allow."""
    served = profile("qwen2.5-0.5b", "t4")
    allowed = find_accelerator("t4").memory_bytes * 0.92
    assert bytes_per_block(served) == 196_608
    assert 0.7 * allowed < kv_blocks(served) * 196_608 < allowed - weight_bytes(find_model(served.model), None)


def test_fp8_halves_a_block_and_a_block_scales_with_its_tokens():
    assert bytes_per_block(profile(kv_cache_dtype="fp8")) * 2 == bytes_per_block(profile())
    assert bytes_per_block(profile(block_size=32)) == 2 * bytes_per_block(profile())


def test_an_override_counts_instead_of_memory():
    assert kv_blocks(profile(num_gpu_blocks_override=3000)) == 3000


@pytest.mark.parametrize(
    ("accelerator", "limits"),
    [
        ("t4", (256, 2048)),
        ("l4", (256, 2048)),
        ("h100", (1024, 8192)),
        ("h200", (1024, 8192)),
        ("b200", (1024, 16384)),
    ],
)
def test_limits_follow_the_accelerator(accelerator, limits):
    assert scheduler_limits(find_accelerator(accelerator)) == limits


def test_engine_arguments_win_over_defaults():
    config = scheduler_config(
        profile(
            max_num_seqs=24,
            max_num_batched_tokens=4096,
            async_scheduling=False,
            enable_prefix_caching=False,
            long_prefill_token_threshold=100,
            scheduler_reserve_full_isl=False,
            block_size=32,
        )
    )
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len) == (24, 4096, 9216)
    assert (config.async_scheduling, config.enable_prefix_caching) == (False, False)
    assert (config.long_prefill_token_threshold, config.scheduler_reserve_full_isl) == (100, False)
    assert config.block_size == 32


def test_defaults_fill_the_rest():
    config = scheduler_config(Profile(model="llama-3.1-8b", accelerator="h200"))
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (1024, 8192)
    assert config.max_model_len == 131_072
    assert config.async_scheduling
    assert config.enable_prefix_caching


def test_the_default_of_max_num_seqs_follows_a_small_token_budget():
    assert scheduler_config(profile(max_num_batched_tokens=64)).max_num_seqs == 64


@pytest.mark.parametrize(
    ("served", "said"),
    [
        (profile("llama-3.1-8b", "t4"), "must have at least 2 blocks"),
        (profile(num_gpu_blocks_override=100), "num_blocks must be at least 576"),
        (profile(enable_chunked_prefill=False), "enable_chunked_prefill must be True"),
        (profile(max_num_seqs=64, max_num_batched_tokens=32), "max_num_batched_tokens must be at least"),
    ],
)
def test_refuses_what_vllm_refuses(served, said):
    with pytest.raises(ValueError, match=said):
        scheduler_config(served)
