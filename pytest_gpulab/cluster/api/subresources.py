"""Scale, eviction and binding: the subresources that are objects of another kind."""

from __future__ import annotations

from pytest_gpulab.cluster.api.patch import patched
from pytest_gpulab.cluster.api.requests import Call
from pytest_gpulab.cluster.errors import BadRequest, TooManyRequests, conflict
from pytest_gpulab.cluster.objects import Object, at, merged
from pytest_gpulab.cluster.resources import DISRUPTION_BUDGET, POD
from pytest_gpulab.cluster.selectors import label_selector, selector_text
from pytest_gpulab.cluster.store import Store


def scale_of(obj: Object) -> Object:
    """A workload as `autoscaling/v1` Scale."""
    meta = obj["metadata"]
    shown = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    status: Object = {"replicas": at(obj, "status.replicas", 0)}
    if selector := at(obj, "spec.selector"):
        status["selector"] = selector_text(selector)
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {field: meta[field] for field in shown if field in meta},
        "spec": {"replicas": at(obj, "spec.replicas", 1)},
        "status": status,
    }


def rescaled(call: Call, obj: Object) -> Object:
    """The workload with the replicas that a PUT or PATCH of its scale asks for."""
    scale = call.body if call.method == "PUT" else patched(call.resource, scale_of(obj), call.body, call.media_type)
    replicas = at(scale, "spec.replicas", 0)
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 0:
        raise BadRequest(f"spec.replicas must be a whole number of 0 or more, got {replicas!r}")
    version = at(scale, "metadata.resourceVersion")
    meta = {**obj["metadata"], "resourceVersion": version or obj["metadata"]["resourceVersion"]}
    changed: Object = merged({**obj, "metadata": meta}, {"spec": {"replicas": replicas}})
    return changed


def bind(store: Store, call: Call) -> None:
    """Put a pod on a node, once."""
    pod = store.get(POD, call.name, call.namespace)
    node = at(call.body, "target.name")
    if not node:
        raise BadRequest("a Binding must name its node in target.name")
    if at(pod, "spec.nodeName"):
        raise conflict(POD, call.name, f"pod {call.name} is already assigned to node {pod['spec']['nodeName']}")
    if not call.dry_run:
        store.patch(POD, call.name, call.namespace, {"spec": {"nodeName": node}})


def evict(store: Store, call: Call) -> None:
    """Delete a pod unless a disruption budget forbids it now."""
    pod = store.get(POD, call.name, call.namespace)
    labels = pod["metadata"].get("labels") or {}
    for budget in store.list(DISRUPTION_BUDGET, call.namespace):
        if not label_selector(selector_text(at(budget, "spec.selector")))(labels):
            continue
        if at(budget, "status.disruptionsAllowed", 0) < 1:
            raise TooManyRequests(
                "Cannot evict pod as it would violate the pod's disruption budget.",
                causes=[{"reason": "DisruptionBudget", "message": f"{budget['metadata']['name']} allows none now"}],
            )
    options = at(call.body, "deleteOptions", {})
    store.delete(POD, call.name, call.namespace, grace=options.get("gracePeriodSeconds"), dry_run=call.dry_run)
