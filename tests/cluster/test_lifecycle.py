"""The controllers together, in virtual time: cold start, faults, and the way back to zero nodes."""

from __future__ import annotations

import pytest

from pytest_gpulab.cluster.conditions import condition, is_true
from pytest_gpulab.cluster.embedded import DeadlineExceeded
from pytest_gpulab.cluster.objects import at, name_of
from pytest_gpulab.cluster.resources import DEPLOYMENT, ENDPOINTS, EVENT, HPA, NODE, NODE_CLAIM, NODE_POOL, POD
from pytest_gpulab.cluster.service import ready_pods
from pytest_gpulab.cluster.timeline import Timeline
from pytest_gpulab.fleet import Faults, Shortage
from pytest_gpulab.timeline import STAGES, cold_start
from tests.cluster.scene import cluster, deployment, hpa, pool


def pods(made):
    return made.store.list(POD)


def ready(made, count=1):
    return lambda: len(ready_pods(made.store, "vllm", "default")) >= count


def everything(made):
    return lambda: (*made.store.list(NODE_CLAIM), *made.store.list(NODE), *pods(made))


def no_nodes(made):
    return lambda: not made.store.list(NODE) and not made.store.list(NODE_CLAIM)


def tear_down(made):
    """As the lab does it: workloads first, then the pools, whose NodeClaims go with them."""
    for kind in (HPA, DEPLOYMENT):
        if made.store.find(kind, "vllm", "default"):
            made.store.delete(kind, "vllm", "default")
    for found in made.store.list(NODE_POOL):
        made.store.delete(NODE_POOL, name_of(found))
    took = made.wait("zero nodes", no_nodes(made), 1800, everything(made))
    assert not pods(made)
    assert all(instance.gone is not None for instance in made.cloud.instances.values())
    return took


def run_for(made, seconds):
    made.clock.run_until(made.clock.now() + seconds)


def events(made, reason):
    return [event for event in made.store.list(EVENT) if event["reason"] == reason]


# --- cold start


def cold(seed):
    made = cluster(seed=seed)
    timeline = Timeline(made.store, made.clock, made.clock.now())
    made.wait("ready", ready(made), 900, everything(made))
    return cold_start(timeline.entries())


def test_cold_start_stages_are_those_that_were_measured():
    """Means of 40 seeds against the published g4dn cold start, seconds from the trigger."""
    runs = [cold(seed) for seed in range(40)]
    means = {stage: sum(run[stage] for run in runs) / len(runs) for stage in STAGES}
    assert all(3 <= run["nodeclaim"] <= 12 for run in runs)
    assert means["node"] == pytest.approx(35, abs=1.5)
    assert means["scheduled"] == pytest.approx(65, abs=1.5)
    assert 352 <= means["container"] <= 359
    assert 425 <= means["ready"] <= 439
    assert all(list(run.values()) == sorted(run.values()) for run in runs)


def test_the_same_seed_gives_the_same_cluster():
    def trace(seed):
        made = cluster(seed=seed)
        timeline = Timeline(made.store, made.clock, made.clock.now())
        made.wait("ready", ready(made), 900, everything(made))
        tear_down(made)
        return timeline.entries()

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)


def test_a_node_claim_goes_through_its_conditions_in_order_and_holds_its_finalizer_first():
    made = cluster()
    seen = []
    made.store.subscribe(
        lambda event: seen.append(
            (
                tuple(kind for kind in ("Launched", "Registered", "Initialized") if is_true(event.object, kind)),
                bool(event.object["metadata"].get("finalizers")),
            )
        ),
        NODE_CLAIM,
    )
    made.wait("ready", ready(made), 900, everything(made))
    assert all(finalizer for _, finalizer in seen)
    kinds = [done for done, _ in seen]
    assert kinds == sorted(kinds, key=len)
    assert kinds[-1] == ("Launched", "Registered", "Initialized")


def test_somebody_elses_finalizer_outlives_the_machine():
    made = cluster()
    made.wait("ready", ready(made), 900, everything(made))
    (claim,) = made.store.list(NODE_CLAIM)
    finalizers = [*claim["metadata"]["finalizers"], "example.com/audit"]
    made.store.patch(NODE_CLAIM, name_of(claim), "", {"metadata": {"finalizers": finalizers}})
    made.store.delete(NODE_CLAIM, name_of(claim))
    made.wait(
        "the end of its node", lambda: not made.store.find(NODE, at(claim, "status.nodeName")), 1800, everything(made)
    )
    held = made.store.find(NODE_CLAIM, name_of(claim))
    assert held["metadata"]["finalizers"] == ["example.com/audit"]
    made.store.patch(NODE_CLAIM, name_of(claim), "", {"metadata": {"finalizers": None}})
    assert made.store.find(NODE_CLAIM, name_of(claim)) is None


