"""Autoscaled serving in virtual time."""

from __future__ import annotations

import re
import sys
import time

import numpy as np
import pytest

from pytest_gpulab.cluster.fleet import FleetRefused, simulate_fleet
from pytest_gpulab.engine import simulate
from pytest_gpulab.experiment import BoundedQueue, Constant, Direct, Poisson, Profile, Shape, SpikeToZero, Workload
from pytest_gpulab.figures import delivery_ratio, highest, latencies, request_rate, seconds_without_replica
from pytest_gpulab.fleet import FROM_ZERO, WARM_ONE, Autoscaling, Faults, Fleet, Shortage
from pytest_gpulab.timeline import cold_start, counts
from tests.cluster.scene import T4

SHAPE = Shape(prompt_tokens=512, output_tokens=128)
ONE = Fleet(autoscaling=None, warm=1)


def traffic(rate=8, duration_s=120.0, **fields):
    return Workload(arrivals=Poisson(rate=rate), shape=SHAPE, duration_s=duration_s, **fields)


@pytest.mark.parametrize(
    "admission",
    [
        Direct(),
        Direct(max_outstanding=20),
        BoundedQueue(capacity=50, max_wait_s=30.0, max_outstanding=16),
        BoundedQueue(capacity=50, max_wait_s=5.0, max_outstanding=12),
    ],
    ids=["direct", "limited", "queue", "impatient"],
)
@pytest.mark.parametrize("rate", [4, 14])
def test_a_warm_fleet_of_one_is_the_engine(rate, admission):
    workload = traffic(rate, 60.0, admission=admission)
    fleet, alone = simulate_fleet(T4.on(ONE), workload, seed=3), simulate(T4, workload, seed=3)
    for column in ("scheduled", "prompt_tokens", "output_tokens", "ok"):
        assert np.array_equal(fleet.requests[column], alone.requests[column]), column
    for column in ("sent", "first_token", "last_token"):
        assert np.allclose(fleet.requests[column], alone.requests[column], rtol=0, atol=1e-6, equal_nan=True), column
    assert fleet.totals["request_success_total"] == alone.totals["request_success_total"]
    assert fleet.duration_s == pytest.approx(alone.duration_s, abs=1e-6)
    rows = min(len(fleet.server), len(alone.server))
    assert np.array_equal(fleet.server["num_requests_running"][:rows], alone.server["num_requests_running"][:rows])


def test_the_same_seed_gives_the_same_bytes():
    first, again = (simulate_fleet(T4.on(FROM_ZERO), traffic(12, 900.0), seed=5) for _ in range(2))
    assert first.requests.tobytes() == again.requests.tobytes()
    assert first.server.tobytes() == again.server.tobytes()
    assert (first.totals, first.timeline, first.provenance) == (again.totals, again.timeline, again.provenance)
    assert simulate_fleet(T4.on(FROM_ZERO), traffic(12, 900.0), seed=6).timeline != first.timeline


def test_from_zero_direct_clients_lose_what_comes_before_the_first_replica():
    run = simulate_fleet(T4.on(FROM_ZERO), traffic(4, 900.0))
    up = cold_start(run.timeline)["ready"]
    assert 415 < up < 450
    early = run.requests["scheduled"] < up
    assert not run.requests["ok"][early].any(), "503"
    assert run.requests["ok"][~early].all()
    assert np.array_equal(run.requests["sent"], run.requests["scheduled"])


def test_a_run_in_which_everything_is_lost_has_its_length():
    """The last request arrives long before the first replica; it is answered with a 503."""
    run = simulate_fleet(T4.on(FROM_ZERO), Workload(arrivals=Poisson(rate=10), shape=SHAPE, requests=50))
    assert not run.requests["ok"].any()
    assert run.duration_s == run.requests["scheduled"].max()
    assert (request_rate(run), run.problems) == (0, ())
    nobody = simulate_fleet(T4.on(ONE), Workload(arrivals=Poisson(rate=0.01), shape=SHAPE, duration_s=5))
    assert any("offered no request" in problem for problem in nobody.problems)


