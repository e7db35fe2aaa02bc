"""How near a load's times are to what a golden server did, for `make bench`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
import uvloop

from pytest_gpulab.arrivals import prompt_ids
from pytest_gpulab.endpoint import Endpoint
from pytest_gpulab.experiment import Poisson, Shape, Workload
from pytest_gpulab.load.sending import Sending
from pytest_gpulab.load.share import Share
from tests.load.golden import golden_server, truth

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 128


@dataclass(frozen=True)
class Accuracy:
    """The client's TTFT against the time from a request's schedule to when the server wrote its first token."""

    ttft_error_p50_ms: float
    ttft_error_p99_ms: float
    send_lag_p99_ms: float
    miscounted: int


def measure_accuracy(rate: float, duration_s: float = 5.0) -> Accuracy:
    """Poisson arrivals of 128-token streams with 10 ms between tokens; client and server share the clock."""
    shape = Shape(prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS)
    workload = Workload(arrivals=Poisson(rate=rate), shape=shape, duration_s=duration_s)
    with golden_server(delay_s=0.02, interval_s=0.01) as url:
        sending = Sending(Share(workload, Endpoint(url, "golden"), 0, (), 60.0))
        start = time.perf_counter() + 0.1
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            outcome = runner.run(sending.run(start))
        of_prompt = {tuple(record["prompt"]): record for record in truth(url)}
    rows = outcome.requests
    prompts = (tuple(prompt_ids(workload, 0, index, PROMPT_TOKENS)) for index in range(len(rows)))
    written = np.array([of_prompt[prompt]["first"] for prompt in prompts]) - start
    error_ms = (rows["first_token"] - written) * 1e3
    return Accuracy(
        ttft_error_p50_ms=float(np.percentile(error_ms, 50)),
        ttft_error_p99_ms=float(np.percentile(error_ms, 99)),
        send_lag_p99_ms=float(np.percentile(outcome.send_lag_s, 99)) * 1e3,
        miscounted=int((rows["output_tokens"] != OUTPUT_TOKENS).sum()),
    )
