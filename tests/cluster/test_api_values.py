"""Manifests whose fields are right and whose values mean nothing: what the API answers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pytest_gpulab.cluster import errors
from pytest_gpulab.cluster import resources as kinds
from pytest_gpulab.cluster.api.validation import checked
from pytest_gpulab.cluster.clock import VirtualClock
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import Resource
from pytest_gpulab.cluster.store import Store
from tests.cluster.scene import pool


def deployment(rolling: Object | None = None, **container: Any) -> Object:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", **container}]}}
    spec: Object = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    if rolling:
        spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": rolling}
    return {"metadata": {"name": "web"}, "spec": spec}


def pods_metric(**target: Any) -> Object:
    of_type = {"type": "AverageValue" if "averageValue" in target else "Value", **target}
    metric = {"type": "Pods", "pods": {"metric": {"name": "active"}, "target": of_type}}
    spec = {"scaleTargetRef": {"kind": "Deployment", "name": "web"}, "maxReplicas": 2, "metrics": [metric]}
    return {"metadata": {"name": "web"}, "spec": spec}


def autoscaler(**replicas: int) -> Object:
    return {
        "metadata": {"name": "web"},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "web"}, **replicas},
    }


def relabelled(**labels: str) -> Object:
    made = deployment()
    made["spec"]["template"]["metadata"]["labels"] = labels
    return made


def pod(**resources: Object) -> Object:
    return {"metadata": {"name": "web"}, "spec": {"containers": [{"name": "c", "resources": resources}]}}


def inbound(cidr: str) -> Object:
    return {"metadata": {"name": "web"}, "spec": {"inboundCIDRs": [cidr]}}


def node_pool(**spec: Any) -> Object:
    made = pool("web", "spot")
    return {**made, "spec": {**made["spec"], **spec}}


MEANINGLESS: list[tuple[Resource, Object, int, str]] = [
    (
        kinds.DEPLOYMENT,
        deployment(resources={"requests": {"cpu": "abc"}}),
        400,
        "spec.template.spec.containers[0].resources.requests.cpu: quantities must match the regular expression",
    ),
    (
        kinds.HPA,
        pods_metric(averageValue="abc"),
        400,
        "spec.metrics[0].pods.target.averageValue: quantities must match the regular expression",
    ),
    (kinds.HPA, pods_metric(averageValue="0"), 422, 'target.averageValue: Invalid value: "0": must be positive'),
    (kinds.HPA, pods_metric(value="2"), 422, "averageValue: Required value: must specify a positive target"),
    (kinds.DEPLOYMENT, deployment({"maxSurge": "abc%"}), 422, 'maxSurge: Invalid value: "abc%": a valid percent'),
    (kinds.DEPLOYMENT, deployment({"maxSurge": -1}), 422, "maxSurge: Invalid value: -1: must be greater than or"),
    (
        kinds.DEPLOYMENT,
        deployment(readinessProbe={"periodSeconds": -5}),
        422,
        "spec.template.spec.containers[0].readinessProbe.periodSeconds: Invalid value: -5: must be greater than or",
    ),
    (kinds.INGRESS_CLASS_PARAMS, inbound("10.0.0.1/8"), 422, 'bits outside prefix (did you mean "10.0.0.0/8")'),
    (kinds.INGRESS_CLASS_PARAMS, inbound("10.0.0.1"), 422, 'parsed as a CIDR (did you mean "10.0.0.1/32")'),
    (kinds.INGRESS_CLASS_PARAMS, inbound("home"), 422, '"home": Could not be parsed as a CIDR'),
    (kinds.NODE_POOL, node_pool(limits={"cpu": "abc"}), 422, 'spec.limits.cpu: Invalid value: "abc"'),
    (kinds.NODE_POOL, node_pool(disruption={"consolidateAfter": "soon"}), 422, "in body should match"),
    (kinds.NODE_POOL, node_pool(disruption={"budgets": [{"nodes": "x%"}]}), 422, "budgets[0].nodes: Invalid"),
    (
        kinds.NODE_POOL,
        node_pool(disruption={"budgets": [{"nodes": "0", "schedule": "@daily", "duration": "8h"}]}),
        422,
        'budgets[0].schedule: Invalid value: "@daily": not emulated here: leave it out, or ask EKS',
    ),
    (kinds.NODE_POOL, {"metadata": {"name": "web"}}, 422, "spec.template.spec: Required value"),
    (kinds.NODE_POOL, pool("web", "spot", 1, expireAfter="2w"), 422, "spec.expireAfter in body should match"),
    (
        kinds.NODE_CLAIM,
        {"metadata": {"name": "web"}, "spec": {"terminationGracePeriod": "Never"}},
        422,
        "should match",
    ),
    (kinds.NODE_POOL, node_pool(weight=500), 422, "spec.weight in body should be less than or equal to 100"),
    (kinds.NODE_POOL, node_pool(weight=0), 422, "spec.weight in body should be greater than or equal to 1"),
    (kinds.HPA, autoscaler(minReplicas=0, maxReplicas=2), 422, "minReplicas: Invalid value: 0: must be greater than"),
    (kinds.HPA, autoscaler(maxReplicas=0), 422, "spec.maxReplicas: Invalid value: 0: must be greater than 0"),
    (kinds.HPA, autoscaler(minReplicas=3, maxReplicas=2), 422, "must be greater than or equal to `minReplicas`"),
    (
        kinds.DEPLOYMENT,
        relabelled(a="c"),
        422,
        'spec.template.metadata.labels: Invalid value: {"a": "c"}: `selector` does not match template `labels`',
    ),
    (kinds.DAEMON_SET, relabelled(), 422, "`selector` does not match template `labels`"),
    (
        kinds.POD,
        pod(requests={"nvidia.com/gpu": "1"}),
        422,
        "spec.containers[0].resources.limits: Required value: Limit must be set for non overcommitable resources",
    ),
    (
        kinds.POD,
        pod(requests={"nvidia.com/gpu": "1"}, limits={"nvidia.com/gpu": "2"}),
        422,
        'spec.containers[0].resources.requests: Invalid value: "1": must be equal to nvidia.com/gpu limit of 2',
    ),
    (
        kinds.POD,
        pod(limits={"nvidia.com/gpu": "500m"}),
        422,
        'resources.limits[nvidia.com/gpu]: Invalid value: "500m": must be an integer',
    ),
    (
        kinds.DEPLOYMENT,
        deployment(resources={"requests": {"cpu": "1500m"}, "limits": {"cpu": 1}}),
        422,
        'template.spec.containers[0].resources.requests: Invalid value: "1500m": must be less than or equal to cpu '
        "limit of 1",
    ),
    (kinds.POD, {"metadata": {"name": "web"}}, 422, "spec.containers: Required value"),
    (kinds.DEPLOYMENT, {"metadata": {"name": "web"}}, 422, "[spec.selector: Required value, spec.template: Req"),
]


@pytest.mark.parametrize(("resource", "obj", "code", "words"), MEANINGLESS)
def test_values_that_nothing_can_be_computed_with_are_refused(
    resource: Resource, obj: Object, code: int, words: str
) -> None:
    with pytest.raises(errors.ApiError, match=re.escape(words)) as refused:
        checked(resource, obj, "Strict")
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("resource", "obj"),
    [
        (kinds.DEPLOYMENT, deployment({"maxSurge": "25%", "maxUnavailable": 0})),
        (kinds.DEPLOYMENT, deployment(resources={"limits": {"cpu": 0.5, "memory": "1.5Gi", "storage": "2Ei"}})),
        (kinds.HPA, pods_metric(averageValue="1m")),
        (kinds.HPA, autoscaler(minReplicas=2, maxReplicas=2)),
        (kinds.POD, pod(limits={"nvidia.com/gpu": "1", "cpu": "2"}, requests={"cpu": "2000m", "memory": "1Gi"})),
        (kinds.INGRESS_CLASS_PARAMS, inbound("2001:db8::/32")),
        (kinds.NODE_POOL, node_pool(disruption={"consolidateAfter": "1h30m", "budgets": [{"nodes": "10%"}]})),
    ],
)
def test_values_that_mean_something_pass(resource: Resource, obj: Object) -> None:
    assert checked(resource, obj, "Strict") == (obj, [])


def test_a_number_of_a_probe_that_is_0_counts_as_left_out() -> None:
    probe = {"httpGet": {"port": 8000}, "initialDelaySeconds": 0, "periodSeconds": 0, "failureThreshold": 7}
    made = Store(VirtualClock()).create(kinds.DEPLOYMENT, deployment(readinessProbe=probe), "default")
    stored = made["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]
    assert (stored["initialDelaySeconds"], stored["periodSeconds"], stored["failureThreshold"]) == (0, 10, 7)
