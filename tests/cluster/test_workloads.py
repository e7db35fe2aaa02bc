"""Deployments and ReplicaSets."""

from __future__ import annotations

import pytest

from pytest_gpulab.cluster.api.validation import checked
from pytest_gpulab.cluster.conditions import condition, is_true
from pytest_gpulab.cluster.objects import is_deleting, name_of
from pytest_gpulab.cluster.resources import DEPLOYMENT, POD, REPLICA_SET
from pytest_gpulab.cluster.service import ready_pods
from pytest_gpulab.cluster.workloads import HASH_LABEL, REVISION, _victim_rank, fenceposts, template_hash
from pytest_gpulab.fleet import Faults, Shortage
from tests.cluster.scene import cluster, deployment, pool
from tests.cluster.test_lifecycle import everything, ready, run_for


@pytest.mark.parametrize(
    ("surge", "unavailable", "replicas", "expected"),
    [
        ("25%", "25%", 4, (1, 1)),
        ("25%", "25%", 1, (1, 0)),
        ("25%", "25%", 10, (3, 2)),
        (0, 0, 4, (0, 1)),
        (0, "10%", 4, (0, 1)),
        (2, 1, 4, (2, 1)),
    ],
)
def test_surge_rounds_up_and_unavailable_down(surge, unavailable, replicas, expected):
    assert fenceposts({"maxSurge": surge, "maxUnavailable": unavailable}, replicas) == expected


def pod(name, node="n", phase="Running", ready_since=None, restarts=0, cost=None, created="2026-01-01T00:00:00Z"):
    conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": ready_since}] if ready_since else []
    annotations = {} if cost is None else {"controller.kubernetes.io/pod-deletion-cost": str(cost)}
    status = {"phase": phase, "conditions": conditions, "containerStatuses": [{"restartCount": restarts}]}
    meta = {"name": name, "creationTimestamp": created, "resourceVersion": "1", "annotations": annotations}
    return {"metadata": meta, "spec": {"nodeName": node} if node else {}, "status": status}


def test_the_order_in_which_pods_are_given_up():
    noon, later = "2026-01-01T12:00:00Z", "2026-01-01T13:00:00Z"
    wanted = [
        pod("on no node", node=None, phase="Pending"),
        pod("pending", phase="Pending"),
        pod("not ready"),
        pod("cheap", ready_since=noon, cost=-1),
        pod("ready for a shorter time", ready_since=later),
        pod("restarted", ready_since=noon, restarts=3),
        pod("younger", ready_since=noon, created=noon),
        pod("oldest", ready_since=noon),
    ]
    shuffled = [wanted[i] for i in (7, 2, 5, 0, 6, 3, 1, 4)]
    assert [p["metadata"]["name"] for p in sorted(shuffled, key=_victim_rank)] == [
        p["metadata"]["name"] for p in wanted
    ]


def test_a_deployment_owns_a_replica_set_that_owns_its_pods():
    made = cluster(deployed=3)
    run_for(made, 1)
    (replica_set,) = made.store.list(REPLICA_SET)
    digest = template_hash(made.store.get(DEPLOYMENT, "vllm", "default")["spec"]["template"])
    assert name_of(replica_set) == f"vllm-{digest}"
    assert len(made.store.list(POD)) == 3
    made.store.delete(DEPLOYMENT, "vllm", "default")
    run_for(made, 60)
    assert not made.store.list(REPLICA_SET)
    assert not made.store.list(POD)


def progressing(made):
    found = condition(made.store.get(DEPLOYMENT, "vllm", "default"), "Progressing")
    return found["status"], found["reason"]


def test_a_rollout_without_progress_exceeds_its_deadline_until_it_goes_on():
    made = cluster(deployed=None, faults=Faults(shortages=(Shortage(end_s=1200.0),)))
    slow = deployment()
    slow["spec"]["progressDeadlineSeconds"] = 900
    made.apply(DEPLOYMENT, slow)
    run_for(made, 899)
    assert progressing(made) == ("True", "ReplicaSetUpdated")
    run_for(made, 3)
    assert progressing(made) == ("False", "ProgressDeadlineExceeded")
    made.wait("ready", ready(made), 1800, everything(made))
    run_for(made, 1)
    assert progressing(made) == ("True", "NewReplicaSetAvailable")


