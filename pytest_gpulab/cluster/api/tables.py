"""`kubectl get`'s tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_gpulab.cluster import resources as kinds
from pytest_gpulab.cluster.objects import Object, at, seconds
from pytest_gpulab.cluster.resources import Resource

Cell = Callable[[Object], Any]
Column = tuple[str, Cell]


def table(resource: Resource, objects: list[Object], version: str, now: float, include: str = "Metadata") -> Object:
    """Objects as rows. `include` is the query's `includeObject`: None, Metadata or Object."""
    columns = _columns(resource, now)
    definitions = [
        {
            "name": name,
            "type": "string",
            "format": "name" if name == "Name" else "",
            "description": "",
            "priority": int((resource, name) in _WIDE),
        }
        for name, _ in columns
    ]
    rows = [{"cells": [cell(obj) for _, cell in columns], "object": _included(obj, include)} for obj in objects]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": definitions,
        "rows": rows,
    }


def _included(obj: Object, include: str) -> Object | None:
    if include == "None":
        return None
    if include == "Object":
        return obj
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def _columns(resource: Resource, now: float) -> list[Column]:
    own = _OWN.get(resource, [])
    name: Column = ("Name", _text("metadata.name"))
    if resource is kinds.EVENT:
        return [("Last Seen", _since("lastTimestamp", now)), *own]
    return [name, *own, ("Age", _since("metadata.creationTimestamp", now))]


def duration(elapsed: float) -> str:
    """As kubectl prints an age: 45s, 3m12s, 26m, 4h5m, 3d2h, 12d."""
    total = max(0, int(elapsed))
    for bound, unit, size, small, small_size in (
        (600, "m", 60, "s", 1),
        (10800, "m", 60, "", 0),
        (28800, "h", 3600, "m", 60),
        (172800, "h", 3600, "", 0),
        (691200, "d", 86400, "h", 3600),
    ):
        if total < 120:
            return f"{total}s"
        if total < bound:
            rest = (total % size) // small_size if small else 0
            return f"{total // size}{unit}" + (f"{rest}{small}" if rest else "")
    return f"{total // 86400}d"


def _since(path: str, now: float) -> Cell:
    def cell(obj: Object) -> str:
        stamp = at(obj, path)
        return duration(now - seconds(stamp)) if stamp else "<unknown>"

    return cell


def _text(path: str, missing: Any = "<none>") -> Cell:
    return lambda obj: str(at(obj, path, missing))


def _label(key: str) -> Cell:
    return lambda obj: (obj["metadata"].get("labels") or {}).get(key, "")


def _number(path: str) -> Cell:
    return lambda obj: at(obj, path, 0)


def _ratio(part: str, whole: str, default: int = 0) -> Cell:
    return lambda obj: f"{at(obj, part, 0)}/{at(obj, whole, default)}"


def _containers(obj: Object) -> list[Object]:
    return at(obj, "status.containerStatuses", [])  # type: ignore[no-any-return]


def _pod_ready(pod: Object) -> str:
    ready = sum(bool(status.get("ready")) for status in _containers(pod))
    return f"{ready}/{len(at(pod, 'spec.containers', []))}"


def _pod_status(pod: Object) -> str:
    if pod["metadata"].get("deletionTimestamp"):
        return "Terminating"
    states = [status.get("state") or {} for status in _containers(pod)]
    reasons = [at(state, f"{name}.reason") for state in states for name in ("waiting", "terminated")]
    told = [*reasons, at(pod, "status.reason"), at(pod, "status.phase", "")]
    return str(next(reason for reason in told if reason is not None))


def _restarts(pod: Object) -> str:
    return str(sum(status.get("restartCount", 0) for status in _containers(pod)))


def _condition(obj: Object, kind: str) -> str:
    conditions = at(obj, "status.conditions", [])
    return next((item.get("status", "") for item in conditions if item.get("type") == kind), "Unknown")


def _job_status(job: Object) -> str:
    for kind in ("Complete", "Failed", "Suspended", "FailureTarget", "SuccessCriteriaMet"):
        if _condition(job, kind) == "True":
            return {"FailureTarget": "Terminating", "SuccessCriteriaMet": "Terminating"}.get(kind, kind)
    return "Running"


def _completions(job: Object) -> str:
    wanted = at(job, "spec.completions") or f"1 of {at(job, 'spec.parallelism', 1)}"
    return f"{at(job, 'status.succeeded', 0)}/{wanted}"


def _job_duration(job: Object) -> str:
    """How long it took; that of one which still runs is told by its age."""
    started, ended = at(job, "status.startTime"), at(job, "status.completionTime")
    return f"{seconds(ended) - seconds(started):.0f}s" if started and ended else ""


