"""Sets of fields, as `metadata.managedFields` records who owns what.

A set is a set of paths; a step is `f:name` (a field), `k:{...}` (an item of an associative list, by its keys) or
`v:...` (an element of a set). The set has the leaves, and each item of an associative list itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pytest_gpulab.cluster.api.schemas import Schema, child, item_key, items
from pytest_gpulab.cluster.objects import Object

Path = tuple[str, ...]
Fields = frozenset[Path]
_UNOWNED = frozenset(
    {("f:apiVersion",), ("f:kind",)}
    | {
        ("f:metadata", f"f:{name}")
        for name in (
            "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "managedFields",
            "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds",
        )
    }
)  # fmt: skip


def fields_of(schema: Schema, obj: Object) -> Fields:
    """The fields an object sets, without its identity."""
    return frozenset(path for path in _walk(schema, obj, ()) if path[:2] not in _UNOWNED and path[:1] not in _UNOWNED)


def _walk(schema: Schema, value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, dict) and value and schema.get("x-kubernetes-map-type") != "atomic":
        for key, item in value.items():
            yield from _walk(child(schema, key), item, (*path, f"f:{key}"))
    elif isinstance(value, list) and value and list_type(schema) != "atomic":
        for item in value:
            step = (*path, item_step(schema, item))
            yield step
            if list_type(schema) == "map":
                yield from _walk(items(schema), item, step)
    elif path:
        yield path


def list_type(schema: Schema) -> str:
    """`map`, `set` or `atomic`."""
    kind: str = schema.get("x-kubernetes-list-type", "atomic")
    return kind


def item_step(schema: Schema, item: Any) -> str:
    """The step to an item of an associative list or set."""
    if list_type(schema) == "map":
        return "k:" + _compact(item_key(schema.get("x-kubernetes-list-map-keys") or (), item))
    return "v:" + _compact(item)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def to_tree(fields: Iterable[Path]) -> Object:
    """`fieldsV1`."""
    tree: Object = {}
    for path in sorted(fields):
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        if not path[-1].startswith("f:"):
            node["."] = {}
    return tree


def from_tree(tree: Object) -> Fields:
    """The inverse of `to_tree`."""
    return frozenset(_leaves(tree, ()))


def _leaves(tree: Object, path: Path) -> Iterator[Path]:
    if path and (not tree or "." in tree):
        yield path
    for step, below in tree.items():
        if step != ".":
            yield from _leaves(below, (*path, step))


def value_at(schema: Schema, value: Any, path: Path) -> Any:
    """What is at a path, None when there is nothing."""
    for step in path:
        if isinstance(value, dict) and step.startswith("f:"):
            schema, value = child(schema, step[2:]), value.get(step[2:])
        elif isinstance(value, list):
            value = next((item for item in value if item_step(schema, item) == step), None)
            schema = items(schema)
        else:
            return None
    return value


def removed(schema: Schema, value: Any, path: Path) -> Any:
    """A copy without the field or item at a path; containers it leaves empty stay."""
    step, rest = path[0], path[1:]
    if isinstance(value, dict) and step.startswith("f:") and step[2:] in value:
        name = step[2:]
        if not rest:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: removed(child(schema, name), value[name], rest)}
    if isinstance(value, list):
        if not rest:
            return [item for item in value if item_step(schema, item) != step]
        return [removed(items(schema), item, rest) if item_step(schema, item) == step else item for item in value]
    return value


def dotted(path: Path) -> str:
    """A path as error messages write it: `.spec.template.spec.containers[name="vllm"].image`."""
    text = ""
    for step in path:
        if step.startswith("f:"):
            text += f".{step[2:]}"
        elif step.startswith("k:"):
            keys = json.loads(step[2:])
            text += "[" + ",".join(f"{key}={_compact(value)}" for key, value in keys.items()) + "]"
        else:
            text += f"[={step[2:]}]"
    return text
