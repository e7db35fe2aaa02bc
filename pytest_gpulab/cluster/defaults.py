"""The fields an API server fills in when a manifest leaves them out, for the kinds whose controllers rely on them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

from pytest_gpulab.cluster import errors
from pytest_gpulab.cluster import resources as kinds
from pytest_gpulab.cluster.objects import Object, at, merged
from pytest_gpulab.cluster.resources import Resource

_POD_SPEC: Object = {
    "restartPolicy": "Always",
    "terminationGracePeriodSeconds": 30,
    "dnsPolicy": "ClusterFirst",
    "schedulerName": "default-scheduler",
    "securityContext": {},
}
_PROBE: Object = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
_ROLLING: Object = {
    "type": "RollingUpdate",
    "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"},
}
_JOB_SPEC: Object = {"parallelism": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": False}
_DEPLOYMENT_SPEC: Object = {
    "replicas": 1,
    "revisionHistoryLimit": 10,
    "progressDeadlineSeconds": 600,
    "strategy": _ROLLING,
}


def under(defaults: Object, value: Any) -> Object:
    """`value` where it says something, `defaults` below it; `value` itself when it says everything."""
    present: Object = value if isinstance(value, dict) else {}
    missing = {key: item for key, item in defaults.items() if present.get(key) is None}
    return {**present, **missing} if missing or value is None else present


def with_defaults(resource: Resource, obj: Object) -> Object:
    """The object with its defaults; unchanged parts are shared."""
    fill = _FILL.get(resource)
    return fill(obj) if fill else obj


def on_create(resource: Resource, obj: Object) -> Object:
    """What only a new object gets: its first status, and a namespace's finalizer and label."""
    if resource is kinds.NAMESPACE:
        labels = {"kubernetes.io/metadata.name": obj["metadata"]["name"]}
        added = {"metadata": {"labels": labels}, "spec": {"finalizers": ["kubernetes"]}}
        return merged(obj, {**added, "status": {"phase": "Active"}})  # type: ignore[no-any-return]
    if resource is kinds.POD:
        return {**obj, "status": under({"phase": "Pending", "qosClass": _quality(obj)}, obj.get("status"))}
    if resource is kinds.JOB:
        _check_job(obj)
        obj = _selected(obj)
    if resource.has_status and not resource.custom:
        return under({"status": _FIRST_STATUS.get(resource, {})}, obj)
    return obj


def _quality(pod: Object) -> str:
    """Guaranteed, Burstable or BestEffort, from the CPU and memory its containers ask for."""
    containers = pod["spec"].get("containers") or []
    wants = [(item.get("resources") or {}) for item in containers]
    computed = [
        (want.get(side) or {}).get(unit)
        for want in wants
        for side in ("requests", "limits")
        for unit in ("cpu", "memory")
    ]
    if not any(computed):
        return "BestEffort"
    limited = all((want.get("limits") or {}).get(unit) for want in wants for unit in ("cpu", "memory"))
    equal = all(
        (want.get("requests") or {}).get(unit, limit) == limit
        for want in wants
        for unit, limit in (want.get("limits") or {}).items()
        if unit in ("cpu", "memory")
    )
    return "Guaranteed" if limited and equal else "Burstable"


def _pod_spec(spec: Any) -> Object:
    filled = under(_POD_SPEC, spec)
    for field in ("containers", "initContainers"):
        if isinstance(filled.get(field), list):
            filled = {**filled, field: [_container(item) for item in filled[field]]}
    return filled


def _container(container: Object) -> Object:
    filled = under(
        {
            "imagePullPolicy": _pull_policy(container.get("image", "")),
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "File",
            "resources": {},
        },
        container,
    )
    for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
        if filled.get(probe):
            filled = {**filled, probe: _probe(filled[probe])}
    if filled.get("ports"):
        filled = {**filled, "ports": [under({"protocol": "TCP"}, port) for port in filled["ports"]]}
    return _with_requests(filled)


def _probe(probe: Object) -> Object:
    """A number that is 0 counts as left out."""
    if any(probe.get(name) == 0 for name in _PROBE):
        probe = {name: value for name, value in probe.items() if value != 0 or name not in _PROBE}
    filled = under(_PROBE, probe)
    if filled.get("httpGet"):
        filled = {**filled, "httpGet": under({"scheme": "HTTP", "path": "/"}, filled["httpGet"])}
    return filled


def _with_requests(container: Object) -> Object:
    """A limit without a request is also the request."""
    limits = container["resources"].get("limits")
    if not limits:
        return container
    wanted = under(limits, container["resources"].get("requests"))
    return {**container, "resources": {**container["resources"], "requests": wanted}}


def _pull_policy(image: str) -> str:
    tag = image.rpartition("/")[2]
    latest = "@" not in tag and (":" not in tag or tag.endswith(":latest"))
    return "Always" if latest else "IfNotPresent"


def _pod(obj: Object) -> Object:
    return {**obj, "spec": _pod_spec(obj.get("spec"))}