def test_a_completed_rollout_has_no_deadline_whatever_becomes_of_its_pods():
    """Kubernetes' own: what a deadline is for is a new template, not a node that is lost or replicas that wait."""
    made = cluster(spot=False)
    made.wait("ready", ready(made), 900, everything(made))
    run_for(made, 1)
    made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"replicas": 5}})
    run_for(made, 2400)
    assert len(ready_pods(made.store, "vllm", "default")) == 4, "the pool is full"
    assert progressing(made) == ("True", "NewReplicaSetAvailable")
    made.store.patch(
        DEPLOYMENT, "vllm", "default", {"spec": {"template": {"metadata": {"annotations": {"again": "1"}}}}}
    )
    run_for(made, 1)
    assert progressing(made) == ("True", "ReplicaSetUpdated")


def test_a_rollout_replaces_pods_without_losing_availability():
    made = cluster(spot=False, deployed=2)
    made.wait("two ready", ready(made, 2), 900, everything(made))
    restart = {"spec": {"template": {"metadata": {"annotations": {"kubectl.kubernetes.io/restartedAt": "now"}}}}}
    made.store.patch(DEPLOYMENT, "vllm", "default", restart)
    least, most = 2, 2
    old = {name_of(p) for p in made.store.list(POD)}

    def replaced():
        nonlocal least, most
        least = min(least, len(ready_pods(made.store, "vllm", "default")))
        most = max(most, sum(not p["metadata"].get("deletionTimestamp") for p in made.store.list(POD)))
        done = made.store.get(DEPLOYMENT, "vllm", "default")["status"]
        return done.get("updatedReplicas") == done.get("readyReplicas") == done.get("replicas") == 2

    made.wait("rolled out", replaced, 3000, everything(made))
    assert (least, most) == (2, 3), "25 % of 2: one more, none less"
    assert not old & {name_of(p) for p in made.store.list(POD) if not is_deleting(p)}
    assert is_true(made.store.get(DEPLOYMENT, "vllm", "default"), "Available")


def revisions(made):
    """Of the Deployment, and by replica set."""
    found = [made.store.get(DEPLOYMENT, "vllm", "default"), *made.store.list(REPLICA_SET)]
    return [int(obj["metadata"]["annotations"][REVISION]) for obj in found]


def rolled_back(made):
    """What `kubectl rollout undo` does: the template of the revision before the newest, with a null in it."""
    before = sorted(made.store.list(REPLICA_SET), key=lambda one: int(one["metadata"]["annotations"][REVISION]))[-2]
    template = before["spec"]["template"]
    labels = {key: value for key, value in template["metadata"]["labels"].items() if key != HASH_LABEL}
    meta = {**template["metadata"], "labels": labels, "creationTimestamp": None}
    live = made.store.get(DEPLOYMENT, "vllm", "default")
    changed = {**live, "spec": {**live["spec"], "template": {**template, "metadata": meta}}}
    made.store.update(DEPLOYMENT, checked(DEPLOYMENT, changed, "Strict")[0])
    run_for(made, 5)
    return before


def test_a_template_that_comes_back_is_the_newest_revision():
    made = cluster(deployed=1)
    run_for(made, 5)
    made.store.patch(DEPLOYMENT, "vllm", "default", {"spec": {"template": {"metadata": {"annotations": {"v": "2"}}}}})
    run_for(made, 5)
    assert revisions(made) == [2, 1, 2]
    first = rolled_back(made)
    assert revisions(made) == [3, 3, 2], "no third replica set"
    second = rolled_back(made)
    assert revisions(made) == [4, 3, 4], "back and forth"
    assert name_of(first) != name_of(second)
    assert rolled_back(made)["metadata"]["uid"] == first["metadata"]["uid"]


def test_recreate_stops_the_old_before_it_starts_the_new():
    made = cluster(deployed=None)
    single = deployment(1)
    single["spec"]["strategy"] = {"type": "Recreate"}
    made.apply(DEPLOYMENT, single)
    made.wait("ready", ready(made), 900, everything(made))
    change = {"spec": {"template": {"metadata": {"annotations": {"v": "2"}}}}}
    made.store.patch(DEPLOYMENT, "vllm", "default", change)
    most = 0

    def replaced():
        nonlocal most
        most = max(most, len(made.store.list(POD)))
        return ready(made)() and any(p["metadata"].get("annotations") for p in made.store.list(POD))

    made.wait("replaced", replaced, 900, everything(made))
    assert most == 1


def test_failed_scheduling_says_what_is_missing():
    made = cluster(deployed=None, spot=False)
    made.apply(DEPLOYMENT, deployment(nodeSelector={"zone": "mars"}))
    assert pool("x", "spot")
    run_for(made, 30)
    (waiting,) = made.store.list(POD)
    scheduled = waiting["status"]["conditions"][0]
    assert (scheduled["type"], scheduled["status"], scheduled["reason"]) == ("PodScheduled", "False", "Unschedulable")
