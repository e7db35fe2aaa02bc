"""Quantization: smaller numbers in the KV cache or in the weights. What do they cost, and what do they give?"""

from __future__ import annotations

import pytest

from pytest_gpulab import Constant, Direct, Poisson, Profile, Shape, Workload

LONG = Shape(prompt_tokens=8192, output_tokens=300)
RATES = {"t4": 1.0, "h100": 1.6, "h200": 2.0}


@pytest.mark.decision("kv-dtype", "FP8 KV keeps the delivery and the tokens/s of the baseline (8192/300)")
def test_fp8_kv_cache(measure, profile, reference, lasting):
    rate = reference(RATES)
    workload = Workload(
        arrivals=Constant(rate=rate),
        shape=LONG,
        duration_s=lasting(300, rate, floor=60),
        admission=Direct(max_outstanding=256),
        timeout_s=300,
    )
    served = profile.with_engine_args(max_num_seqs=32, max_num_batched_tokens=9216)
    base = measure(workload, served, label="16 bit KV")
    fp8 = measure(workload, served.with_engine_args(kv_cache_dtype="fp8"), label="FP8 KV")
    assert fp8.delivery_ratio >= base.delivery_ratio
    assert fp8.output_tokens_per_s >= 0.95 * base.output_tokens_per_s


@pytest.mark.decision("fp4", "Blackwell FP4 beats BF16 on cost at equal accuracy")
def test_fp4_on_blackwell(measure):
    workload = Workload(arrivals=Poisson(rate=20), shape=Shape(prompt_tokens=512, output_tokens=128), duration_s=120)
    bf16 = Profile(model="llama-3.1-8b", accelerator="b200")
    fp4 = bf16.with_engine_args(quantization="modelopt_fp4")
    cost = measure(workload, fp4).cost_per_useful_request(e2e_s=2.0)
    assert cost <= 0.9 * measure(workload, bf16).cost_per_useful_request(e2e_s=2.0)
