"""Prefill and decode: which latency tells which kind of work?"""

from __future__ import annotations

from pytest_gpulab import ClosedLoop, Shape, Workload


def test_ttft_and_tpot_separate_prefill_from_decode(measure, profile, campaign):
    """TTFT and inter-token time separate prompt-heavy from decode-heavy work."""

    rounds = 4 if campaign == "quick" else 10

    def sixteen_users(prompt_tokens: int, output_tokens: int) -> Workload:
        shape = Shape(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        return Workload(arrivals=ClosedLoop(concurrency=16), shape=shape, requests=16 * rounds)

    prompt_heavy = measure(sixteen_users(1536, 64), profile, label="prompt-heavy 1536/64")
    decode_heavy = measure(sixteen_users(128, 768), profile, label="decode-heavy 128/768")
    assert prompt_heavy.ttft.p50 >= 2.0 * decode_heavy.ttft.p50
    assert prompt_heavy.tpot.p50 >= 1.1 * decode_heavy.tpot.p50
    assert decode_heavy.p50 >= 1.5 * prompt_heavy.p50
