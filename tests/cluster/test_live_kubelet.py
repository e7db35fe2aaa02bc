"""What the kubelet asks and tells the servers behind the pods, in virtual time."""

from __future__ import annotations

import pytest

from pytest_gpulab.cluster.objects import at, name_of
from pytest_gpulab.cluster.resources import DEPLOYMENT, ENDPOINTS, NAMESPACE, POD, SECRET, SERVICE
from pytest_gpulab.cluster.service import ready_targets
from tests.cluster.scene import LABELS, cluster, deployment

GRACE_S, SLEEP_S = 60, 15


def up(made, **hooks):
    """The name of a pod that serves, and what its server is told, each with its time."""
    told = []
    for name, value in hooks.items():
        setattr(made.kubelets.hooks, name, value)
    for name in ("healthy", "terminated", "stopped"):
        getattr(made.kubelets.hooks, name).append(lambda pod, name=name: told.append((made.clock.now(), name)))
    container = {"lifecycle": {"preStop": {"sleep": {"seconds": SLEEP_S}}}}
    manifest = deployment(terminationGracePeriodSeconds=GRACE_S)
    manifest["spec"]["template"]["spec"]["containers"][0] |= container
    made.apply(DEPLOYMENT, manifest)
    made.wait("ready", lambda: ready(made), 900, lambda: made.store.list(POD))
    return name_of(made.store.list(POD)[0]), told


def ready(made):
    return ready_targets(made.store, "default", "vllm", {"number": 80})


def ended(made, pod):
    """Seconds from the deletion of a pod to its end."""
    start = made.clock.now()
    made.store.delete(POD, pod, "default")
    made.wait("the end", lambda: made.store.find(POD, pod, "default") is None, 200, lambda: ())
    return start, made.clock.now() - start


def test_sigterm_comes_after_the_sleep_and_the_process_ends_by_itself():
    made = cluster(deployed=None)
    pod, told = up(made)
    start, took = ended(made, pod)
    assert SLEEP_S + 1 <= took <= SLEEP_S + 3
    assert [(at - start, name) for at, name in told[1:3]] == [(SLEEP_S, "terminated"), (took, "stopped")]


def test_a_server_that_drains_has_until_the_end_of_the_grace_period():
    made = cluster(deployed=None)
    pod, told = up(made, drains=lambda pod: True)
    start, took = ended(made, pod)
    assert took == GRACE_S
    assert told[2] == (start + GRACE_S, "stopped")


def test_a_server_that_has_drained_ends_within_a_second():
    made = cluster(deployed=None)
    work = {"until": float("inf")}
    pod, _ = up(made, drains=lambda pod: made.clock.now() < work["until"])
    work["until"] = made.clock.now() + 30
    assert 30 <= ended(made, pod)[1] <= 31


def test_the_pod_is_ready_when_its_server_answers():
    made = cluster(deployed=None)
    late = {"at": float("inf")}

    def healthy(pod):
        late["at"] = made.clock.now() + 17

    made.kubelets.hooks.healthy.append(healthy)
    up(made, answers=lambda pod: made.clock.now() >= late["at"])
    assert 0 <= made.clock.now() - late["at"] <= 5, "the next probe finds it"


@pytest.mark.parametrize("policy", ["File", "FallbackToLogsOnError"])
def test_a_refusal_is_a_crash_loop(policy):
    made = cluster(deployed=None)
    made.kubelets.hooks.refusal = lambda pod: "unknown flag --x"
    manifest = deployment()
    manifest["spec"]["template"]["spec"]["containers"][0]["terminationMessagePolicy"] = policy
    made.apply(DEPLOYMENT, manifest)

    def container():
        statuses = [at(pod, "status.containerStatuses", [{}])[0] for pod in made.store.list(POD)]
        return next((status for status in statuses if status.get("restartCount", 0) >= 2), None)

    made.wait("restarts", container, 900, lambda: made.store.list(POD))
    assert at(container(), "state.waiting.reason") == "CrashLoopBackOff"
    assert at(container(), "lastState.terminated.exitCode") == 1
    told = "unknown flag --x" if policy == "FallbackToLogsOnError" else None
    assert at(container(), "lastState.terminated.message") == told


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, 'secret "keys" not found'),
        ({"other": "YQ=="}, "couldn't find key key in Secret default/keys"),
        ({"key": "not base64!"}, "is no text"),
    ],
)
def test_a_secret_that_is_missing_or_wrong(data, why):
    made = cluster(deployed=None)
    if data:
        made.apply(SECRET, {"metadata": {"name": "keys"}, "data": data})
    manifest = deployment()
    reference = {"secretKeyRef": {"name": "keys", "key": "key"}}
    manifest["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "KEY", "valueFrom": reference}]
    made.apply(DEPLOYMENT, manifest)

    def waiting():
        states = [at(pod, "status.containerStatuses", [{}])[0].get("state") for pod in made.store.list(POD)]
        return [s["waiting"] for s in states if at(s, "waiting.reason") == "CreateContainerConfigError"]

    made.wait("the error", waiting, 900, lambda: made.store.list(POD))
    assert why in waiting()[0]["message"]
    made.apply(SECRET, {"metadata": {"name": "keys"}, "data": {"key": "YQ=="}})
    made.wait("ready", lambda: ready(made), 200, lambda: made.store.list(POD))


def test_a_service_port_may_name_the_container_port():
    made = cluster(deployed=None)
    ports = [
        {"name": "web", "port": 80, "targetPort": "http"},
        {"name": "none", "port": 81, "targetPort": "unknown"},
    ]
    made.apply(SERVICE, {"metadata": {"name": "named"}, "spec": {"selector": LABELS, "ports": ports}})
    manifest = deployment()
    manifest["spec"]["template"]["spec"]["containers"][0]["ports"] = [{"name": "http", "containerPort": 8000}]
    made.apply(DEPLOYMENT, manifest)
    made.wait("ready", lambda: ready(made), 900, lambda: made.store.list(POD))
    uid = made.store.list(POD)[0]["metadata"]["uid"]
    for port in ({"number": 80}, {"name": "web"}):
        assert ready_targets(made.store, "default", "named", port) == [(uid, 8000)]
    for port in ({"number": 81}, {"name": "none"}, {"number": 82}, {}):
        assert ready_targets(made.store, "default", "named", port) == []
    assert made.store.get(ENDPOINTS, "named", "default")["subsets"][0]["ports"] == [
        {"port": 8000, "protocol": "TCP", "name": "web"}
    ]


def test_the_pods_of_a_namespace_that_is_deleted_end():
    made = cluster(deployed=None)
    made.apply(NAMESPACE, {"metadata": {"name": "lab"}})
    made.apply(DEPLOYMENT, {**deployment(), "metadata": {"name": "vllm", "namespace": "lab"}})

    def running():
        return [pod for pod in made.store.list(POD, "lab") if at(pod, "status.phase") == "Running"]

    made.wait("running", running, 900, lambda: made.store.list(POD))
    made.store.delete(NAMESPACE, "lab")
    made.wait("the end", lambda: made.store.find(NAMESPACE, "lab") is None, 60, lambda: made.store.list(POD))
