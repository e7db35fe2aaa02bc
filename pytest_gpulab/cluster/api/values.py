"""What an API server refuses in an object whose fields and types are right: values that mean nothing.

Facts from Kubernetes 1.33 (pkg/apis/core, apps and autoscaling/validation), the patterns of Karpenter's NodePool and
aws-load-balancer-controller's validator of IngressClassParams. Only what controllers here read is looked at: a value
that they cannot compute with must not come this far.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_interface
from typing import Any

from pytest_gpulab.cluster import resources as kinds
from pytest_gpulab.cluster.errors import Cause
from pytest_gpulab.cluster.objects import Object, at
from pytest_gpulab.cluster.quantity import is_quantity, quantity
from pytest_gpulab.cluster.resources import Resource
from pytest_gpulab.cluster.selectors import label_selector, selector_text

_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_PROBE_NUMBERS = ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold")
_PERCENT = (
    "a valid percent string must be a numeric string followed by an ending '%' "
    "(e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')"
)
_DURATIONS = r"^(([0-9]+(s|m|h))+|Never)$"
_SPANS = r"^([0-9]+(s|m|h))+$"
_NODES = r"^((100|[0-9]{1,2})%|[0-9]+)$"


def wrong_values(resource: Resource, obj: Object) -> list[Cause]:
    """Why the object cannot be stored; nothing when it can. The object has passed its schema."""
    check = _CHECKS.get(resource)
    return list(check(obj)) if check else []


def _invalid(field: str, value: Any, why: str) -> Cause:
    return Cause(field, f"Invalid value: {json.dumps(value)}: {why}")


def _required(field: str, why: str = "") -> Cause:
    return Cause(field, f"Required value: {why}" if why else "Required value", "FieldValueRequired")


# pods


def _pod_spec(spec: Object, path: str) -> Iterator[Cause]:
    if not at(spec, "containers"):
        yield _required(f"{path}.containers")
    for containers in ("initContainers", "containers"):
        for place, container in enumerate(at(spec, containers, [])):
            where = f"{path}.{containers}[{place}]"
            for probe in _PROBES:
                yield from _probe(at(container, probe, {}), f"{where}.{probe}")
            yield from _resources(at(container, "resources", {}), f"{where}.resources")


def _resources(resources: Object, path: str) -> Iterator[Cause]:
    """A request is within its limit; of devices there are whole ones, as many requested as the limit says."""
    limits, requests = at(resources, "limits", {}), at(resources, "requests", {})
    for field, amounts in (("limits", limits), ("requests", requests)):
        for name, amount in amounts.items():
            if _is_extended(name) and quantity(amount).denominator != 1:
                yield _invalid(f"{path}.{field}[{name}]", str(amount), "must be an integer")
    for name, amount in requests.items():
        if name not in limits:
            if _is_extended(name):
                yield _required(f"{path}.limits", "Limit must be set for non overcommitable resources")
        elif _is_extended(name) and quantity(amount) != quantity(limits[name]):
            yield _invalid(f"{path}.requests", str(amount), f"must be equal to {name} limit of {limits[name]}")
        elif quantity(amount) > quantity(limits[name]):
            why = f"must be less than or equal to {name} limit of {limits[name]}"
            yield _invalid(f"{path}.requests", str(amount), why)


def _is_extended(name: str) -> bool:
    """Whether it is a device's, such as nvidia.com/gpu: whatever has a domain that is not Kubernetes' own."""
    return "/" in name and "kubernetes.io/" not in name


def _probe(probe: Object, path: str) -> Iterator[Cause]:
    for number in _PROBE_NUMBERS:
        if at(probe, number, 0) < 0:
            yield _invalid(f"{path}.{number}", probe[number], "must be greater than or equal to 0")


def _pod(obj: Object) -> Iterator[Cause]:
    return _pod_spec(at(obj, "spec", {}), "spec")


def _template(obj: Object) -> Iterator[Cause]:
    return _pod_spec(at(obj, "spec.template.spec", {}), "spec.template.spec")


def _selected_template(obj: Object) -> Iterator[Cause]:
    yield from _template(obj)
    labels = at(obj, "spec.template.metadata.labels", {})
    if not label_selector(selector_text(at(obj, "spec.selector")))(labels):
        yield _invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`")


def _deployment(obj: Object) -> Iterator[Cause]:
    yield from _selected_template(obj)
    for field in ("maxUnavailable", "maxSurge"):
        path = f"spec.strategy.rollingUpdate.{field}"
        value = at(obj, path, 0)
        if isinstance(value, str) and not re.fullmatch("[0-9]+%", value):
            yield _invalid(path, value, _PERCENT)
        elif not isinstance(value, str) and value < 0:
            yield _invalid(path, value, "must be greater than or equal to 0")


# autoscalers


def _autoscaler(obj: Object) -> Iterator[Cause]:
    least, most = at(obj, "spec.minReplicas", 1), at(obj, "spec.maxReplicas", 0)
    if least < 1:
        yield _invalid("spec.minReplicas", least, "must be greater than or equal to 1")
    if most < 1:
        yield _invalid("spec.maxReplicas", most, "must be greater than 0")
    if most < least:
        yield _invalid("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`")
    for place, metric in enumerate(at(obj, "spec.metrics", [])):
        path = f"spec.metrics[{place}]"
        for source, spec in metric.items():
            yield from _target(at(spec, "target", {}), f"{path}.{source}.target")
        if metric["type"] == "Pods" and not metric.get("pods"):
            yield _required(f"{path}.pods", "must populate information for the given metric source")
        elif metric["type"] == "Pods" and at(metric, "pods.target.averageValue") is None:
            yield _required(f"{path}.pods.target.averageValue", "must specify a positive target averageValue")


def _target(target: Object, path: str) -> Iterator[Cause]:
    for field in ("value", "averageValue"):
        if at(target, field) is not None and quantity(target[field]) <= 0:
            yield _invalid(f"{path}.{field}", target[field], "must be positive")


# custom resources


def _node_pool(obj: Object) -> Iterator[Cause]:
    if at(obj, "spec.template.spec") is None:
        yield _required("spec.template.spec")
    weight = at(obj, "spec.weight", 1)
    if not 1 <= weight <= 100:
        bound = "greater than or equal to 1" if weight < 1 else "less than or equal to 100"
        yield _invalid("spec.weight", weight, f"spec.weight in body should be {bound}")
    for name, limit in at(obj, "spec.limits", {}).items():
        if not is_quantity(limit):
            yield _invalid(f"spec.limits.{name}", limit, "must be a quantity such as 4 or 16Gi")
    yield from _lifetimes(at(obj, "spec.template.spec", {}), "spec.template.spec")
    after = "spec.disruption.consolidateAfter"
    yield from _pattern(after, at(obj, after, "0s"), _DURATIONS)
    for place, budget in enumerate(at(obj, "spec.disruption.budgets", [])):
        path = f"spec.disruption.budgets[{place}]"
        yield from _pattern(f"{path}.nodes", at(budget, "nodes", "10%"), _NODES)
        for field in ("schedule", "duration"):
            if at(budget, field) is not None:
                yield _invalid(f"{path}.{field}", budget[field], "not emulated here: leave it out, or ask EKS")


def _node_claim(obj: Object) -> Iterator[Cause]:
    return _lifetimes(at(obj, "spec", {}), "spec")


def _lifetimes(node: Object, path: str) -> Iterator[Cause]:
    yield from _pattern(f"{path}.expireAfter", at(node, "expireAfter", "720h"), _DURATIONS)
    yield from _pattern(f"{path}.terminationGracePeriod", at(node, "terminationGracePeriod", "0s"), _SPANS)


def _pattern(field: str, value: Any, pattern: str) -> Iterator[Cause]:
    if not re.match(pattern, str(value)):
        yield _invalid(field, value, f"{field} in body should match '{pattern}'")


def _ingress_class_params(obj: Object) -> Iterator[Cause]:
    for place, cidr in enumerate(at(obj, "spec.inboundCIDRs", [])):
        path = f"spec.inboundCIDRs[{place}]"
        try:
            address = ip_interface(cidr)
        except ValueError:
            yield _invalid(path, cidr, "Could not be parsed as a CIDR")
            continue
        if "/" not in str(cidr):
            yield _invalid(path, cidr, f'Could not be parsed as a CIDR (did you mean "{address.network}")')
        elif address.ip != address.network.network_address:
            yield _invalid(path, cidr, f'Network contains bits outside prefix (did you mean "{address.network}")')


_CHECKS: dict[Resource, Callable[[Object], Iterable[Cause]]] = {
    kinds.POD: _pod,
    kinds.DEPLOYMENT: _deployment,
    kinds.REPLICA_SET: _selected_template,
    kinds.STATEFUL_SET: _selected_template,
    kinds.DAEMON_SET: _selected_template,
    kinds.JOB: _template,
    kinds.HPA: _autoscaler,
    kinds.NODE_POOL: _node_pool,
    kinds.NODE_CLAIM: _node_claim,
    kinds.INGRESS_CLASS_PARAMS: _ingress_class_params,
}
