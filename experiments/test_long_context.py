"""Long context: prompts of 8192 tokens with answers of 300. How much of it can one replica take?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_gpulab import Constant, Direct, Shape, Workload, any_of, find_knee

SHAPE = Shape(prompt_tokens=8192, output_tokens=300)
BOUNDED = {"max_num_seqs": 32, "max_num_batched_tokens": 9216}

# Requests/s: well within, one that queues, one beyond the boundary, and the range in which the knee is searched.
RATES = {
    "t4": {"within": 0.75, "knee": 1.20, "beyond": 1.50, "low": 0.5, "high": 2.0},
    "h100": {"within": 2.1, "knee": 3.3, "beyond": 3.3, "low": 2.1, "high": 3.0},
    "h200": {"within": 2.0, "knee": 3.2, "beyond": 3.6, "low": 2.0, "high": 3.6},
}


@pytest.fixture
def steady(lasting) -> Callable[[float], Workload]:
    """Workloads at a constant rate: 300 s, so that a queue can grow, and at least enough requests for a p95."""

    def at(rate: float) -> Workload:
        return Workload(
            arrivals=Constant(rate=rate),
            shape=SHAPE,
            duration_s=lasting(max(300.0, 150 / rate), rate, floor=130),
            admission=Direct(max_outstanding=256),
        )

    return at


@pytest.mark.decision("long-context", "Set a long-context boundary before failures appear (8192/300)")
def test_boundary(measure, profile, reference, steady):
    rates = reference(RATES)
    served = profile.with_engine_args(**BOUNDED)
    knee = find_knee(
        lambda rate: measure(steady(rate), served, label=f"{rate:.3g} req/s"),
        low=rates["low"],
        high=rates["high"],
        stable=lambda m: m.queue_delay <= 1.0,
    )
    within = measure(steady(rates["within"]), served, label="within the boundary")
    beyond = measure(steady(rates["beyond"]), served, label="beyond the boundary")

    assert knee >= rates["within"]
    assert knee <= rates["beyond"]
    assert within.delivery_ratio >= 0.999
    # Latency warns before anything fails: that is what makes a boundary on the rate possible.
    assert beyond.queue_delay >= 2.0
    assert beyond.p95 >= 2.0 * within.p95
    assert beyond.delivery_ratio >= 0.999


@pytest.mark.decision("lc-caps", "A scheduler cap is the first fix for the long-context knee (cuts p95 by 10 %)")
def test_caps_at_the_knee(measure, profile, reference, steady):
    knee = steady(reference(RATES)["knee"])
    served = profile.with_engine_args(**BOUNDED)
    base = measure(knee, served, label="baseline")
    caps = [
        measure(knee, served.with_engine_args(max_num_seqs=16), label="seqs-16"),
        measure(knee, served.with_engine_args(max_num_seqs=24), label="seqs-24"),
        measure(knee, served.with_engine_args(max_num_batched_tokens=16384), label="batched-16384"),
    ]
    assert any_of(*(capped.p95 <= 0.9 * base.p95 for capped in caps))
