"""Request patterns: does the shape of traffic change what a replica delivers, at the same engine arguments?"""

from __future__ import annotations

from pytest_gpulab import Direct, Mix, Poisson, Shape, SpikeToZero, Workload

SMALL = Shape(prompt_tokens=512, output_tokens=128)
UNEVEN = Mix(
    parts=(
        (6, Shape(prompt_tokens=128, output_tokens=64)),
        (3, Shape(prompt_tokens=512, output_tokens=128)),
        (1, Shape(prompt_tokens=1536, output_tokens=512)),
    )
)

RATES = {
    "t4": {"steady": 6, "burst": 18, "uneven": 8, "spike": 20, "outstanding": 64},
    "h100": {"steady": 25, "burst": 55, "uneven": 32, "spike": 65, "outstanding": 192},
    "h200": {"steady": 30, "burst": 70, "uneven": 40, "spike": 80, "outstanding": 256},
}


def test_traffic_shape_changes_throughput_and_tail(measure, profile, reference, lasting):
    """Traffic shape changes useful throughput and tail latency."""
    rates = reference(RATES)
    admission = Direct(max_outstanding=rates["outstanding"])
    duration_s = lasting(120, rates["steady"], floor=300)

    def poisson(rate: float, shape: Shape | Mix) -> Workload:
        return Workload(arrivals=Poisson(rate=rate), shape=shape, duration_s=duration_s, admission=admission)

    spike_to_zero = Workload(
        arrivals=SpikeToZero(rate=rates["spike"], spike_s=duration_s / 4),
        shape=SMALL,
        duration_s=duration_s,
        admission=admission,
    )
    steady = measure(poisson(rates["steady"], SMALL), profile, label="steady small")
    burst = measure(poisson(rates["burst"], SMALL), profile, label="burst small")
    uneven = measure(poisson(rates["uneven"], UNEVEN), profile, label="uneven mix")
    spike = measure(spike_to_zero, profile, label="spike to zero")

    assert steady.delivery_ratio >= 0.999
    assert burst.p95 >= 1.5 * steady.p95
    assert uneven.p95 / uneven.p50 >= 1.5 * (steady.p95 / steady.p50)
    assert spike.goodput(e2e_s=2.0) <= 0.7 * steady.goodput(e2e_s=2.0)
