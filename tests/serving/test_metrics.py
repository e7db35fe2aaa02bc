"""/metrics: vLLM's names, read by an independent parser, with the client's counts."""

from __future__ import annotations

import asyncio

import pytest

from pytest_gpulab.serving.metrics import Histogram, token_edges
from tests.serving.client import LONGEST, MODEL, post, scrape, serving, value

COUNTERS = {
    "prompt_tokens_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
}
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "iteration_tokens_total",
}


def test_names_and_labels_before_the_first_request():
    async def check():
        async with serving() as (server, session):
            async with session.get(server.url + "/metrics") as response:
                text = await response.text()
            for names, kind in ((COUNTERS, "counter"), (GAUGES, "gauge"), (HISTOGRAMS, "histogram")):
                for name in names:
                    assert f"# TYPE vllm:{name} {kind}\n" in text
            assert f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 0.0\n' in text
            samples = await scrape(session, server.url)
            for reason in ("stop", "length", "abort", "error"):
                assert value(samples, "request_success_total", finished_reason=reason) == 0
            for reason in ("capacity", "deferred"):
                assert value(samples, "num_requests_waiting_by_reason", reason=reason) == 0
            edges = [
                float(dict(labels)["le"])
                for name, labels in samples
                if name == "vllm:e2e_request_latency_seconds_bucket"
            ]
            assert edges[:4] == [0.3, 0.5, 0.8, 1.0]
            assert edges[-2:] == [7680.0, float("inf")]

    asyncio.run(check())


def test_counts_equal_the_clients():
    requests = [(10 + number, 1 + number) for number in range(12)]

    async def check():
        async with serving() as (server, session):
            bodies = [{"prompt": [500 + p] * p, "max_tokens": t, "ignore_eos": True} for p, t in requests]
            answers = await asyncio.gather(*(post(session, server.url, body) for body in bodies))
            usages = [body["usage"] for _, body in answers]
            assert [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in usages] == requests
            samples = await scrape(session, server.url)
        prompts, outputs = (sum(counts) for counts in zip(*requests, strict=True))
        assert value(samples, "prompt_tokens_total") == value(samples, "prefix_cache_queries_total") == prompts
        assert value(samples, "generation_tokens_total") == outputs
        assert value(samples, "request_success_total", finished_reason="length") == 12
        assert value(samples, "request_prompt_tokens_sum") == prompts
        assert value(samples, "request_generation_tokens_sum") == outputs
        assert value(samples, "request_params_max_tokens_sum") == outputs
        assert value(samples, "time_to_first_token_seconds_count") == 12
        assert value(samples, "inter_token_latency_seconds_count") == outputs - 12
        assert value(samples, "iteration_tokens_total_sum") == prompts + outputs
        assert value(samples, "iteration_tokens_total_bucket", le="+Inf") == value(
            samples, "iteration_tokens_total_count"
        )
        parts = ("queue", "prefill", "decode")
        spent = sum(value(samples, f"request_{part}_time_seconds_sum") for part in parts)
        assert 0 < spent <= value(samples, "e2e_request_latency_seconds_sum")
        inference = value(samples, "request_inference_time_seconds_sum")
        assert inference == pytest.approx(spent - value(samples, "request_queue_time_seconds_sum"))

    asyncio.run(check())


def test_a_repeated_prompt_hits_the_prefix_cache():
    async def check():
        async with serving() as (server, session):
            body = {"prompt": list(range(300, 400)), "max_tokens": 1}
            await post(session, server.url, body)
            await post(session, server.url, body)
            samples = await scrape(session, server.url)
            assert value(samples, "prefix_cache_queries_total") == 200
            assert value(samples, "prefix_cache_hits_total") == 96  # whole blocks of 16, and one token is computed
            assert value(samples, "prompt_tokens_by_source_total", source="local_cache_hit") == 96
            assert value(samples, "request_prefill_kv_computed_tokens_sum") == 104

    asyncio.run(check())


def test_edges():
    assert token_edges(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_edges(LONGEST)[-2:] == (1000, 2000)
    histogram = Histogram((1.0, 2.0))
    for observed in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(observed)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines("x", 'a="b"'))
    assert lines['x_bucket{a="b",le="1.0"}'] == "2.0"
    assert lines['x_bucket{a="b",le="2.0"}'] == "4.0"
    assert lines['x_bucket{a="b",le="+Inf"}'] == lines['x_count{a="b"}'] == "5.0"
    assert lines['x_sum{a="b"}'] == "14.0"