def test_a_run_lasts_until_its_last_request_is_lost_with_its_server():
    slow = Workload(arrivals=Constant(rate=1), shape=Shape(prompt_tokens=512, output_tokens=4000), requests=5)
    run = simulate_fleet(T4.on(Fleet(autoscaling=None, warm=1, faults=Faults(losses=(9.0,)))), slow)
    assert not run.requests["ok"].any()
    assert run.duration_s == 9.0


def test_a_bounded_queue_keeps_requests_until_the_first_replica():
    spike = Workload(
        arrivals=SpikeToZero(rate=1, spike_s=200),
        shape=SHAPE,
        duration_s=900,
        admission=BoundedQueue(capacity=240, max_wait_s=600.0),
    )
    queued = simulate_fleet(T4.on(FROM_ZERO), spike)
    up = cold_start(queued.timeline)["ready"]
    assert delivery_ratio(queued) == 1.0
    assert queued.requests["sent"].min() == pytest.approx(up, abs=0.01)
    direct = simulate_fleet(T4.on(FROM_ZERO), spike.model_copy(update={"admission": Direct()}))
    assert delivery_ratio(direct) == 0.0
    short = simulate_fleet(
        T4.on(FROM_ZERO), spike.model_copy(update={"admission": BoundedQueue(capacity=240, max_wait_s=60.0)})
    )
    assert delivery_ratio(short) == 0.0


def test_active_pressure_scales_before_running_requests_do():
    """With eight places in each engine, the running count cannot pass eight: it saturates where pressure shows."""
    profile = T4.with_engine_args(max_num_seqs=8)
    wanted = {}
    for policy in ("running", "active-pressure"):
        scaling = Autoscaling(policy=policy, target=8, max_replicas=4)
        run = simulate_fleet(profile.on(Fleet(autoscaling=scaling, warm=1)), traffic(16, 600.0))
        wanted[policy] = max(count.wanted for count in counts(run.timeline))
    assert wanted == {"running": 1, "active-pressure": 4}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stages", ["g4dn", "p5en"])
def test_warm_replicas_of_an_autoscaled_fleet_serve_from_the_start(stages, seed):
    """A cold start is longer than the autoscaler's window, and idle replicas look like too many meanwhile."""
    run = simulate_fleet(T4.on(Fleet(warm=2, stages=stages)), traffic(4, 120.0), seed=seed)
    assert not run.problems
    assert {count.ready for count in counts(run.timeline) if 0 <= count.at < 120} == {2}


def test_replicas_beyond_what_traffic_needs_leave_after_the_autoscalers_window():
    """Kubernetes takes what a new autoscaler finds for its first recommendation, and the highest of 300 s holds."""
    run = simulate_fleet(T4.on(Fleet(warm=3)), traffic(0.2, 600.0))
    fewer = next(count for count in counts(run.timeline) if count.at > 0 and count.wanted < 3)
    assert (fewer.at, fewer.wanted) == (15 + 300, 1)


def test_warm_replicas_without_machines_are_refused():
    with pytest.raises(FleetRefused, match=r"3 warm replicas must get ready, with max_gpus=1: raise.*exceed limits"):
        simulate_fleet(T4.on(Fleet(warm=3, max_gpus=1)), traffic(1, 10.0))


def test_replicas_share_the_load_and_latency_falls():
    run = simulate_fleet(T4.on(WARM_ONE), traffic(20, 1200.0))
    numbers = counts(run.timeline)
    assert max(count.ready for count in numbers) == 4
    assert all(0 <= count.wanted <= 4 for count in numbers)
    seconds = latencies(run, "e2e")
    before = seconds[(run.requests["scheduled"] > 200) & (run.requests["scheduled"] < 400)]
    after = seconds[run.requests["scheduled"] > 900]
    assert np.median(after) < 2 < np.median(before)
    assert highest(run, "num_requests_waiting") > 0
    assert (np.diff(run.server["generation_tokens_total"]) >= 0).all()
    assert run.totals["generation_tokens_total"] == 128 * run.totals["request_success_total"]


