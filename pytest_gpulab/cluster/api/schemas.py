"""The OpenAPI schemas of the built-in kinds: what fields there are, and how lists of them merge.

The shipped file is Kubernetes' own (Apache-2.0), cut down to the kinds the cluster serves by `compact`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

from pytest_gpulab.cluster.resources import BUILT_IN, Resource

Schema = Mapping[str, Any]
REFERENCE = "#/components/schemas/"
SHIPPED = "kubernetes-1.32.json.gz"
QUANTITY = "quantity"
"""The format of amounts; Kubernetes knows them by the name of their schema alone."""
_KIND = "x-kubernetes-group-version-kind"
_LOOSE = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"x-kubernetes-int-or-string": True, "type": "string"},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {
        "x-kubernetes-int-or-string": True,
        "type": "string",
        "format": QUANTITY,
    },
}
_KEY_DEFAULTS = {"protocol": "TCP"}


@lru_cache(maxsize=1)
def schemas() -> dict[str, dict[str, Any]]:
    """All schemas by name."""
    packed = (files(__package__) / SHIPPED).read_bytes()
    loaded: dict[str, dict[str, Any]] = json.loads(gzip.decompress(packed))
    return loaded


@lru_cache(maxsize=1)
def _roots() -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (kind["group"], kind["version"], kind["kind"]): schema
        for schema in schemas().values()
        for kind in schema.get(_KIND, ())
    }


def schema_of(resource: Resource) -> Schema:
    """The schema of a kind; {} for custom resources, whose fields are all let through."""
    return _roots().get((resource.group, resource.version, resource.kind), {})


def resolved(schema: Schema) -> Schema:
    """What a reference stands for, with the annotations that are beside it."""
    name = schema.get("$ref")
    if not name:
        return schema
    target = schemas().get(name.removeprefix(REFERENCE), {})
    return {**target, **{key: value for key, value in schema.items() if key != "$ref"}}


def child(schema: Schema, key: str) -> Schema:
    """The schema of a field."""
    properties = schema.get("properties") or {}
    if key in properties:
        return resolved(properties[key])
    values = schema.get("additionalProperties")
    return resolved(values) if isinstance(values, dict) else {}


def items(schema: Schema) -> Schema:
    """The schema of a list's items."""
    return resolved(schema.get("items") or {})


def item_key(keys: Iterable[str], item: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies an item of an associative list."""
    return {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys if key in item or key in _KEY_DEFAULTS}


def reachable(start: Iterable[str], among: Mapping[str, Any]) -> list[str]:
    """The names that these schemas refer to, directly or not, and their own; sorted."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in found and name in among:
            found.add(name)
            waiting.extend(_references(among[name]))
    return sorted(found)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "$ref" and isinstance(item, str):
                yield item.rpartition("/")[2]
            else:
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def compact(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas of the served kinds out of all of Kubernetes' JSON schemas, in OpenAPI 3's words."""
    served = {(kind.group, kind.version, kind.kind) for kind in BUILT_IN}
    roots = [name for name, schema in definitions.items() if served & _kinds(schema)]
    return {name: _LOOSE.get(name) or _openapi(definitions[name]) for name in reachable(roots, definitions)}


def _kinds(schema: Schema) -> set[tuple[str, str, str]]:
    return {(kind["group"], kind["version"], kind["kind"]) for kind in schema.get(_KIND, ())}


def _openapi(value: Any) -> Any:
    """JSON schema without null types and with OpenAPI's references."""
    if isinstance(value, list):
        return [_openapi(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _openapi(item) for key, item in value.items()}
    if isinstance(result.get("type"), list):
        result["type"] = next(kind for kind in result["type"] if kind != "null")
    if isinstance(result.get("$ref"), str):
        result["$ref"] = REFERENCE + result["$ref"].rpartition("/")[2]
    return result
