"""Jobs in virtual time, as kubernetes.io/docs/concepts/workloads/controllers/job describes them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulab.cluster.auto_mode import DEFAULT_CLASS
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.cloud import INSTANCE_TYPES, catalog
from pytest_gpulab.cluster.embedded import EmbeddedCluster
from pytest_gpulab.cluster.environment import environment
from pytest_gpulab.cluster.errors import Invalid
from pytest_gpulab.cluster.jobs import indexes, spans
from pytest_gpulab.cluster.objects import at, is_deleting, name_of, seconds
from pytest_gpulab.cluster.resources import JOB, NODE_CLASS, NODE_POOL, POD
from tests.cluster import scene

PREFIX = "batch.kubernetes.io/"


class Jobs:
    """A cluster whose pods run until they are told to end."""

    def __init__(self, **spec: Any) -> None:
        self.made = EmbeddedCluster(VirtualClock(), offerings=catalog(INSTANCE_TYPES))
        self.made.apply(NODE_CLASS, DEFAULT_CLASS)
        self.made.apply(NODE_POOL, scene.pool("cpu", "on-demand", gpus=20))
        self.made.kubelets.hooks.starts = lambda pod: True
        self.store = self.made.store
        self.create(**spec)

    def create(self, **spec: Any) -> None:
        policy = spec.pop("restartPolicy", "Never")
        pod = {
            "restartPolicy": policy,
            "containers": [{"name": "main", "image": "example.org/tool:1", "env": [{"name": "A", "value": "b"}]}],
            "nodeSelector": {"lab/pool": "gpu"},
            "tolerations": [{"operator": "Exists"}],
        }
        job = {"metadata": {"name": "work"}, "spec": {"template": {"spec": pod}, **spec}}
        self.store.create(JOB, job, "default")

    @property
    def job(self) -> dict[str, Any]:
        return self.store.get(JOB, "work", "default")

    @property
    def status(self) -> dict[str, Any]:
        return self.job["status"]

    def pods(self, phase: str = "") -> list[dict[str, Any]]:
        found = [pod for pod in self.store.list(POD) if not is_deleting(pod)]
        return [pod for pod in found if phase in ("", at(pod, "status.phase"))]

    def running(self, count: int) -> list[dict[str, Any]]:
        """The running pods, oldest first, once there are so many."""
        self.until(lambda: len(self.pods("Running")) == count)
        return self.pods("Running")

    def until(self, holds: Any, seconds: float = 2000.0) -> None:
        self.made.wait("it", holds, seconds, lambda: tuple(self.store.list(JOB)))

    def pass_time(self, seconds: float) -> None:
        self.made.clock.run_until(self.made.clock.now() + seconds)

    def end(self, pod: dict[str, Any], code: int = 0) -> None:
        self.made.kubelets.exited(pod, code)
        self.pass_time(0.01)

    def condition(self, kind: str) -> dict[str, Any] | None:
        return next((one for one in self.status.get("conditions", ()) if one["type"] == kind), None)


def indexed(**spec: Any) -> Jobs:
    return Jobs(completionMode="Indexed", **spec)


def test_each_index_runs_once_and_then_the_job_is_complete() -> None:
    jobs = indexed(completions=3, parallelism=2, backoffLimit=0)
    first, second = jobs.running(2)
    assert [pod["metadata"]["labels"][PREFIX + "job-completion-index"] for pod in (first, second)] == ["0", "1"]
    assert (jobs.status["active"], jobs.status.get("succeeded")) == (2, None)
    jobs.end(second)
    assert (jobs.status["succeeded"], jobs.status["completedIndexes"], jobs.status["active"]) == (1, "1", 2)
    pods = jobs.running(2)
    assert {pod["metadata"]["annotations"][PREFIX + "job-completion-index"] for pod in pods} == {"0", "2"}
    for pod in pods:
        assert jobs.condition("Complete") is None
        jobs.end(pod)
    status = jobs.status
    assert (status["succeeded"], status["completedIndexes"], status.get("failed")) == (3, "0-2", None)
    complete = jobs.condition("Complete")
    assert complete is not None and (complete["status"], complete["reason"]) == ("True", "CompletionsReached")
    assert jobs.condition("SuccessCriteriaMet") is not None and status["completionTime"]
    assert len(jobs.pods("Succeeded")) == 3, "they stay, so that their logs can be read"
    assert not [pod for pod in jobs.pods() if pod["metadata"].get("finalizers")]


def test_a_pod_knows_its_index_and_belongs_to_its_job() -> None:
    jobs = indexed(completions=1, parallelism=1)
    (pod,) = jobs.running(1)
    job = jobs.job
    assert name_of(pod).startswith("work-0-") and pod["spec"]["hostname"] == "work-0"
    assert environment(jobs.store, pod, pod["spec"]["containers"][0]) == {"A": "b", "JOB_COMPLETION_INDEX": "0"}
    labels, uid = pod["metadata"]["labels"], job["metadata"]["uid"]
    assert (labels[PREFIX + "job-name"], labels["job-name"]) == ("work", "work")
    assert labels[PREFIX + "controller-uid"] == labels["controller-uid"] == uid
    assert job["spec"]["selector"] == {"matchLabels": {PREFIX + "controller-uid": uid}}
    assert pod["metadata"]["ownerReferences"][0]["uid"] == uid


def test_one_failure_fails_a_job_without_retries_and_ends_the_others() -> None:
    jobs = indexed(completions=3, parallelism=3, backoffLimit=0)
    first, *others = jobs.running(3)
    jobs.end(first, 137)
    target = jobs.condition("FailureTarget")
    assert target is not None and target["reason"] == "BackoffLimitExceeded"
    assert jobs.condition("Failed") is None, "the others have not ended"
    jobs.until(lambda: jobs.condition("Failed"))
    assert len(jobs.store.list(POD)) == 1, "nothing was started again"
    (state,) = jobs.store.list(POD)[0]["status"]["containerStatuses"]
    assert (state["state"]["terminated"]["exitCode"], state["state"]["terminated"]["reason"]) == (137, "Error")
    assert jobs.status["failed"] == 3 and "active" not in jobs.status
    assert others


@pytest.mark.parametrize("grace", [None, 0])
def test_a_deleted_pod_has_failed(grace: int | None) -> None:
    jobs = indexed(completions=2, parallelism=2, backoffLimit=0)
    pod, _ = jobs.running(2)
    jobs.store.delete(POD, name_of(pod), "default", grace=grace)
    jobs.until(lambda: jobs.condition("Failed"))
    assert jobs.store.list(POD) == []


def test_failed_pods_are_made_again_later_and_later() -> None:
    jobs = indexed(completions=1, parallelism=1, backoffLimit=3)
    waits = []
    for _ in range(3):
        (pod,) = jobs.running(1)
        jobs.end(pod, 1)
        failed = jobs.made.clock.now()
        jobs.until(lambda: jobs.pods("Pending") or jobs.pods("Running"))
        waits.append(jobs.made.clock.now() - failed)
    assert waits == pytest.approx([10, 20, 40], abs=0.1)
    (pod,) = jobs.running(1)
    jobs.end(pod, 1)
    assert jobs.condition("Failed") and jobs.status["failed"] == 4


def test_the_deadline_ends_a_job_that_runs_and_one_that_waits() -> None:
    runs = indexed(completions=1, parallelism=1, activeDeadlineSeconds=600)
    runs.running(1)
    waits = indexed(completions=1, parallelism=1, activeDeadlineSeconds=600)
    waits.store.delete(NODE_POOL, "cpu")
    for jobs in (runs, waits):
        jobs.pass_time(0.01)
        started = seconds(jobs.status["startTime"])
        jobs.until(lambda jobs=jobs: jobs.condition("Failed"))
        failed = jobs.condition("Failed")
        assert failed is not None and failed["reason"] == "DeadlineExceeded"
        assert 600 <= jobs.made.clock.now() - started < 640
        assert jobs.store.list(POD) == []


def test_a_finished_job_and_its_pods_go_when_their_time_is_over() -> None:
    jobs = indexed(completions=1, parallelism=1, ttlSecondsAfterFinished=100)
    (pod,) = jobs.running(1)
    jobs.end(pod)
    jobs.pass_time(98)
    assert jobs.condition("Complete")
    jobs.pass_time(3)
    assert jobs.store.list(JOB) == [] and jobs.store.list(POD) == []


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_deleting_a_job_ends_its_pods(propagation: str) -> None:
    jobs = indexed(completions=3, parallelism=2)
    pod, _ = jobs.running(2)
    jobs.end(pod)
    jobs.store.delete(JOB, "work", "default", propagation=propagation)
    jobs.until(lambda: not jobs.store.list(POD) and not jobs.store.list(JOB))


def test_without_indexes_pods_are_alike() -> None:
    jobs = Jobs(completions=3, parallelism=5)
    pods = jobs.running(3)
    assert PREFIX + "job-completion-index" not in pods[0]["metadata"]["labels"]
    for pod in pods:
        jobs.end(pod)
    assert jobs.condition("Complete") and "completedIndexes" not in jobs.status


def test_without_completions_one_success_and_no_pod_left_is_enough() -> None:
    jobs = Jobs(parallelism=2)
    first, second = jobs.running(2)
    jobs.end(first)
    jobs.pass_time(60)
    assert len(jobs.pods("Running")) == 1 and jobs.condition("Complete") is None
    jobs.end(second)
    assert jobs.condition("Complete")


def test_a_container_that_is_restarted_in_place_counts_its_restarts() -> None:
    jobs = Jobs(completions=1, restartPolicy="OnFailure", backoffLimit=2)
    for _ in range(2):
        (pod,) = jobs.running(1)
        jobs.until(lambda: jobs.made.kubelets.process(jobs.pods()[0]) is not None)
        jobs.end(jobs.pods()[0], 1)
    jobs.until(lambda: jobs.condition("Failed"))
    succeeds = Jobs(completions=1, restartPolicy="OnFailure")
    (pod,) = succeeds.running(1)
    succeeds.end(pod, 0)
    assert succeeds.condition("Complete")


def test_a_suspended_job_runs_nothing_and_forgets_no_success() -> None:
    jobs = indexed(completions=2, parallelism=2, backoffLimit=0)
    first, _ = jobs.running(2)
    jobs.end(first)
    jobs.store.patch(JOB, "work", "default", {"spec": {"suspend": True}})
    jobs.until(lambda: not jobs.pods("Running"))
    jobs.pass_time(5)
    assert "startTime" not in jobs.status and "failed" not in jobs.status
    jobs.store.patch(JOB, "work", "default", {"spec": {"suspend": False}})
    (second,) = jobs.running(1)
    jobs.end(second)
    assert jobs.condition("Complete") and jobs.status["completedIndexes"] == "0,1"


def test_what_kubernetes_refuses_is_refused() -> None:
    with pytest.raises(Invalid, match="restartPolicy"):
        Jobs(restartPolicy="Always")
    with pytest.raises(Invalid, match="completions"):
        indexed(parallelism=2)
    jobs = indexed(completions=1)
    with pytest.raises(Invalid, match=r"spec\.completionMode"):
        jobs.store.patch(JOB, "work", "default", {"spec": {"completionMode": "NonIndexed"}})


@given(st.sets(st.integers(0, 40)))
def test_indexes_are_written_as_kubernetes_writes_them(numbers: set[int]) -> None:
    assert indexes(spans(numbers)) == numbers
    assert spans([1, 3, 4, 5, 7]) == "1,3-5,7" and spans([]) == "" and spans([2, 3]) == "2,3"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from(["succeed", "fail", "delete"]), st.integers(0, 9)), max_size=14),
)
def test_whatever_pods_do_a_job_counts_right(
    completions: int, parallelism: int, limit: int, acts: list[tuple[str, int]]
) -> None:
    """Never more pods than may run, no index twice, and an end that follows from what was counted."""
    jobs = indexed(completions=completions, parallelism=parallelism, backoffLimit=limit)
    failed, done = 0, set()
    for act, which in acts:
        finished = bool(jobs.condition("Complete") or jobs.condition("FailureTarget"))
        assert finished == (len(done) == completions or failed > limit)
        if finished:
            break
        pods = jobs.running(min(parallelism, completions - len(done)))
        numbers = [int(pod["metadata"]["labels"][PREFIX + "job-completion-index"]) for pod in pods]
        assert len(set(numbers)) == len(numbers) and done.isdisjoint(numbers)
        pod, number = pods[which % len(pods)], numbers[which % len(pods)]
        if act == "delete":
            jobs.store.delete(POD, name_of(pod), "default")
            jobs.pass_time(0.01)
        else:
            jobs.end(pod, 0 if act == "succeed" else 1)
        failed += act != "succeed"
        done |= {number} if act == "succeed" else set()
        assert indexes(jobs.status.get("completedIndexes", "")) == done
        assert jobs.status.get("failed", 0) >= failed