def test_gpu_time_is_billed_from_launch_to_termination_with_the_drain():
    run = simulate_fleet(T4.on(FROM_ZERO), Workload(arrivals=Constant(rate=1), shape=SHAPE, duration_s=1000))
    launched = next(at for at, text in run.timeline if text.endswith(" launched"))
    ended = next(at for at, text in run.timeline if re.fullmatch(r"NodeClaim \S+ terminating", text))
    assert ended > run.duration_s, "a node is drained after the last answer"
    assert run.totals["gpu_seconds"] == pytest.approx(ended - launched, abs=15.0)
    assert run.totals["cost_usd"] == pytest.approx(run.totals["gpu_seconds"] / 3600 * 0.526 * 0.4, rel=1e-3)
    ready = cold_start(run.timeline)["ready"]
    assert run.totals["gpu_busy_seconds"] == pytest.approx(run.duration_s - ready, abs=5.0), "one request a second"
    assert (counts(run.timeline)[-1].nodes, counts(run.timeline)[-1].nodeclaims) == (0, 0)


def test_the_bill_follows_the_profiles_price():
    workload = Workload(arrivals=Constant(rate=1), shape=SHAPE, duration_s=60)
    fleet = Fleet(autoscaling=None, warm=1, capacity=("on-demand",))
    dear = T4.on(fleet).model_copy(update={"price_usd_per_hour": 3.6})
    run = simulate_fleet(dear, workload)
    assert run.totals["cost_usd"] == pytest.approx(run.totals["gpu_seconds"] / 1000)
    with pytest.raises(FleetRefused, match="unknown instance type of the emulated cloud 'g4dn"):
        simulate_fleet(dear.model_copy(update={"instance_type": "g4dn.metal"}), workload)


@pytest.mark.parametrize(
    ("stages", "said"),
    [({}, "g4dn cluster (cold starts not measured on h200)"), ({"stages": "p5en"}, "p5en cluster")],
)
def test_a_run_says_when_its_cold_starts_are_anothers(stages, said):
    h200 = Profile(model="llama-3.1-8b", accelerator="h200", engine_args={"max_model_len": 4096})
    run = simulate_fleet(
        h200.on(Fleet(autoscaling=None, **stages)), Workload(arrivals=Constant(rate=1), shape=SHAPE, requests=1)
    )
    assert run.provenance.server == f"h200-llama-3.1-8b base, {said}"


@pytest.mark.parametrize(
    ("fleet", "problem"),
    [
        (Fleet(faults=Faults(interruptions=(1.0,))), "the interruption at 1 s found no running spot instance"),
        (Fleet(faults=Faults(losses=(5.0,))), "the loss at 5 s found no running instance: nothing went wrong"),
        (Fleet(faults=Faults(pod_deletions=(30.0,))), "the pod deletion at 30 s found no Ready pod: nothing went"),
        (Fleet(warm=1, faults=Faults(losses=(90.0,))), "the loss at 90 s did not happen: the run was over before"),
    ],
    ids=["interruption", "loss", "deletion", "late"],
)
def test_a_fault_without_a_victim_shows_nothing(fleet, problem):
    few = Workload(arrivals=Constant(rate=1), shape=SHAPE, requests=40)
    (found,) = simulate_fleet(T4.on(fleet), few).problems
    assert found.startswith(problem)


def test_without_spot_capacity_it_serves_on_demand():
    fleet = Fleet(faults=Faults(shortages=(Shortage(capacity_type="spot"),)))
    run = simulate_fleet(T4.on(fleet), traffic(2, 700.0))
    assert any("InsufficientCapacityError" in text for _, text in run.timeline)
    assert run.totals["cost_usd"] == pytest.approx(run.totals["gpu_seconds"] / 3600 * 0.526, rel=1e-3)
    assert run.requests["ok"].any()


