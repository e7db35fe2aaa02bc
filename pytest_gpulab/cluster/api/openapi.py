"""`/openapi/v3`: what kubectl needs to validate, explain and merge; and an empty `/openapi/v2`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from pytest_gpulab.cluster.api.schemas import REFERENCE, reachable, schemas
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import Resource, Resources

_QUERY = [
    {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
    for name in ("dryRun", "fieldManager", "fieldValidation", "force", "pretty")
]
_ACTIONS = {"get": "get", "put": "put", "patch": "patch", "delete": "delete"}
_KIND = "x-kubernetes-group-version-kind"


VERSION_2 = b"\x0a\x032.0"
"""`/openapi/v2` as protobuf: version 2.0, without definitions. kubectl reads it for the items of a `kind: List` only,
and checks no further those that it finds no definition for."""
VERSION_2_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"


def document(path: str, resources: Resources) -> Object | None:
    """The index or the specification of one group and version; None where there is none."""
    if path == "/openapi/v3":
        places = sorted({resource.path for resource in resources})
        return {"paths": {place[1:]: {"serverRelativeURL": f"/openapi/v3{place}?hash=gpulab"} for place in places}}
    if not path.startswith("/openapi/v3/"):
        return None
    place = path.removeprefix("/openapi/v3")
    served = [resource for resource in resources if resource.path == place]
    if not served:
        return None
    return {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.32.0"},
        "paths": {url: methods for resource in served for url, methods in _paths(resource)},
        "components": {"schemas": _components(tuple(served))},
    }


def _paths(resource: Resource) -> Iterator[tuple[str, Object]]:
    base = resource.path + ("/namespaces/{namespace}" if resource.namespaced else "")
    collection = f"{base}/{resource.plural}"
    yield collection, {"get": _operation(resource, "list"), "post": _operation(resource, "post")}
    yield f"{collection}/{{name}}", {verb: _operation(resource, action) for verb, action in _ACTIONS.items()}


def _operation(resource: Resource, action: str) -> Object:
    body = {"schema": {"$ref": REFERENCE + _name(resource)}}
    return {
        "parameters": _QUERY,
        "responses": {"200": {"description": "OK", "content": {"application/json": body}}},
        "x-kubernetes-action": action,
        _KIND: _kind(resource),
    }


def _kind(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


def _name(resource: Resource) -> str:
    """The schema's name; a custom kind gets one of its own."""
    for name, schema in schemas().items():
        if _kind(resource) in schema.get(_KIND, ()):
            return name
    return ".".join([*reversed(resource.group.split(".")), resource.version, resource.kind])


@lru_cache(maxsize=64)
def _components(served: tuple[Resource, ...]) -> Object:
    names = [_name(resource) for resource in served]
    known: Object = {name: schemas()[name] for name in reachable(names, schemas())}
    for resource, name in zip(served, names, strict=True):
        known.setdefault(name, _any_object(resource))
    return known


def _any_object(resource: Resource) -> Object:
    return {"type": "object", "x-kubernetes-preserve-unknown-fields": True, _KIND: [_kind(resource)]}
