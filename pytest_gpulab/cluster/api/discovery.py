"""What the server says it serves: versions, groups and resources, singly and aggregated."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import METRICS_GROUP, METRICS_VERSION, Resource, Resources

VERSION: Object = {
    "major": "1",
    "minor": "32",
    "gitVersion": "v1.32.0+gpulab",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_OWN_VERBS = {
    "log": ["get"],
    "attach": ["create", "get"],
    "eviction": ["create"],
    "binding": ["create"],
    "finalize": ["update"],
}
_OWN_KINDS = {
    "attach": ("", "v1", "PodAttachOptions"),
    "scale": ("autoscaling", "v1", "Scale"),
    "eviction": ("policy", "v1", "Eviction"),
    "binding": ("", "v1", "Binding"),
}
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"


def group_versions(resources: Resources) -> list[tuple[str, str]]:
    """Every group and version served, custom metrics among them."""
    served = {(resource.group, resource.version) for resource in resources}
    return sorted(served | {(METRICS_GROUP, METRICS_VERSION)})


def document(path: str, resources: Resources, *, aggregated: bool = False) -> Object | None:
    """The discovery document at a path, None where there is none."""
    if path in ("/api", "/apis") and aggregated:
        return _aggregated(resources, core=path == "/api")
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups(resources)}
    parts = path.strip("/").split("/")
    if path == "/api/v1":
        return _resource_list("", "v1", resources)
    if parts[0] == "apis" and len(parts) == 2:
        group = next((group for group in _groups(resources) if group["name"] == parts[1]), None)
        return {"kind": "APIGroup", "apiVersion": "v1", **group} if group else None
    if parts[0] == "apis" and len(parts) == 3 and (parts[1], parts[2]) in group_versions(resources):
        return _resource_list(parts[1], parts[2], resources)
    return None


def _groups(resources: Resources) -> list[Object]:
    named = [pair for pair in group_versions(resources) if pair[0]]
    groups = []
    for name, pairs in groupby(named, key=lambda pair: pair[0]):
        versions = [{"groupVersion": f"{name}/{version}", "version": version} for _, version in pairs]
        groups.append({"name": name, "versions": versions, "preferredVersion": versions[0]})
    return groups


def _in(group: str, version: str, resources: Resources) -> Iterable[Resource]:
    return (resource for resource in resources if (resource.group, resource.version) == (group, version))


def _resource_list(group: str, version: str, resources: Resources) -> Object:
    listed = [entry for resource in _in(group, version, resources) for entry in _entries(resource)]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": listed,
    }


def _entries(resource: Resource) -> Iterable[Object]:
    yield {
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": VERBS,
        "shortNames": list(resource.short_names),
        "categories": list(resource.categories),
    }
    for sub in resource.subresources:
        entry = {
            "name": f"{resource.plural}/{sub}",
            "singularName": "",
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": _OWN_VERBS.get(sub, ["get", "patch", "update"]),
        }
        if sub in _OWN_KINDS:
            group, version, kind = _OWN_KINDS[sub]
            entry |= {"group": group, "version": version, "kind": kind}
        yield entry


def _aggregated(resources: Resources, *, core: bool) -> Object:
    pairs = [pair for pair in group_versions(resources) if (pair[0] == "") == core]
    groups = [
        {
            "metadata": {"name": name, "creationTimestamp": None},
            "versions": [_version(group, version, resources) for group, version in members],
        }
        for name, members in groupby(pairs, key=lambda pair: pair[0])
    ]
    return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": groups}


def _version(group: str, version: str, resources: Resources) -> Object:
    listed = [_discovered(resource) for resource in _in(group, version, resources)]
    return {"version": version, "resources": listed, "freshness": "Current"}


def _discovered(resource: Resource) -> Object:
    def kind(sub: str = "") -> Object:
        group, version, name = _OWN_KINDS.get(sub, (resource.group, resource.version, resource.kind))
        return {"group": group, "version": version, "kind": name}

    return {
        "resource": resource.plural,
        "responseKind": kind(),
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "verbs": VERBS,
        "shortNames": list(resource.short_names),
        "categories": list(resource.categories),
        "subresources": [
            {"subresource": sub, "responseKind": kind(sub), "verbs": _OWN_VERBS.get(sub, ["get", "patch", "update"])}
            for sub in resource.subresources
        ],
    }