def _template(spec: Object) -> Object:
    template = spec.get("template")
    return {**spec, "template": {**template, "spec": _pod_spec(template.get("spec"))}} if template else spec


def _workload(defaults: Object) -> Callable[[Object], Object]:
    return lambda obj: {**obj, "spec": _template(under(defaults, obj.get("spec")))}


def _deployment(obj: Object) -> Object:
    spec = _template(under(_DEPLOYMENT_SPEC, obj.get("spec")))
    strategy = under({"type": "RollingUpdate"}, spec["strategy"])
    if strategy["type"] == "RollingUpdate":
        rolling = under(_ROLLING["rollingUpdate"], strategy.get("rollingUpdate"))
        strategy = {**strategy, "rollingUpdate": rolling}
    return {**obj, "spec": {**spec, "strategy": strategy}}


def _job(obj: Object) -> Object:
    spec = obj.get("spec") or {}
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec = {**spec, "completions": 1}
    replaced = "Failed" if spec.get("podFailurePolicy") else "TerminatingOrFailed"
    return _workload({**_JOB_SPEC, "podReplacementPolicy": replaced})({**obj, "spec": spec})


def _selected(job: Object) -> Object:
    """The Job with the selector and the labels that tell its pods from all others."""
    meta = job["metadata"]
    template = job["spec"]["template"]
    own = {"batch.kubernetes.io/controller-uid": meta["uid"], "batch.kubernetes.io/job-name": meta["name"]}
    labels = {**own, "controller-uid": meta["uid"], "job-name": meta["name"]}
    given = template.get("metadata") or {}
    template = {**template, "metadata": {**given, "labels": {**(given.get("labels") or {}), **labels}}}
    selector = {"matchLabels": {"batch.kubernetes.io/controller-uid": meta["uid"]}}
    return {**job, "spec": {**job["spec"], "selector": selector, "template": template}}


def _check_job(job: Object) -> None:
    """What an API server refuses beyond the schema."""
    spec = job["spec"]
    policy = at(spec, "template.spec.restartPolicy")
    if policy not in ("Never", "OnFailure"):
        raise errors.invalid(
            *(kinds.JOB, job["metadata"]["name"]),
            errors.Cause(
                "spec.template.spec.restartPolicy",
                f'Required value: valid values: "OnFailure", "Never", got "{policy}"',
                "FieldValueRequired",
            ),
        )
    if spec["completionMode"] == "Indexed" and spec.get("completions") is None:
        raise errors.invalid(
            *(kinds.JOB, job["metadata"]["name"]),
            errors.Cause("spec.completions", "Required value: when completion mode is Indexed", "FieldValueRequired"),
        )


def _service(obj: Object) -> Object:
    spec = under({"type": "ClusterIP", "sessionAffinity": "None"}, obj.get("spec"))
    ports = [under({"protocol": "TCP", "targetPort": port.get("port")}, port) for port in spec.get("ports") or []]
    return {**obj, "spec": {**spec, "ports": ports} if ports else spec}


def _hpa(obj: Object) -> Object:
    return {**obj, "spec": under({"minReplicas": 1}, obj.get("spec"))}


def _secret(obj: Object) -> Object:
    """`stringData` is only a way to write: it is kept, and read, as `data`."""
    plain = obj.get("stringData")
    if plain:
        encoded = {key: b64encode(str(value).encode()).decode() for key, value in plain.items()}
        obj = {**obj, "data": {**(obj.get("data") or {}), **encoded}}
    return under({"type": "Opaque"}, {key: value for key, value in obj.items() if key != "stringData"})


_FIRST_STATUS: dict[Resource, Object] = {
    kinds.REPLICA_SET: {"replicas": 0},
    kinds.STATEFUL_SET: {"replicas": 0, "availableReplicas": 0},
    kinds.DAEMON_SET: {
        "currentNumberScheduled": 0,
        "desiredNumberScheduled": 0,
        "numberMisscheduled": 0,
        "numberReady": 0,
    },
    kinds.INGRESS: {"loadBalancer": {}},
    kinds.SERVICE: {"loadBalancer": {}},
    kinds.HPA: {"currentReplicas": 0, "desiredReplicas": 0},
    kinds.DISRUPTION_BUDGET: {"currentHealthy": 0, "desiredHealthy": 0, "disruptionsAllowed": 0, "expectedPods": 0},
}
"""What is never left out: typed clients insist on it."""
_FILL: dict[Resource, Callable[[Object], Object]] = {
    kinds.POD: _pod,
    kinds.DEPLOYMENT: _deployment,
    kinds.REPLICA_SET: _workload({"replicas": 1}),
    kinds.STATEFUL_SET: _workload({"replicas": 1}),
    kinds.DAEMON_SET: _workload({}),
    kinds.JOB: _job,
    kinds.SERVICE: _service,
    kinds.HPA: _hpa,
    kinds.SECRET: _secret,
}
