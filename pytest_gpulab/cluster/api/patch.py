"""The three client-side patches: JSON (RFC 6902), merge (RFC 7386) and Kubernetes' strategic merge."""

from __future__ import annotations

from typing import Any

import jsonpatch
import jsonpointer

from pytest_gpulab.cluster.api.schemas import Schema, child, items, schema_of
from pytest_gpulab.cluster.errors import BadRequest, Invalid, Unsupported
from pytest_gpulab.cluster.objects import Object, edited, merged
from pytest_gpulab.cluster.resources import Resource

JSON, MERGE = "application/json-patch+json", "application/merge-patch+json"
STRATEGIC, APPLY = "application/strategic-merge-patch+json", "application/apply-patch+yaml"


def patched(resource: Resource, obj: Object, patch: Any, media_type: str) -> Object:
    """A new object: `patch` of the given media type laid over `obj`."""
    if media_type == JSON:
        return _json_patch(obj, patch)
    if media_type not in (MERGE, STRATEGIC) or (media_type == STRATEGIC and resource.custom):
        accepted = ", ".join([JSON, MERGE, APPLY] if resource.custom else [JSON, MERGE, STRATEGIC, APPLY])
        raise Unsupported(
            "the body of the request was in an unknown format - accepted media types include: " + accepted
        )
    if not isinstance(patch, dict):
        raise BadRequest(f"a {media_type} body must be a JSON object, got {type(patch).__name__}")
    if media_type == MERGE:
        result: Object = merged(obj, patch)
        return result
    return _strategic(schema_of(resource), obj, patch)


def _json_patch(obj: Object, patch: Any) -> Object:
    if not isinstance(patch, list):
        raise BadRequest(f"a JSON patch must be a list of operations, got {type(patch).__name__}")
    try:
        result = jsonpatch.apply_patch(edited(obj), patch)
    except (jsonpatch.JsonPatchTestFailed, jsonpatch.JsonPatchConflict, jsonpointer.JsonPointerException) as error:
        raise Invalid(f"the server rejected our request due to an error in our request: {error}") from error
    except (jsonpatch.InvalidJsonPatch, TypeError, KeyError) as error:
        raise BadRequest(f"the JSON patch is malformed: {error}") from error
    if not isinstance(result, dict):
        raise BadRequest("the JSON patch must leave an object")
    return result


def _strategic(schema: Schema, value: Any, patch: Object) -> Object:
    """Lists with a merge key merge item by item; kubectl's `$` directives are obeyed."""
    if patch.get("$patch") == "replace":
        return {key: item for key, item in patch.items() if key != "$patch"}
    if patch.get("$patch") == "delete":
        return {}
    result: Object = dict(value) if isinstance(value, dict) else {}
    for key, item in patch.items():
        if key.startswith("$"):
            continue
        if item is None:
            result.pop(key, None)
        elif isinstance(item, dict):
            result[key] = _strategic(child(schema, key), result.get(key), item)
        elif isinstance(item, list):
            result[key] = _list(child(schema, key), result.get(key) or [], item)
        else:
            result[key] = item
    return _directives(schema, result, patch)


def _directives(schema: Schema, result: Object, patch: Object) -> Object:
    for key, names in patch.items():
        directive, _, field = key.partition("/")
        if directive == "$deleteFromPrimitiveList":
            result[field] = [item for item in result.get(field) or [] if item not in names]
        elif directive == "$setElementOrder":
            result[field] = _in_order(child(schema, field), result.get(field) or [], names)
    if "$retainKeys" in patch:
        result = {key: item for key, item in result.items() if key in patch["$retainKeys"]}
    return result


def _list(schema: Schema, current: list[Any], patch: list[Any]) -> list[Any]:
    if "merge" not in str(schema.get("x-kubernetes-patch-strategy", "")).split(","):
        return patch
    key = schema.get("x-kubernetes-patch-merge-key")
    if not key:
        return current + [item for item in patch if item not in current]
    if any(isinstance(item, dict) and item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if item.get("$patch") != "replace"]
    result = list(current)
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise BadRequest(f"each item of the patched list must have its merge key {key!r}, got {item!r}")
        place = next((n for n, old in enumerate(result) if old.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            result = [old for old in result if old.get(key) != item[key]]
        elif place is None:
            result.append(_strategic(items(schema), {}, item))
        else:
            result[place] = _strategic(items(schema), result[place], item)
    return result


def _in_order(schema: Schema, values: list[Any], order: list[Any]) -> list[Any]:
    """Named items in the given order; the others keep their places after them."""
    key = schema.get("x-kubernetes-patch-merge-key")
    wanted = [item.get(key) if key and isinstance(item, dict) else item for item in order]

    def place(item: Any) -> int:
        mark = item.get(key) if key and isinstance(item, dict) else item
        return wanted.index(mark) if mark in wanted else len(wanted)

    return sorted(values, key=place)