def test_a_second_pod_on_a_node_does_not_pull_again():
    made = cluster()
    first = made.wait("ready", ready(made), 900, everything(made))
    made.store.delete(POD, name_of(pods(made)[0]), "default")
    made.clock.run_until(made.clock.now() + 0.01)
    again = made.wait("ready again", ready(made), 900, everything(made))
    assert again < first - 300
    assert len(made.cloud.instances) == 1


# --- the way back


def test_an_empty_node_goes_after_consolidate_after_poll_and_validation():
    made = cluster()
    made.wait("ready", ready(made), 900, everything(made))
    made.store.delete(DEPLOYMENT, "vllm", "default")
    start = made.clock.now()
    deleting = made.wait(
        "disrupted", lambda: any(c["metadata"].get("deletionTimestamp") for c in made.store.list(NODE_CLAIM)), 300,
        everything(made),
    )  # fmt: skip
    assert 30 + 15 - 1 <= deleting <= 30 + 10 + 15 + 1, "consolidateAfter from the pod's end, then poll, validation"
    made.wait("zero", no_nodes(made), 600, everything(made))
    assert made.clock.now() - start < 120


@pytest.mark.parametrize("kind", [NODE, NODE_CLAIM])
def test_what_is_annotated_so_is_not_disrupted(kind):
    made = cluster()
    made.wait("ready", ready(made), 900, everything(made))
    (kept,) = made.store.list(kind)
    stay = {"metadata": {"annotations": {"karpenter.sh/do-not-disrupt": "true"}}}
    made.store.patch(kind, name_of(kept), "", stay)
    made.store.delete(DEPLOYMENT, "vllm", "default")
    run_for(made, 600)
    assert made.store.find(kind, name_of(kept)), "consolidateAfter is 30 s"
    made.store.patch(kind, name_of(kept), "", {"metadata": {"annotations": None}})
    made.wait("zero", no_nodes(made), 300, everything(made))


def test_a_pod_that_must_not_be_disrupted_is_drained_when_only_its_own_grace_is_left():
    """Five minutes of the node less thirty seconds of the pod."""
    made = cluster(spot=False, deployed=None)
    made.apply(NODE_POOL, pool("gpu-on-demand", "on-demand", terminationGracePeriod="5m"))
    stays = deployment()
    stays["spec"]["template"]["metadata"]["annotations"] = {"karpenter.sh/do-not-disrupt": "true"}
    made.apply(DEPLOYMENT, stays)
    made.wait("ready", ready(made), 900, everything(made))
    (claim,) = made.store.list(NODE_CLAIM)
    made.store.delete(NODE_CLAIM, name_of(claim))
    evicted = made.wait("evicted", lambda: bool(events(made, "Evicted")), 600, everything(made))
    assert evicted == pytest.approx(300 - 30, abs=2)
    gone = made.wait("gone", lambda: not made.store.find(NODE_CLAIM, name_of(claim)), 600, everything(made))
    assert gone < 60


def test_a_pod_that_comes_back_during_validation_keeps_the_node():
    made = cluster()
    made.wait("ready", ready(made), 900, everything(made))
    made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"replicas": 0}})
    made.wait("consolidatable", lambda: not pods(made), 100, everything(made))
    run_for(made, 40)
    made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"replicas": 1}})
    made.wait("ready", ready(made), 900, everything(made))
    assert len(made.cloud.instances) == 1


def test_a_node_that_pods_do_not_need_is_taken_and_they_move():
    made = cluster(spot=False, deployed=None)
    big = pool("big", "on-demand", weight=50)
    big["spec"]["template"]["spec"]["requirements"][1]["values"] = ["g4dn.12xlarge"]
    made.apply(NODE_POOL, big)
    made.apply(DEPLOYMENT, deployment(4))
    made.wait("ready", ready(made, 4), 900, everything(made))
    made.store.patch(NODE_POOL, "big", "", {"spec": {"limits": {"nvidia.com/gpu": "4"}}})
    made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"replicas": 5}})
    made.wait("five ready", ready(made, 5), 900, everything(made))
    assert len(made.store.list(NODE)) == 2
    made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"replicas": 3}})
    made.wait("one node", lambda: len(made.store.list(NODE)) == 1, 900, everything(made))
    made.wait("three ready", ready(made, 3), 900, everything(made))
    tear_down(made)


