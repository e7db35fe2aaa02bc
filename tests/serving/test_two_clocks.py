"""One engine, two clocks: virtual time and HTTP in real time give the same latencies."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from pytest_gpulab.arrivals import prompt_ids, schedule
from pytest_gpulab.engine import simulate
from pytest_gpulab.experiment import Poisson, Shape, Workload
from tests.serving.client import PROFILE, golden, scrape, serving, value

WORKLOAD = Workload(arrivals=Poisson(rate=8), shape=Shape(prompt_tokens=256, output_tokens=48), requests=32)
"""On a T4 for 4 s: up to a dozen requests decode at once, while prompts come in between."""


async def send_all(session, url, workload, seed):
    """End-to-end seconds of each request, open loop, counted from when it was due."""
    rows = schedule(workload, seed)
    start = time.perf_counter() + 0.05

    async def one(index, row):
        prompt = prompt_ids(workload, seed, index, int(row["prompt_tokens"])).tolist()
        tokens = int(row["output_tokens"])
        due = start + float(row["scheduled"])
        await asyncio.sleep(due - time.perf_counter())
        body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "return_token_ids": True}
        async with session.post(url + "/v1/completions", json=body) as response:
            raw = await response.read()
        took = time.perf_counter() - due
        assert raw.count(b'"token_ids":[') >= 1 and str(golden(prompt, tokens)[-1]).encode() in raw
        return took

    return await asyncio.gather(*(one(index, row) for index, row in enumerate(rows)))


@pytest.mark.slow
def test_http_in_real_time_agrees_with_virtual_time():
    """E2E p50 within 5 %, both as clients see it and as the server's own metrics say."""
    run = simulate(PROFILE, WORKLOAD)
    simulated = run.requests["last_token"] - run.requests["scheduled"]

    async def measure():
        async with serving(speed=1.0) as (server, session):
            took = await send_all(session, server.url, WORKLOAD, 0)
            return took, await scrape(session, server.url)

    measured, samples = asyncio.run(measure())
    assert np.median(measured) == pytest.approx(np.median(simulated), rel=0.05)
    mean = value(samples, "e2e_request_latency_seconds_sum") / len(measured)
    assert mean == pytest.approx(simulated.mean(), rel=0.05)
    for total in ("prompt_tokens_total", "generation_tokens_total"):
        assert value(samples, total) == run.totals[total]
