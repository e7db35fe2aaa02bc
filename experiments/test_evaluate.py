"""Platform behaviour: how a GPU fleet comes up, scales, and lives through what goes wrong (`-m evaluate`).

No decision hangs on these; they are the evidence behind the autoscaling and admission decisions.
"""

from __future__ import annotations

import pytest

from pytest_gpulab import Autoscaling, BoundedQueue, Faults, Poisson, Shape, Shortage, SpikeToZero, Workload

pytestmark = pytest.mark.evaluate

SHAPE = Shape(prompt_tokens=512, output_tokens=128)

# Requests/s that one replica serves well within its SLO, and that take several; and fewer places than those need.
RATES = {
    "t4": {"calm": 4.0, "busy": 8.0, "places": 8},
    "h100": {"calm": 16.0, "busy": 32.0, "places": 32},
    "h200": {"calm": 20.0, "busy": 40.0, "places": 32},
}
FAULT_S = 120.0


@pytest.fixture
def calm(reference) -> Workload:
    """Ten minutes of what one replica takes."""
    return Workload(arrivals=Poisson(rate=reference(RATES)["calm"]), shape=SHAPE, duration_s=600)


@pytest.fixture
def busy(reference) -> Workload:
    """Half an hour of more than one replica should take."""
    return Workload(arrivals=Poisson(rate=reference(RATES)["busy"]), shape=SHAPE, duration_s=1800)


def test_cold_start_by_stage(measure, profile, deployed, calm):
    """Image pull is most of a cold start; loading the image lazily (SOCI) takes half of the whole away."""
    plain = deployed(autoscaling=None)
    soci = deployed(autoscaling=None, stages=f"{plain.stages}-soci")
    pulled = measure(calm, profile.on(plain), label="image pulled")
    lazy = measure(calm, profile.on(soci), label="image loaded lazily")
    pull = pulled.reached("container") - pulled.reached("scheduled")
    assert pull >= 0.5 * pulled.reached("ready")
    assert pulled.reached("node") <= 0.2 * pulled.reached("ready")
    assert lazy.reached("ready") <= 0.5 * pulled.reached("ready")


def test_zero_idle_against_a_warm_replica(measure, profile, deployed, reference):
    """A warm replica answers a spike at once; bringing one up for it costs a fraction of keeping it for the hour."""
    calm_rate = reference(RATES)["calm"]
    spike = SpikeToZero(rate=calm_rate, spike_s=120)
    queue = BoundedQueue(capacity=round(240 * calm_rate), max_wait_s=900)
    only_the_spike = Workload(arrivals=spike, shape=SHAPE, duration_s=120, admission=queue)
    the_hour = Workload(arrivals=spike, shape=SHAPE, duration_s=3600, admission=queue)
    cold = measure(only_the_spike, profile.on(deployed(autoscaling=None)), label="zero idle")
    warm = measure(the_hour, profile.on(deployed(autoscaling=None, warm=1)), label="one warm, for an hour")
    assert cold.delivery_ratio >= 0.999
    assert warm.p95 <= 0.05 * cold.p95
    assert warm.p95 <= 5.0
    assert cold.cost <= 0.5 * warm.cost


@pytest.mark.parametrize("first", ["running", "active-pressure"])
def test_pressure_shows_where_running_requests_saturate(measure, profile, deployed, reference, busy, first):
    """An engine with few places never runs more requests than it has: only waiting ones show the second is needed."""
    places = reference(RATES)["places"]
    few_places = profile.with_engine_args(max_num_seqs=places)

    def scaled(policy: str):
        fleet = deployed(warm=1, autoscaling=Autoscaling(policy=policy, target=places))
        return measure(busy, few_places.on(fleet), label=policy)

    running, active = scaled("running"), scaled("active-pressure")
    if first == "running":
        assert running.replicas_ready(2) > active.replicas_ready(2)
        assert 0.9 * running.p95 >= active.p95
    else:
        assert active.replicas_ready(2) < running.replicas_ready(2)
        assert active.p95 <= 0.9 * running.p95


def test_active_pressure_targets_under_lasting_traffic(measure, profile, deployed, busy):
    """Where traffic lasts, a higher target serves it with less GPU time, and each request still within 5 s."""

    def at(target: int):
        fleet = deployed(warm=1, autoscaling=Autoscaling(target=target))
        return measure(busy, profile.on(fleet), label=f"target {target}")

    two, four, six, eight = at(2), at(4), at(6), at(8)
    assert eight.gpu_utilization >= 0.55
    assert eight.gpu_seconds <= 0.9 * two.gpu_seconds
    assert six.gpu_seconds <= 1.0 * four.gpu_seconds
    assert eight.cost_per_useful_request(e2e_s=5.0) <= 0.9 * two.cost_per_useful_request(e2e_s=5.0)
    assert eight.p95 <= 5.0


def test_without_spot_capacity_it_runs_on_demand(measure, profile, deployed, calm):
    """Without spot capacity the fleet comes up on demand, hardly later, at more than twice the price."""
    queue = BoundedQueue(capacity=100_000, max_wait_s=1200)
    sold_out = Faults(shortages=(Shortage(capacity_type="spot"),))
    spot = measure(calm, profile.on(deployed(autoscaling=None)), admission=queue, label="spot")
    fallback = measure(
        calm, profile.on(deployed(autoscaling=None, faults=sold_out)), admission=queue, label="no spot"
    )
    assert fallback.delivery_ratio >= 0.999
    assert fallback.replicas_ready(1) - spot.replicas_ready(1) <= 30.0
    assert fallback.cost >= 2.0 * spot.cost


def test_a_second_replica_bridges_a_spot_interruption(measure, profile, deployed, calm):
    """A spot interruption takes the only replica away for a cold start; with two, hardly a request is lost."""
    faults = Faults(interruptions=(FAULT_S,))
    one = measure(calm, profile.on(deployed(autoscaling=None, warm=1, faults=faults)), label="one replica")
    two = measure(calm, profile.on(deployed(autoscaling=None, warm=2, faults=faults)), label="two replicas")
    assert one.downtime >= 240.0
    assert one.delivery_ratio <= 0.7
    assert two.downtime <= 0.0
    assert two.delivery_ratio >= 0.99


def test_a_lost_gpu_node_swallows_requests_until_it_is_missed(measure, profile, deployed, calm):
    """A node that dies without notice costs half the requests of two replicas until Kubernetes misses it."""
    faults = Faults(losses=(FAULT_S,))
    interrupted = Faults(interruptions=(FAULT_S,))
    lost = measure(calm, profile.on(deployed(autoscaling=None, warm=2, faults=faults)), label="node lost")
    told = measure(calm, profile.on(deployed(autoscaling=None, warm=2, faults=interrupted)), label="node interrupted")
    assert lost.downtime <= 0.0
    assert lost.delivery_ratio >= 0.9
    assert lost.delivery_ratio < told.delivery_ratio


def test_a_deleted_pod_is_back_after_a_model_load(measure, profile, deployed, calm):
    """A deleted pod comes back on its node, which has the image: a model load, a fraction of a lost node."""
    deleted = Faults(pod_deletions=(FAULT_S,))
    lost = Faults(losses=(FAULT_S,))
    pod = measure(calm, profile.on(deployed(autoscaling=None, warm=1, faults=deleted)), label="pod deleted")
    node = measure(calm, profile.on(deployed(autoscaling=None, warm=1, faults=lost)), label="node lost")
    assert pod.downtime <= 120.0
    assert pod.downtime <= 0.5 * node.downtime
    assert pod.delivery_ratio > node.delivery_ratio