@pytest.mark.parametrize(("expires", "machines"), [("2h", 2), ("Never", 1)])
def test_a_machine_is_replaced_when_it_expires_whatever_the_budget(expires, machines):
    made = cluster(spot=False, deployed=None)
    found = pool("gpu-on-demand", "on-demand", expireAfter=expires)
    found["spec"]["disruption"]["budgets"] = [{"nodes": "0"}]
    made.apply(NODE_POOL, found)
    made.apply(DEPLOYMENT, deployment())
    made.wait("ready", ready(made), 900, everything(made))
    first = made.cloud.instances["i-00000000000000001"]
    run_for(made, 7200 - 900)
    assert first.stopped is None
    run_for(made, 900 + 900)
    assert len(made.cloud.instances) == machines
    assert (first.stopped is None) == (expires == "Never")
    assert ready(made)()


@pytest.mark.parametrize(("reasons", "stays"), [(["Empty"], True), (["Underutilized"], False), (None, True)])
def test_a_budget_holds_empty_nodes_if_it_is_for_them(reasons, stays):
    made = cluster(spot=False, deployed=None)
    found = pool("gpu-on-demand", "on-demand")
    found["spec"]["disruption"]["budgets"] = [{"nodes": "0", **({"reasons": reasons} if reasons else {})}]
    made.apply(NODE_POOL, found)
    made.apply(DEPLOYMENT, deployment())
    made.wait("ready", ready(made), 900, everything(made))
    made.store.delete(DEPLOYMENT, "vllm", "default")
    run_for(made, 600)
    assert bool(made.store.list(NODE)) == stays


# --- capacity


def test_without_spot_capacity_the_on_demand_pool_serves():
    made = cluster(faults=Faults(shortages=(Shortage(capacity_type="spot"),)))
    made.wait("ready", ready(made), 900, everything(made))
    assert [i.offering.capacity_type for i in made.cloud.instances.values()] == ["on-demand"]
    assert len(events(made, "InsufficientCapacityError")) == 1
    tear_down(made)


def test_a_shortage_is_asked_again_after_three_minutes():
    made = cluster(spot=False, faults=Faults(shortages=(Shortage(end_s=100.0),)))
    launched = made.wait("launched", lambda: bool(made.cloud.instances), 600, everything(made))
    assert 180 < launched < 180 + 40
    made.wait("ready", ready(made), 900, everything(made))


def test_no_capacity_at_all_ends_at_the_deadline_with_the_reason():
    made = cluster(faults=Faults(shortages=(Shortage(),)))
    with pytest.raises(DeadlineExceeded, match=r"Pod vllm-\w+-\w+ .*no instance type met the requirements"):
        made.wait("ready", ready(made), 900, lambda: tuple(pods(made)))
    tear_down(made)
    assert not made.cloud.instances


def test_pool_limits_hold_and_the_rest_waits_with_an_event():
    made = cluster(spot=False, deployed=6)
    made.wait("four ready", ready(made, 4), 900, everything(made))
    run_for(made, 300)
    assert len(made.store.list(NODE)) == 4
    waiting = [pod for pod in pods(made) if not pod["spec"].get("nodeName")]
    assert len(waiting) == 2
    assert any("exceed limits for nodepool" in event["message"] for event in events(made, "FailedScheduling"))
    tear_down(made)


# --- machines that misbehave


def test_a_spot_interruption_moves_the_pod_before_the_machine_goes():
    made = cluster(faults=Faults(interruptions=(600.0,)))
    made.wait("ready", ready(made), 900, everything(made))
    made.clock.run_until(made.cloud._start + 600.0)
    made.wait("gone", lambda: len(made.store.list(NODE_CLAIM)) == 1, 200, everything(made))
    took = made.wait("ready again", ready(made), 900, everything(made))
    assert took > 300, "a new node has to pull the image"
    first, second = (instance.offering for instance in made.cloud.instances.values())
    assert (first.capacity_type, second.capacity_type) == ("spot", "spot")
    assert first.zone != second.zone, "what was taken back is not asked for again at once"
    assert events(made, "SpotInterrupted")
    tear_down(made)


