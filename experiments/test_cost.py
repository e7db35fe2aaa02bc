"""Cost: what does a request that met its SLO cost, and does batching lower it?"""

from __future__ import annotations

import pytest

from pytest_gpulab import Direct, Poisson, Shape, Workload, caveat

SHAPE = Shape(prompt_tokens=512, output_tokens=128)
SLO_P95_S = 2.0
SLO_P99_S = 5.0

TRAFFIC = {
    "t4": {"steady": 8.0, "burst": 16.0, "outstanding": 64},
    "h100": {"steady": 35.0, "burst": 45.0, "outstanding": 128},
    "h200": {"steady": 40.0, "burst": 60.0, "outstanding": 256},
}

LIMITED = {
    "t4": {"max_num_seqs": 8, "max_num_batched_tokens": 4096},
    "h100": {"max_num_seqs": 32, "max_num_batched_tokens": 4096},
    "h200": {"max_num_seqs": 32, "max_num_batched_tokens": 4096},
}


@pytest.mark.decision("cost", "Optimized batching lowers the cost per useful request (512/128, SLO p95 2 s)")
@pytest.mark.parametrize("traffic", ["steady", "burst"])
def test_batching_lowers_cost(measure, profile, reference, lasting, traffic):
    setting = reference(TRAFFIC)
    rate = setting[traffic]
    workload = Workload(
        arrivals=Poisson(rate=rate),
        shape=SHAPE,
        duration_s=lasting(120, rate, floor=700),
        admission=Direct(max_outstanding=setting["outstanding"]),
    )
    batched = measure(workload, profile, label=f"dynamic batching, {traffic}")
    limited = measure(workload, profile.with_engine_args(**reference(LIMITED)), label=f"limited batching, {traffic}")

    assert batched.cost_per_useful_request(e2e_s=SLO_P99_S) <= 0.9 * limited.cost_per_useful_request(e2e_s=SLO_P99_S)
    caveat(batched.p95 <= SLO_P95_S, "p95 misses the 2 s SLO")
    caveat(batched.p99 <= SLO_P99_S, "p99 misses the 5 s SLO")
