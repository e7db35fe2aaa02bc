"""Decoding an object by its schema: unknown fields, wrong types, missing fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_gpulab.cluster.api.schemas import QUANTITY, Schema, child, items, schema_of
from pytest_gpulab.cluster.api.values import wrong_values
from pytest_gpulab.cluster.errors import BadRequest, Cause, invalid
from pytest_gpulab.cluster.objects import Object, at
from pytest_gpulab.cluster.quantity import is_quantity
from pytest_gpulab.cluster.resources import Resource

_QUANTITY = "'^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
}


@dataclass
class Decoded:
    """An object without its unknown fields, and what was wrong with it."""

    obj: Object
    unknown: list[str] = field(default_factory=list)
    mistyped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def decode(resource: Resource, obj: Object) -> Decoded:
    """Read an object as a Go server would: unknown fields are dropped, and reported; null is as good as nothing."""
    decoded = Decoded(obj)
    schema = schema_of(resource)
    if schema:
        decoded.obj = {**_read(schema, obj, "", decoded)}
    return decoded


def checked(resource: Resource, obj: Object, field_validation: str) -> tuple[Object, list[str]]:
    """The object to store and the warnings to send. Wrong types and values, missing and, if Strict, unknown fields
    raise."""
    decoded, warnings = _decoded(resource, obj, field_validation)
    wrong = [Cause(path, "Required value", "FieldValueRequired") for path in decoded.missing]
    wrong = wrong or wrong_values(resource, decoded.obj)
    if wrong:
        raise invalid(resource, at(obj, "metadata.name", ""), *wrong)
    return decoded.obj, warnings


def typed(resource: Resource, obj: Object, field_validation: str) -> tuple[Object, list[str]]:
    """The same for a part of an object, which may leave out what the whole has."""
    decoded, warnings = _decoded(resource, obj, field_validation)
    return decoded.obj, warnings


def _decoded(resource: Resource, obj: Object, field_validation: str) -> tuple[Decoded, list[str]]:
    if not isinstance(obj, dict) or not isinstance(obj.get("metadata") or {}, dict):
        raise BadRequest(f"the object must be a JSON object with metadata, got {type(obj).__name__}")
    decoded = decode(resource, obj)
    if decoded.mistyped:
        raise BadRequest(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
            + "; ".join(decoded.mistyped)
        )
    warnings = [f'unknown field "{path}"' for path in decoded.unknown]
    if warnings and field_validation == "Strict":
        raise BadRequest(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: '
            "strict decoding error: " + ", ".join(warnings)
        )
    return decoded, [] if field_validation == "Ignore" else warnings


def _read(schema: Schema, value: Any, path: str, found: Decoded) -> Any:
    if value is None or not schema:
        return value
    if not _has_type(schema, value):
        found.mistyped.append(f"{path}: must be {schema['type']}, got {type(value).__name__} {value!r}")
        return value
    if schema.get("format") == QUANTITY and not is_quantity(value):
        found.mistyped.append(f"{path}: quantities must match the regular expression {_QUANTITY}, got {value!r}")
        return value
    if isinstance(value, dict):
        return _read_fields(schema, value, path, found)
    if isinstance(value, list):
        return [_read(items(schema), item, f"{path}[{place}]", found) for place, item in enumerate(value)]
    return value


def _read_fields(schema: Schema, value: Object, path: str, found: Decoded) -> Object:
    open_ended = "properties" not in schema or "additionalProperties" in schema
    known = schema.get("properties") or {}
    result: Object = {}
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if key in known and item is None:
            continue
        if key in known or open_ended or schema.get("x-kubernetes-preserve-unknown-fields"):
            result[key] = _read(child(schema, key), item, where, found)
        else:
            found.unknown.append(where)
    if not path and "spec" in known and value.get("spec") is None:
        _read(child(schema, "spec"), {}, "spec", found)
    if path not in ("", "metadata", "status"):
        absent = [key for key in schema.get("required") or () if value.get(key) is None]
        found.missing += [f"{path}.{key}" for key in absent]
    return result


def _has_type(schema: Schema, value: Any) -> bool:
    if schema.get("x-kubernetes-int-or-string"):
        return isinstance(value, (str, int, float))
    expected = _TYPES.get(schema.get("type", ""))
    if expected is None:
        return True
    return isinstance(value, expected) and (not isinstance(value, bool) or bool in expected)
