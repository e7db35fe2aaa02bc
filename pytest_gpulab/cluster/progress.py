"""Whether a Deployment's rollout makes progress, and when it is given up.

Facts from kube-controller-manager 1.33, pkg/controller/deployment/progress.go. A completed rollout stays so while its
pods come and go, or its replicas are scaled: only a new template begins another.
"""

from __future__ import annotations

from typing import Final

from pytest_gpulab.cluster.conditions import condition, with_condition
from pytest_gpulab.cluster.objects import Object, at, seconds

_COMPLETE: Final = "NewReplicaSetAvailable"
_TIMED_OUT: Final = "ProgressDeadlineExceeded"
_PAUSED: Final = "DeploymentPaused"


def with_progress(deployment: Object, counts: dict[str, int], now: float, replica_set: str) -> Object:
    """A copy with the condition Progressing; its lastUpdateTime is that of the last progress.

    Args:
        deployment: with the status of its last report.
        counts: of that status, as they are now.
        replica_set: name of the newest.
    """
    old = condition(deployment, "Progressing")
    if deployment["spec"].get("paused"):
        return with_condition(deployment, now, "Progressing", "Unknown", _PAUSED, "Deployment is paused")
    if old is not None and old["reason"] == _COMPLETE and counts["updatedReplicas"] == counts["replicas"]:
        return deployment
    if _complete(counts, deployment["spec"]["replicas"]):
        said = f'ReplicaSet "{replica_set}" has successfully progressed.'
        return with_condition(deployment, now, "Progressing", True, _COMPLETE, said, updated=now)
    begins = old is None or old["reason"] in (_COMPLETE, _PAUSED)
    if begins or _advanced(at(deployment, "status", {}), counts):
        said = f'ReplicaSet "{replica_set}" is progressing.'
        return with_condition(deployment, now, "Progressing", True, "ReplicaSetUpdated", said, updated=now)
    left = deadline_in(deployment, now)
    if left is not None and left <= 0:
        said = f'ReplicaSet "{replica_set}" has timed out progressing.'
        return with_condition(deployment, now, "Progressing", False, _TIMED_OUT, said, updated=now)
    return deployment


def deadline_in(deployment: Object, now: float) -> float | None:
    """Seconds until a rollout that makes no more progress has taken too long; None when none is going on."""
    rollout = condition(deployment, "Progressing")
    if rollout is None or rollout["reason"] in (_COMPLETE, _TIMED_OUT, _PAUSED):
        return None
    return seconds(rollout["lastUpdateTime"]) + float(deployment["spec"]["progressDeadlineSeconds"]) - now


def _complete(counts: dict[str, int], wanted: int) -> bool:
    return all(counts[name] == wanted for name in ("replicas", "updatedReplicas", "availableReplicas"))


def _advanced(before: Object, counts: dict[str, int]) -> bool:
    """Whether there are more new pods, fewer old ones, or more that are available."""
    names = ("updatedReplicas", "replicas", "availableReplicas")
    updated, total, available = (int(before.get(name, 0)) for name in names)
    return (
        counts["updatedReplicas"] > updated
        or counts["replicas"] - counts["updatedReplicas"] < total - updated
        or counts["availableReplicas"] > available
    )
