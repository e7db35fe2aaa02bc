"""Jobs: pods are made until as many have succeeded as are wanted, or until it is clear that they will not.

Facts from Kubernetes 1.32, pkg/controller/job and kubernetes.io/docs/concepts/workloads/controllers/job: a pod counts
once, held by a finalizer until it has; one that is deleted before it succeeded has failed; failed pods are made again
after 10 s, doubled with each failure in a row, up to 6 min; a Job is Failed or Complete when all its pods have ended.
Not here: success policies, pod failure policies, and limits for each index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.conditions import is_true, since, with_condition, with_status
from pytest_gpulab.cluster.events import Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import (
    Object,
    at,
    controller_of,
    is_deleting,
    name_of,
    namespace_of,
    owner_reference,
    seconds,
    timestamp,
    uid_of,
)
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import JOB, POD
from pytest_gpulab.cluster.scheduler import is_terminal
from pytest_gpulab.cluster.store import Store

TRACKING: Final = "batch.kubernetes.io/job-tracking"
"""Finalizer of a pod that has not been counted."""
INDEX: Final = "batch.kubernetes.io/job-completion-index"
INDEX_VARIABLE: Final = "JOB_COMPLETION_INDEX"
FIRST_BACKOFF_S: Final = 10.0
LONGEST_BACKOFF_S: Final = 360.0


@dataclass
class _Failures:
    """In a row, without a success between them."""

    count: int = 0
    last: float = -math.inf


class Jobs:
    """Runs the pods of each Job, and removes Jobs whose time after the end is over."""

    watches = (JOB, POD)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._events = Recorder(store, clock, "job-controller")
        self._failures: dict[str, _Failures] = {}

    def refs(self, event: Event) -> Iterable[Ref]:
        """A changed Job, or the one a changed pod belongs to."""
        if event.resource is JOB:
            return (ref_of(event),)
        owner = controller_of(event.object)
        return ((owner["name"], namespace_of(event.object)),) if owner and owner["kind"] == "Job" else ()

    def reconcile(self, ref: Ref) -> float | None:
        """Count, decide, make or delete pods, report; seconds until a deadline or a backoff is over."""
        job = self._store.find(JOB, *ref)
        self._release_orphans(ref, job)
        if job is None or is_deleting(job):
            return None
        if _is_finished(job):
            self._let_go(self._pods(job))
            return self._expire(job)
        ended = [pod for pod in self._pods(job) if _has_ended(pod) and TRACKING in finalizers_of(pod)]
        job, again = self._decided(self._counted(job, ended))
        self._write(job)
        self._let_go(ended)
        if _is_finished(job):
            self._failures.pop(uid_of(job), None)
            return self._expire(job)
        return again

    # what has become of the pods

    def _pods(self, job: Object) -> list[Object]:
        return [pod for kind, pod in self._store.dependents(job) if kind is POD]

    def _counted(self, job: Object, ended: list[Object]) -> Object:
        """The Job with these pods in its status."""
        failures = self._failures.setdefault(uid_of(job), _Failures())
        done = indexes(at(job, "status.completedIndexes", ""))
        succeeded, failed = at(job, "status.succeeded", 0), at(job, "status.failed", 0)
        for pod in ended:
            if at(pod, "status.phase") == "Succeeded":
                succeeded += 1
                failures.count = 0
                done |= {index_of(pod)} if _is_indexed(job) else set()
            else:
                failed += 1
                failures.count, failures.last = failures.count + 1, self._clock.now()
        if _is_indexed(job):
            job = with_status(job, completedIndexes=spans(done) or None)
            succeeded = len(done)
        return with_status(job, succeeded=succeeded or None, failed=failed or None)

    def _release_orphans(self, ref: Ref, job: Object | None) -> None:
        """Let the pods of a Job go that does not count them any more."""
        own = None if job is None or is_deleting(job) else uid_of(job)
        for pod in self._store.list(POD, ref[1]):
            owner = controller_of(pod)
            if owner and owner["kind"] == "Job" and owner["name"] == ref[0] and owner["uid"] != own:
                self._let_go([pod])

    def _let_go(self, pods: Iterable[Object]) -> None:
        """They have been counted, or need not be."""
        for pod in pods:
            held = finalizers_of(pod)
            if TRACKING in held and self._store.find(POD, name_of(pod), namespace_of(pod)):
                left = [item for item in held if item != TRACKING] or None
                self._store.patch(POD, name_of(pod), namespace_of(pod), {"metadata": {"finalizers": left}})

    # what follows from it

    def _decided(self, job: Object) -> tuple[Object, float | None]:
        """The Job with its conditions, and when to look again; pods are made and deleted on the way."""
        now, spec = self._clock.now(), job["spec"]
        if spec["suspend"]:
            self._withdraw(job, self._active(job))
            job = with_status(job, startTime=None)
            return with_condition(job, now, "Suspended", True, "JobSuspended", "Job suspended"), None
        if is_true(job, "Suspended"):
            job = with_condition(job, now, "Suspended", False, "JobResumed", "Job resumed")
        if at(job, "status.startTime") is None:
            job = with_status(job, startTime=timestamp(now))
        reason = self._failure(job, now)
        if reason is not None or _is_enough(job, self._active(job)):
            return self._ending(job, now, reason), None
        return job, _sooner(self._manage(job, now), self._deadline_in(job, now))

    def _failure(self, job: Object, now: float) -> tuple[str, str] | None:
        """Why the Job fails, as a condition says it: reason and message."""
        decided = next((one for one in at(job, "status.conditions", []) if one["type"] == "FailureTarget"), None)
        if decided is not None:
            return decided["reason"], decided["message"]
        limit = job["spec"]["backoffLimit"]
        if at(job, "status.failed", 0) > limit or self._restarts(job) > max(limit - 1, 0):
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        left = self._deadline_in(job, now)
        if left is not None and left <= 0:
            return "DeadlineExceeded", "Job was active longer than specified deadline"
        return None

    def _restarts(self, job: Object) -> int:
        """Of containers in pods that are restarted in place."""
        if at(job, "spec.template.spec.restartPolicy") != "OnFailure":
            return 0
        statuses = (one for pod in self._active(job) for one in at(pod, "status.containerStatuses", []))
        return sum(one.get("restartCount", 0) for one in statuses)

    def _deadline_in(self, job: Object, now: float) -> float | None:
        limit = job["spec"].get("activeDeadlineSeconds")
        return None if limit is None else seconds(job["status"]["startTime"]) + limit - now

    def _ending(self, job: Object, now: float, reason: tuple[str, str] | None) -> Object:
        """First it is decided; it is over when no pod is left that has not ended."""
        first, last = ("FailureTarget", "Failed") if reason else ("SuccessCriteriaMet", "Complete")
        why = reason or ("CompletionsReached", "Reached expected number of succeeded pods")
        job = with_condition(job, now, first, True, *why)
        self._delete(job, self._active(job))
        if any(not is_terminal(pod) for pod in self._pods(job)):
            return job
        if reason is None:
            self._events.normal(job, "Completed", "Job completed")
            job = with_status(job, completionTime=timestamp(now))
        else:
            self._events.warning(job, *reason)
        return with_condition(job, now, last, True, *why)

    def _manage(self, job: Object, now: float) -> float | None:
        """Make as many pods run as may; seconds until the backoff of those that failed is over."""
        spec, active = job["spec"], self._active(job)
        succeeded, wanted = at(job, "status.succeeded", 0), spec["parallelism"]
        if spec.get("completions") is not None:
            wanted = min(wanted, spec["completions"] - succeeded)
        elif succeeded:
            wanted = min(wanted, len(active))
        busy = len(active)
        if spec["podReplacementPolicy"] == "Failed":
            busy += sum(is_deleting(pod) and not is_terminal(pod) for pod in self._pods(job))
        self._withdraw(job, active[wanted:])
        missing = wanted - busy
        if missing <= 0:
            return None
        failures = self._failures[uid_of(job)]
        due = failures.last + min(FIRST_BACKOFF_S * 2.0 ** (failures.count - 1), LONGEST_BACKOFF_S)
        if failures.count and now < due:
            return due - now
        for index in self._free_indexes(job, active)[:missing] if _is_indexed(job) else [None] * missing:
            pod = self._store.create(POD, new_pod(job, index))
            self._events.normal(job, "SuccessfulCreate", f"Created pod: {name_of(pod)}")
        return None

    def _free_indexes(self, job: Object, active: list[Object]) -> list[int | None]:
        taken = indexes(at(job, "status.completedIndexes", "")) | {index_of(pod) for pod in active}
        return [index for index in range(job["spec"]["completions"]) if index not in taken]

    def _active(self, job: Object) -> list[Object]:
        return [pod for pod in self._pods(job) if not _has_ended(pod)]

    def _withdraw(self, job: Object, pods: list[Object]) -> None:
        """Delete pods that have not failed, but are not wanted any more: they do not count."""
        self._let_go(pods)
        self._delete(job, pods)

    def _delete(self, job: Object, pods: list[Object]) -> None:
        for pod in pods:
            self._store.delete(POD, name_of(pod), namespace_of(pod))
            self._events.normal(job, "SuccessfulDelete", f"Deleted pod: {name_of(pod)}")

    def _expire(self, job: Object) -> float | None:
        """Remove the Job and its pods when its time is over."""
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        if ttl is None:
            return None
        ended = since(job, "Complete" if is_true(job, "Complete") else "Failed")
        assert ended is not None
        left: float = ended + ttl - self._clock.now()
        if left > 0:
            return left
        self._store.delete(JOB, name_of(job), namespace_of(job), propagation="Foreground")
        return None

    def _write(self, job: Object) -> None:
        pods = self._pods(job)
        active = [pod for pod in pods if not _has_ended(pod)]
        job = with_status(
            job,
            active=len(active) or None,
            ready=sum(is_true(pod, "Ready") for pod in active),
            terminating=sum(is_deleting(pod) and not is_terminal(pod) for pod in pods),
            uncountedTerminatedPods={},
        )
        meta = {key: value for key, value in job["metadata"].items() if key != "resourceVersion"}
        self._store.update_status(JOB, {**job, "metadata": meta})


def new_pod(job: Object, index: int | None) -> Object:
    """A pod of the template; with an index it has it in its name, labels, annotations and environment."""
    template = job["spec"]["template"]
    meta, spec, stem = template.get("metadata") or {}, template["spec"], name_of(job)
    more: dict[str, str] = {}
    if index is not None:
        more, stem = {INDEX: str(index)}, f"{stem}-{index}"
        spec = {**spec, "hostname": stem, "containers": [_with_index(one) for one in spec["containers"]]}
    return {
        "metadata": {
            "labels": {**(meta.get("labels") or {}), **more},
            "annotations": {**(meta.get("annotations") or {}), **more},
            "generateName": f"{stem}-",
            "namespace": namespace_of(job),
            "finalizers": [TRACKING],
            "ownerReferences": [owner_reference(job)],
        },
        "spec": spec,
    }


def _with_index(container: dict[str, Any]) -> dict[str, Any]:
    given = container.get("env") or []
    if any(variable["name"] == INDEX_VARIABLE for variable in given):
        return container
    place = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
    return {**container, "env": [*given, {"name": INDEX_VARIABLE, "valueFrom": place}]}


def index_of(pod: Object) -> int:
    """Which completion a pod works on."""
    return int(pod["metadata"]["annotations"][INDEX])


def indexes(text: str) -> set[int]:
    """The numbers in a status' ``completedIndexes``, such as ``0,3-5``."""
    found: set[int] = set()
    for span in filter(None, text.split(",")):
        first, _, last = span.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def spans(numbers: Iterable[int]) -> str:
    """The inverse of `indexes`; three and more in a row are a span."""
    known = set(numbers)
    starts = sorted(number for number in known if number - 1 not in known)
    ends = sorted(number for number in known if number + 1 not in known)
    return ",".join(_span(first, last) for first, last in zip(starts, ends, strict=True))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}{',' if last == first + 1 else '-'}{last}"


def finalizers_of(pod: Object) -> list[str]:
    """What holds it."""
    held: list[str] = pod["metadata"].get("finalizers") or []
    return held


def _is_indexed(job: Object) -> bool:
    return bool(job["spec"]["completionMode"] == "Indexed")


def _is_finished(job: Object) -> bool:
    return is_true(job, "Complete") or is_true(job, "Failed")


def _has_ended(pod: Object) -> bool:
    """Whether it counts: a pod on its way out does no more of the work."""
    return is_terminal(pod) or is_deleting(pod)


def _is_enough(job: Object, active: list[Object]) -> bool:
    """Without a number of completions one success is, when the others have ended too."""
    completions, succeeded = job["spec"].get("completions"), at(job, "status.succeeded", 0)
    return not active and succeeded > 0 if completions is None else succeeded >= completions


def _sooner(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)