def _node_status(node: Object) -> str:
    ready = "Ready" if _condition(node, "Ready") == "True" else "NotReady"
    return f"{ready},SchedulingDisabled" if at(node, "spec.unschedulable") else ready


def _ports(service: Object) -> str:
    ports = at(service, "spec.ports", [])
    return ",".join(f"{port.get('port')}/{port.get('protocol', 'TCP')}" for port in ports) or "<none>"


def _addresses(ingress: Object) -> str:
    points = at(ingress, "status.loadBalancer.ingress", [])
    return ",".join(point.get("hostname") or point.get("ip", "") for point in points)


def _hosts(ingress: Object) -> str:
    return ",".join(rule.get("host") or "*" for rule in at(ingress, "spec.rules", [])) or "*"


def _reference(hpa: Object) -> str:
    return f"{at(hpa, 'spec.scaleTargetRef.kind')}/{at(hpa, 'spec.scaleTargetRef.name')}"


def _targets(hpa: Object) -> str:
    current = at(hpa, "status.currentMetrics") or []
    shown = []
    for place, metric in enumerate(at(hpa, "spec.metrics", [])):
        kind = {"Pods": "pods", "Resource": "resource"}.get(metric.get("type"), metric.get("type", "").lower())
        goal = at(metric, f"{kind}.target.averageValue") or at(metric, f"{kind}.target.value", "<unknown>")
        seen = current[place] if place < len(current) else {}
        value = at(seen, f"{kind}.current.averageValue") or at(seen, f"{kind}.current.value", "<unknown>")
        shown.append(f"{value}/{goal}")
    return ", ".join(shown) or "<none>"


def _ready(obj: Object) -> str:
    return _condition(obj, "Ready")


def _event_object(event: Object) -> str:
    return f"{at(event, 'involvedObject.kind', '').lower()}/{at(event, 'involvedObject.name', '')}"


_WORKLOAD: list[Column] = [
    ("Desired", _number("spec.replicas")),
    ("Current", _number("status.replicas")),
    ("Ready", _number("status.readyReplicas")),
]
_WIDE = ((kinds.POD, "IP"), (kinds.POD, "Node"))
"""Shown with `-o wide` only."""
_OWN: dict[Resource, list[Column]] = {
    kinds.POD: [
        ("Ready", _pod_ready),
        ("Status", _pod_status),
        ("Restarts", _restarts),
        ("IP", _text("status.podIP")),
        ("Node", _text("spec.nodeName")),
    ],
    kinds.DEPLOYMENT: [
        ("Ready", _ratio("status.readyReplicas", "spec.replicas", 1)),
        ("Up-to-date", _number("status.updatedReplicas")),
        ("Available", _number("status.availableReplicas")),
    ],
    kinds.REPLICA_SET: _WORKLOAD,
    kinds.STATEFUL_SET: [("Ready", _ratio("status.readyReplicas", "spec.replicas", 1))],
    kinds.JOB: [
        ("Status", _job_status),
        ("Completions", _completions),
        ("Duration", _job_duration),
    ],
    kinds.NODE: [
        ("Status", _node_status),
        ("Instance-Type", _label("node.kubernetes.io/instance-type")),
        ("Version", _text("status.nodeInfo.kubeletVersion")),
    ],
    kinds.NAMESPACE: [("Status", _text("status.phase"))],
    kinds.SERVICE: [
        ("Type", _text("spec.type")),
        ("Cluster-IP", _text("spec.clusterIP")),
        ("Port(s)", _ports),
    ],
    kinds.INGRESS: [("Class", _text("spec.ingressClassName")), ("Hosts", _hosts), ("Address", _addresses)],
    kinds.HPA: [
        ("Reference", _reference),
        ("Targets", _targets),
        ("MinPods", _text("spec.minReplicas")),
        ("MaxPods", _text("spec.maxReplicas")),
        ("Replicas", _number("status.currentReplicas")),
    ],
    kinds.EVENT: [
        ("Type", _text("type")),
        ("Reason", _text("reason")),
        ("Object", _event_object),
        ("Message", _text("message", "")),
    ],
    kinds.NODE_POOL: [("NodeClass", _text("spec.template.spec.nodeClassRef.name")), ("Ready", _ready)],
    kinds.NODE_CLAIM: [
        ("Type", _label("node.kubernetes.io/instance-type")),
        ("Capacity", _label("karpenter.sh/capacity-type")),
        ("Node", _text("status.nodeName", "")),
        ("Ready", _ready),
    ],
    kinds.CONFIG_MAP: [("Data", lambda obj: len(obj.get("data") or {}))],
    kinds.SECRET: [("Type", _text("type")), ("Data", lambda obj: len(obj.get("data") or {}))],
}