def test_a_lost_machine_is_replaced():
    made = cluster(faults=Faults(losses=(600.0,)))
    made.wait("ready", ready(made), 900, everything(made))
    made.clock.run_until(made.cloud._start + 600.0)
    assert ready(made)(), "nobody has noticed yet"
    unready = made.wait("noticed", lambda: not ready(made)(), 300, everything(made))
    assert 50 <= unready <= 56
    made.wait("ready again", ready(made), 900, everything(made))
    assert len(made.cloud.instances) == 2
    tear_down(made)


def test_a_lost_machines_claim_goes_with_its_node_and_is_no_room_for_its_pods():
    """Missed after 50 s by a look every 5 s, deleted by the next; its pods are collected, and bought for at once."""
    made = cluster(faults=Faults(losses=(600.0,)))
    made.wait("ready", ready(made), 900, everything(made))
    made.clock.run_until(made.cloud._start + 600.0)
    made.wait("deleted", lambda: not made.store.list(NODE), 300, everything(made))
    run_for(made, 0.01)
    first = made.cloud.instances["i-00000000000000001"]
    assert 55 <= made.clock.now() - first.gone <= 61
    assert not any(at(claim, "status.providerID") == first.provider_id for claim in made.store.list(NODE_CLAIM))
    (lost,) = (name_of(pod) for pod in pods(made))
    made.wait("collected", lambda: made.store.find(POD, lost, "default") is None, 120, everything(made))
    made.wait("replaced", lambda: len(made.cloud.instances) == 2, 12, everything(made))


def test_a_node_that_somebody_deletes_is_drained_and_takes_its_machine_along():
    made = cluster(spot=False)
    made.wait("ready", ready(made), 900, everything(made))
    (node,) = made.store.list(NODE)
    made.store.delete(NODE, name_of(node))
    run_for(made, 1)
    (leaving,) = made.store.list(NODE)
    assert {"key": "karpenter.sh/disrupted", "effect": "NoSchedule"} in at(leaving, "spec.taints")
    (evicted,) = events(made, "Evicted")
    assert name_of(node) in evicted["message"]
    first = made.cloud.instances["i-00000000000000001"]
    made.wait("billed no longer", lambda: first.stopped is not None, 60, everything(made))
    made.wait("gone", lambda: made.store.find(NODE, name_of(node)) is None, 300, everything(made))
    made.wait("ready again", ready(made), 900, everything(made))
    assert len(made.store.list(NODE_CLAIM)) == len(made.store.list(NODE)) == 1
    tear_down(made)


def test_a_machine_that_never_registers_is_given_up_after_fifteen_minutes_and_tried_again():
    made = cluster(faults=Faults(never_register=True))
    made.wait("launched", lambda: bool(made.cloud.instances), 60, everything(made))
    made.wait("second try", lambda: len(made.cloud.instances) == 2, 1000, everything(made))
    first = made.cloud.instances["i-00000000000000001"]
    assert first.stopped - first.launched == pytest.approx(900, abs=15)
    assert events(made, "RegistrationTimeout")
    with pytest.raises(DeadlineExceeded, match=r"NodeClaim gpu-spot-\w+ \(.*Registered=Unknown.*: .*Launched"):
        made.wait("ready", ready(made), 300, lambda: tuple(made.store.list(NODE_CLAIM)))
    tear_down(made)


def test_a_gpu_that_never_appears_ends_at_the_labs_own_deadline():
    """Karpenter has no initialization timeout: the node would stay for ever."""
    made = cluster(faults=Faults(never_allocatable=True))
    with pytest.raises(
        DeadlineExceeded,
        match=r'NodeClaim gpu-spot-\w+ \(.*ResourceNotRegistered Resource "nvidia.com/gpu" was requested but not '
        r"registered.*: .*Registered: Node ip-10-0-0-5",
    ):
        made.wait("ready", ready(made), 3600, lambda: tuple(made.store.list(NODE_CLAIM)))
    assert len(made.cloud.instances) == 1
    tear_down(made)


def test_a_launch_that_hangs_is_given_up_after_five_minutes():
    made = cluster(faults=Faults(launch_hangs=True))
    made.wait("given up", lambda: bool(events(made, "LaunchTimeout")), 400, everything(made))
    assert not made.cloud.instances
    tear_down(made)


# --- containers that misbehave


