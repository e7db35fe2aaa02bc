"""Deployments and ReplicaSets: pods are created and deleted until as many run as are wanted.

Facts from kube-controller-manager 1.33, pkg/controller/deployment (rolling.go) and pkg/controller/replicaset.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

from pytest_gpulab.cluster.clock import Clock
from pytest_gpulab.cluster.conditions import is_true, since, with_condition, with_status
from pytest_gpulab.cluster.events import DELETED, Event
from pytest_gpulab.cluster.manager import Ref, ref_of
from pytest_gpulab.cluster.objects import (
    Object,
    at,
    controller_of,
    is_deleting,
    merged,
    name_of,
    namespace_of,
    owner_reference,
)
from pytest_gpulab.cluster.progress import deadline_in, with_progress
from pytest_gpulab.cluster.recorder import Recorder
from pytest_gpulab.cluster.resources import DEPLOYMENT, POD, REPLICA_SET
from pytest_gpulab.cluster.store import Store

HASH_LABEL = "pod-template-hash"
REVISION = "deployment.kubernetes.io/revision"


def _owner_ref(event: Event, kind: str) -> Iterable[Ref]:
    owner = controller_of(event.object)
    return ((owner["name"], namespace_of(event.object)),) if owner and owner["kind"] == kind else ()


class ReplicaSets:
    """Keeps as many pods as a ReplicaSet asks for."""

    watches = (REPLICA_SET, POD)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._events = Recorder(store, clock, "replicaset-controller")

    def refs(self, event: Event) -> Iterable[Ref]:
        """A changed ReplicaSet, or the one a changed pod belongs to."""
        return (ref_of(event),) if event.resource is REPLICA_SET else _owner_ref(event, "ReplicaSet")

    def reconcile(self, ref: Ref) -> float | None:
        """Create or delete pods, then report what there is."""
        replica_set = self._store.find(REPLICA_SET, *ref)
        if replica_set is None or is_deleting(replica_set):
            return None
        active = self._active(replica_set)
        missing = replica_set["spec"]["replicas"] - len(active)
        for _ in range(missing):
            pod = self._store.create(POD, _new_pod(replica_set))
            self._events.normal(replica_set, "SuccessfulCreate", f"Created pod: {name_of(pod)}")
        if missing < 0:
            for pod in sorted(active, key=_victim_rank)[:-missing]:
                self._store.delete(POD, name_of(pod), namespace_of(pod))
                self._events.normal(replica_set, "SuccessfulDelete", f"Deleted pod: {name_of(pod)}")
        self._report(ref)
        return None

    def _active(self, replica_set: Object) -> list[Object]:
        pods = [pod for kind, pod in self._store.dependents(replica_set) if kind is POD]
        return [
            pod for pod in pods if not is_deleting(pod) and at(pod, "status.phase") not in ("Failed", "Succeeded")
        ]

    def _report(self, ref: Ref) -> None:
        replica_set = self._store.get(REPLICA_SET, *ref)
        active = self._active(replica_set)
        ready = sum(is_true(pod, "Ready") for pod in active)
        counts = {"replicas": len(active), "readyReplicas": ready, "availableReplicas": ready}
        status = {name: count for name, count in counts.items() if count or name == "replicas"}
        generation = replica_set["metadata"].get("generation", 1)
        self._store.update_status(
            REPLICA_SET, _any_version({**replica_set, "status": {**status, "observedGeneration": generation}})
        )


def _victim_rank(pod: Object) -> tuple[Any, ...]:
    """Which pod goes first when there are too many (controller_utils.go, ActivePodsWithRanks): not on a node, not
    running, not ready, cheapest to delete, ready for the shortest time, most restarts, youngest."""
    phase = {"Pending": 0, "Unknown": 1}.get(at(pod, "status.phase", "Pending"), 2)
    cost = int((pod["metadata"].get("annotations") or {}).get("controller.kubernetes.io/pod-deletion-cost", 0))
    ready = is_true(pod, "Ready")
    restarts = max((c.get("restartCount", 0) for c in at(pod, "status.containerStatuses", [])), default=0)
    return (
        bool(pod["spec"].get("nodeName")),
        phase,
        ready,
        cost,
        -(since(pod, "Ready") or 0.0) if ready else 0.0,
        -restarts,
        _reversed(pod["metadata"]["creationTimestamp"]),
        -int(pod["metadata"]["resourceVersion"]),
    )


def _reversed(stamp: str) -> tuple[int, ...]:
    return tuple(-ord(letter) for letter in stamp)


def _new_pod(replica_set: Object) -> Object:
    template = replica_set["spec"]["template"]
    meta = template.get("metadata") or {}
    return {
        "metadata": {
            **{key: meta[key] for key in ("labels", "annotations") if meta.get(key)},
            "generateName": f"{name_of(replica_set)}-",
            "namespace": namespace_of(replica_set),
            "ownerReferences": [owner_reference(replica_set)],
        },
        "spec": template["spec"],
    }


class Deployments:
    """Moves pods from old ReplicaSets to the one of the current template."""

    watches = (DEPLOYMENT, REPLICA_SET, POD)

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._events = Recorder(store, clock, "deployment-controller")

    def refs(self, event: Event) -> Iterable[Ref]:
        """A changed Deployment, or the one of a changed ReplicaSet or of a pod that is gone."""
        if event.resource is DEPLOYMENT:
            return (ref_of(event),)
        if event.resource is REPLICA_SET:
            return _owner_ref(event, "Deployment")
        owner = controller_of(event.object) if event.type == DELETED else None
        found = self._store.find(REPLICA_SET, owner["name"], namespace_of(event.object)) if owner else None
        return () if found is None else _owner_ref(event._replace(object=found), "Deployment")

    def reconcile(self, ref: Ref) -> float | None:
        """One step of the rollout, then report; seconds until it has taken too long."""
        deployment = self._store.find(DEPLOYMENT, *ref)
        if deployment is None or is_deleting(deployment):
            return None
        if not deployment["spec"].get("paused"):
            current = self._current(deployment)
            old = [rs for rs in self._owned(deployment) if name_of(rs) != name_of(current)]
            if deployment["spec"]["strategy"]["type"] == "Recreate":
                self._recreate(deployment, current, old)
            else:
                self._roll(deployment, current, old)
        return self._report(ref)

    def _owned(self, deployment: Object) -> list[Object]:
        return [obj for kind, obj in self._store.dependents(deployment) if kind is REPLICA_SET]

    def _current(self, deployment: Object) -> Object:
        """The ReplicaSet of the template, as the newest revision; a new one starts with no pods."""
        digest = template_hash(deployment["spec"]["template"])
        name = f"{name_of(deployment)}-{digest}"
        found = self._store.find(REPLICA_SET, name, namespace_of(deployment))
        newest = 1 + max((_revision(rs) for rs in self._owned(deployment) if name_of(rs) != name), default=0)
        annotation = {"metadata": {"annotations": {REVISION: str(newest)}}}
        if found is None:
            found = self._store.create(REPLICA_SET, _new_replica_set(deployment, digest, annotation))
        elif _revision(found) < newest:  # the template is an older one's again
            found = self._store.patch(REPLICA_SET, name, namespace_of(deployment), annotation)
        else:
            return found
        self._store.patch(DEPLOYMENT, name_of(deployment), namespace_of(deployment), annotation)
        return found

    def _recreate(self, deployment: Object, current: Object, old: list[Object]) -> None:
        for replica_set in old:
            self._scale(deployment, replica_set, 0)
        if not any(at(rs, "status.replicas", 0) or self._has_pods(rs) for rs in old):
            self._scale(deployment, current, deployment["spec"]["replicas"])

    def _has_pods(self, replica_set: Object) -> bool:
        return any(kind is POD for kind, _ in self._store.dependents(replica_set))

    def _roll(self, deployment: Object, current: Object, old: list[Object]) -> None:
        """Scale up within maxSurge, else scale down within maxUnavailable."""
        wanted = deployment["spec"]["replicas"]
        surge, unavailable = fenceposts(deployment["spec"]["strategy"].get("rollingUpdate") or {}, wanted)
        now = current["spec"]["replicas"]
        total = now + sum(rs["spec"]["replicas"] for rs in old)
        if now > wanted:
            self._scale(deployment, current, wanted)
        elif now < wanted and total < wanted + surge:
            self._scale(deployment, current, now + min(wanted + surge - total, wanted - now))
        elif old:
            self._scale_down_old(deployment, current, old, total, wanted - unavailable)

    def _scale_down_old(self, deployment: Object, current: Object, old: list[Object], total: int, least: int) -> None:
        """First the old pods that are not available, then as many as leave `least` available ones."""
        pending = current["spec"]["replicas"] - at(current, "status.availableReplicas", 0)
        spare = total - least - pending
        sizes = {name_of(rs): rs["spec"]["replicas"] for rs in old}
        for replica_set in old:
            broken = sizes[name_of(replica_set)] - at(replica_set, "status.availableReplicas", 0)
            cut = max(0, min(broken, spare))
            sizes[name_of(replica_set)] -= cut
            spare -= cut
        available = sum(at(rs, "status.availableReplicas", 0) for rs in [*old, current])
        more = available - least
        for replica_set in old:
            cut = max(0, min(more, spare, sizes[name_of(replica_set)]))
            sizes[name_of(replica_set)] -= cut
            more, spare = more - cut, spare - cut
            self._scale(deployment, replica_set, sizes[name_of(replica_set)])

    def _scale(self, deployment: Object, replica_set: Object, replicas: int) -> None:
        before = replica_set["spec"]["replicas"]
        if before == replicas:
            return
        name = name_of(replica_set)
        self._store.patch(REPLICA_SET, name, namespace_of(replica_set), {"spec": {"replicas": replicas}})
        how = "up" if replicas > before else "down"
        self._events.normal(
            deployment, "ScalingReplicaSet", f"Scaled {how} replica set {name} from {before} to {replicas}"
        )

    def _report(self, ref: Ref) -> float | None:
        deployment = self._store.get(DEPLOYMENT, *ref)
        owned = self._owned(deployment)
        digest = template_hash(deployment["spec"]["template"])
        updated = sum(at(rs, "status.replicas", 0) for rs in owned if name_of(rs).endswith(f"-{digest}"))
        total = sum(at(rs, "status.replicas", 0) for rs in owned)
        ready = sum(at(rs, "status.readyReplicas", 0) for rs in owned)
        wanted = deployment["spec"]["replicas"]
        _, unavailable = fenceposts(deployment["spec"]["strategy"].get("rollingUpdate") or {}, wanted)
        now = self._clock.now()
        enough = ready >= wanted - unavailable
        reported = with_condition(
            deployment,
            now,
            "Available",
            enough,
            "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
            f"Deployment {'has' if enough else 'does not have'} minimum availability.",
        )
        counts = {"replicas": total, "updatedReplicas": updated, "readyReplicas": ready, "availableReplicas": ready}
        reported = with_progress(reported, counts, now, f"{name_of(deployment)}-{digest}")
        counts["unavailableReplicas"] = max(0, wanted - ready)
        reported = with_status(reported, **{name: count or None for name, count in counts.items()})
        reported = with_status(reported, observedGeneration=deployment["metadata"].get("generation", 1))
        self._store.update_status(DEPLOYMENT, _any_version(reported))
        return deadline_in(reported, now)


def _any_version(obj: Object) -> Object:
    """Without the optimistic lock: this controller is the only one that writes that status."""
    meta = {key: value for key, value in obj["metadata"].items() if key != "resourceVersion"}
    return {**obj, "metadata": meta}


def _new_replica_set(deployment: Object, digest: str, annotation: Object) -> Object:
    label = {HASH_LABEL: digest}
    template = merged(deployment["spec"]["template"], {"metadata": {"labels": label}})
    meta = {
        "name": f"{name_of(deployment)}-{digest}",
        "namespace": namespace_of(deployment),
        "labels": template["metadata"]["labels"],
        "ownerReferences": [owner_reference(deployment)],
    }
    selector = merged(deployment["spec"]["selector"], {"matchLabels": label})
    spec = {"replicas": 0, "selector": selector, "template": template}
    return {"metadata": {**meta, **annotation["metadata"]}, "spec": spec}


def _revision(replica_set: Object) -> int:
    return int((replica_set["metadata"].get("annotations") or {}).get(REVISION, 0))


def template_hash(template: Object) -> str:
    """Ten letters that name a pod template."""
    digest = zlib.crc32(json.dumps(template, sort_keys=True).encode())
    return f"{digest:010d}".translate(str.maketrans("0123456789", "bcdf456789"))


def fenceposts(rolling: Object, replicas: int) -> tuple[int, int]:
    """(maxSurge, maxUnavailable) in pods: percentages round up and down; both zero means one unavailable."""
    surge = _pods(rolling.get("maxSurge", "25%"), replicas, math.ceil)
    unavailable = _pods(rolling.get("maxUnavailable", "25%"), replicas, math.floor)
    return (surge, unavailable) if surge or unavailable else (0, 1)


def _pods(value: int | str, replicas: int, rounding: Any) -> int:
    if isinstance(value, str) and value.endswith("%"):
        return int(rounding(replicas * int(value[:-1]) / 100))
    return int(value)