def test_a_spot_interruption_costs_the_gap_until_a_new_node_serves():
    run = simulate_fleet(
        T4.on(Fleet(autoscaling=None, warm=1, faults=Faults(interruptions=(300.0,)))), traffic(4, 1000.0)
    )
    times, ok = run.requests["scheduled"], run.requests["ok"]
    assert ok[times < 295].all()
    assert not ok[(times > 305) & (times < 650)].any()
    assert ok[times > 800].all()
    assert any("SpotInterrupted" in text for _, text in run.timeline)


def test_a_lost_machine_swallows_requests_until_somebody_notices():
    """Two replicas take turns; one of them is dead and still an endpoint for the time a node may be silent."""
    fleet = Fleet(autoscaling=None, warm=2, faults=Faults(losses=(100.0,)))
    run = simulate_fleet(T4.on(fleet), Workload(arrivals=Constant(rate=4), shape=SHAPE, duration_s=300))
    times, ok = run.requests["scheduled"], run.requests["ok"]
    assert ok[times < 95].all() and ok[times > 160].all()
    silent = (times > 101) & (times < 145)
    assert ok[silent].mean() == pytest.approx(0.5, abs=0.02)


def test_a_deleted_pod_costs_a_model_load_on_its_node():
    fleet = Fleet(autoscaling=None, warm=1, faults=Faults(pod_deletions=(100.0,)))
    run = simulate_fleet(T4.on(fleet), traffic(4, 400.0))
    ready = [(number.at, number.ready) for number in counts(run.timeline) if number.at > 0]
    gone, back = (next(at for at, count in ready if count == wanted) for wanted in (0, 1))
    assert gone == 100.0
    assert 68 < back - gone < 95, "the node has the image"
    assert seconds_without_replica(run) == pytest.approx(back - gone)
    assert max(number.nodes for number in counts(run.timeline)) == 1


@pytest.mark.parametrize(("grace_s", "finishes"), [(30, True), (5, False)])
def test_a_deleted_pod_finishes_what_it_has_while_it_drains(grace_s, finishes):
    """vLLM is told to drain for all of the grace period but 5 s; without that SIGTERM aborts what runs."""
    fleet = Fleet(autoscaling=None, warm=1, grace_s=grace_s, faults=Faults(pod_deletions=(20.0,)))
    long = Shape(prompt_tokens=64, output_tokens=1024)
    run = simulate_fleet(T4.on(fleet), Workload(arrivals=Constant(rate=1), shape=long, duration_s=21))
    running = run.requests["scheduled"] < 19.0
    late = running & (run.requests["last_token"] > 23.5)
    assert run.requests["ok"][running].all() == finishes
    assert late.any() == finishes


def test_a_fleet_that_never_comes_up_is_evidence_of_that():
    run = simulate_fleet(T4.on(Fleet(faults=Faults(never_allocatable=True))), traffic(2, 300.0))
    assert delivery_ratio(run) == 0.0
    assert not run.problems
    assert counts(run.timeline)[-1].nodeclaims == 0


def test_what_a_fleet_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="leave timeout_s out"):
        simulate_fleet(T4.on(FROM_ZERO), traffic(timeout_s=5.0))


@pytest.mark.slow
@pytest.mark.skipif(sys.gettrace() is not None, reason="coverage and debuggers slow it down several times")
@pytest.mark.parametrize("fleet", [FROM_ZERO, WARM_ONE], ids=["from zero", "warm"])
def test_an_hour_at_24_requests_a_second_takes_about_a_second(fleet):
    """The aim is a second on an idle machine; the assertion leaves room for a busy one."""
    workload = traffic(24, 3600.0)
    simulate_fleet(T4.on(fleet), traffic(1, 10.0))
    start = time.process_time()
    run = simulate_fleet(T4.on(fleet), workload)
    assert time.process_time() - start < 3.0
    assert run.totals["request_success_total"] > 70_000
