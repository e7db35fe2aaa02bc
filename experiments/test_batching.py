"""Batching: do vLLM's dynamic defaults need an explicit cap for small requests (512 tokens in, 128 out)?"""

from __future__ import annotations

import pytest

from pytest_gpulab import Direct, Poisson, Ramp, Shape, Workload

SHAPE = Shape(prompt_tokens=512, output_tokens=128)

# Requests/s, and how many unanswered requests the client allows before it drops: 3 to 4 s of the burst.
RATES = {
    "t4": {"start": 2, "steady": 8, "burst": 16, "outstanding": 64},
    "h100": {"start": 10, "steady": 35, "burst": 45, "outstanding": 128},
    "h200": {"start": 10, "steady": 40, "burst": 60, "outstanding": 256},
}

CAPS = {
    "t4": {
        "constrained": {"max_num_seqs": 1, "max_num_batched_tokens": 2048},
        "limited": {"max_num_seqs": 8, "max_num_batched_tokens": 4096},
    },
    "h100": {
        "constrained": {"max_num_seqs": 8, "max_num_batched_tokens": 2048},
        "limited": {"max_num_seqs": 32, "max_num_batched_tokens": 4096},
    },
    "h200": {
        "constrained": {"max_num_seqs": 8, "max_num_batched_tokens": 2048},
        "limited": {"max_num_seqs": 32, "max_num_batched_tokens": 4096},
    },
}


@pytest.fixture
def traffic(request, reference, lasting) -> Workload:
    """Steady traffic is ramped up and held, a burst comes at once."""
    rates = reference(RATES)
    admission = Direct(max_outstanding=rates["outstanding"])
    if request.param == "steady":
        duration_s = lasting(330, rates["steady"], floor=700)
        ramp = Ramp(start_rate=rates["start"], rate=rates["steady"], ramp_s=duration_s / 11)
        return Workload(arrivals=ramp, shape=SHAPE, duration_s=duration_s, admission=admission)
    duration_s = lasting(60, rates["burst"], floor=700)
    return Workload(arrivals=Poisson(rate=rates["burst"]), shape=SHAPE, duration_s=duration_s, admission=admission)


@pytest.mark.decision("scheduler", "Keep vLLM dynamic defaults for small steady and burst traffic (512/128)")
@pytest.mark.parametrize("traffic", ["steady", "burst"], indirect=True)
@pytest.mark.parametrize("cap", ["constrained", "limited"])  # varies slowest: each cap is a server of its own
def test_dynamic_defaults_against_caps(measure, profile, reference, traffic, cap):
    default = measure(traffic, profile, label=f"dynamic default, {traffic.arrivals.kind}")
    capped = measure(
        traffic, profile.with_engine_args(**reference(CAPS)[cap]), label=f"{cap}, {traffic.arrivals.kind}"
    )
    assert default.delivery_ratio > capped.delivery_ratio
    assert default.p50 <= 0.9 * capped.p50
    assert default.output_tokens_per_s >= 1.05 * capped.output_tokens_per_s