def test_an_image_that_does_not_exist_backs_off_and_says_so():
    made = cluster(faults=Faults(bad_images=("vllm/vllm-openai@sha256:1",)))
    with pytest.raises(DeadlineExceeded, match="Back-off pulling image"):
        made.wait("ready", ready(made), 900, lambda: tuple(pods(made)))
    (pod,) = pods(made)
    assert at(pod, "status.containerStatuses")[0]["state"]["waiting"]["reason"] == "ImagePullBackOff"
    assert at(pod, "status.phase") == "Pending"
    tear_down(made)


def test_a_container_that_dies_is_restarted_with_backoff():
    made = cluster(faults=Faults(crash_after_s=20.0))
    made.wait("scheduled", lambda: bool(events(made, "Started")), 900, everything(made))
    run_for(made, 300)
    (pod,) = pods(made)
    status = at(pod, "status.containerStatuses")[0]
    # Runs of 20 s with waits of 10, 20, 40, 80, 160 s and a second each to start: the fifth wait begins at 255 s.
    assert status["restartCount"] == 5
    assert status["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    assert not ready(made)()
    tear_down(made)


def test_a_startup_probe_that_gives_up_too_early_kills_the_server():
    made = cluster(deployed=None)
    impatient = deployment()
    probe = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 5, "failureThreshold": 6}
    impatient["spec"]["template"]["spec"]["containers"][0]["startupProbe"] = probe
    made.apply(DEPLOYMENT, impatient)
    made.wait("killed", lambda: bool(events(made, "Unhealthy")), 900, everything(made))
    run_for(made, 600)
    assert not ready(made)()
    tear_down(made)


def test_a_pod_that_ends_leaves_the_endpoints_at_once_and_takes_its_time():
    made = cluster(deployed=None)
    patient = deployment()
    patient["spec"]["template"]["spec"]["containers"][0]["lifecycle"] = {"preStop": {"sleep": {"seconds": 20}}}
    made.apply(DEPLOYMENT, patient)
    made.wait("ready", ready(made), 900, everything(made))
    (pod,) = pods(made)
    made.store.delete(DEPLOYMENT, "vllm", "default")
    run_for(made, 1)
    assert not ready(made)()
    assert made.kubelets.serving(pod)
    gone = made.wait("gone", lambda: not pods(made), 60, everything(made))
    assert 19 + 1 <= gone <= 20 + 3


# --- autoscaler


def scaled(values, seconds, **options):
    made = cluster(read=lambda pod: values(made.clock.now() - made.cloud._start), **options)
    made.apply(HPA, hpa())
    run_for(made, seconds)
    return made


def test_the_autoscaler_first_looks_15_seconds_after_it_appeared():
    made = cluster()
    made.apply(HPA, hpa())
    run_for(made, 14.9)
    assert condition(made.store.get(HPA, "vllm", "default"), "AbleToScale") is None
    run_for(made, 0.2)
    assert is_true(made.store.get(HPA, "vllm", "default"), "AbleToScale")


def test_it_cannot_scale_on_pending_pods():
    made = scaled(lambda now: {"vllm:num_requests_running": 100.0}, 200)
    found = made.store.get(HPA, "vllm", "default")
    assert condition(found, "ScalingActive")["reason"] == "FailedGetPodsMetric"
    assert made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] == 1


def test_it_leaves_zero_replicas_alone():
    made = scaled(lambda now: None, 100, deployed=0)
    assert condition(made.store.get(HPA, "vllm", "default"), "ScalingActive")["reason"] == "ScalingDisabled"
    assert made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] == 0


def test_it_scales_up_on_pressure_and_back_after_five_minutes():
    made = scaled(lambda now: {"vllm:num_requests_running": 12.0 if now < 1100 else 0.0}, 600)
    assert made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] == 3, "12 / 4 on one pod"
    run_for(made, 450)
    assert made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] == 4, "9 for three that serve: the most"
    run_for(made, 60 + 300)
    assert made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] == 4, "5 min after the last sample"
    run_for(made, 90)
    assert made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["replicas"] == 1
    tear_down(made)


def test_endpoints_follow_readiness():
    made = cluster(deployed=2)
    made.wait("one", ready(made), 900, everything(made))
    made.wait("two", ready(made, 2), 100, everything(made))
    subset = made.store.get(ENDPOINTS, "vllm", "default")["subsets"][0]
    assert len(subset["addresses"]) == 2
    assert len({address["ip"] for address in subset["addresses"]}) == 2
