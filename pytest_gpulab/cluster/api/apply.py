"""Server-side apply: who manages which field, what an apply changes, and when it conflicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytest_gpulab.cluster.api.fields import (
    Fields,
    dotted,
    fields_of,
    from_tree,
    item_step,
    list_type,
    removed,
    to_tree,
    value_at,
)
from pytest_gpulab.cluster.api.schemas import Schema, child, items, schema_of
from pytest_gpulab.cluster.errors import Conflict
from pytest_gpulab.cluster.objects import Object
from pytest_gpulab.cluster.resources import Resource


@dataclass(frozen=True)
class Manager:
    """Who writes, and how: one entry of `managedFields`."""

    name: str
    operation: str
    subresource: str = ""

    def owns(self, entry: Object) -> bool:
        """Whether an entry is this manager's."""
        return (entry.get("manager"), entry.get("operation"), entry.get("subresource", "")) == (
            self.name,
            self.operation,
            self.subresource,
        )

    def entry(self, resource: Resource, fields: Fields, time: str) -> Object:
        """What this manager owns, for `managedFields`."""
        written: Object = {
            "manager": self.name,
            "operation": self.operation,
            "apiVersion": resource.api_version,
            "time": time,
            "fieldsType": "FieldsV1",
            "fieldsV1": to_tree(fields),
        }
        return {**written, "subresource": self.subresource} if self.subresource else written


def applied(
    resource: Resource, live: Object | None, config: Object, manager: Manager, *, force: bool, time: str
) -> Object:
    """The live object (None: a new one) after `manager` applied `config`. `Conflict` unless forced."""
    schema = schema_of(resource)
    config = {**config, "metadata": {k: v for k, v in config["metadata"].items() if k != "managedFields"}}
    mine = fields_of(schema, config)
    entries = managed(live) if live else []
    before = next((from_tree(entry["fieldsV1"]) for entry in entries if manager.owns(entry)), frozenset())
    others = [entry for entry in entries if not manager.owns(entry)]
    if live is not None:
        taken = _taken(schema, live, config, mine, others)
        if taken and not force:
            raise _refusal(taken)
        others = [_without(entry, taken.get(entry["manager"], frozenset())) for entry in others]
    kept = mine.union(*(from_tree(entry["fieldsV1"]) for entry in others))
    result = _overlaid(schema, live or {}, config)
    for path in sorted(before - kept, reverse=True):
        result = removed(schema, result, path)
    return with_managed(result, [*others, manager.entry(resource, mine, time)], live)


def _taken(schema: Schema, live: Object, config: Object, mine: Fields, others: list[Object]) -> dict[str, Fields]:
    """By manager, the fields that others own and this apply sets to something else."""
    taken: dict[str, Fields] = {}
    for entry in others:
        shared = mine & from_tree(entry["fieldsV1"])
        differing = frozenset(
            path
            for path in shared
            if path[-1].startswith("f:") and value_at(schema, live, path) != value_at(schema, config, path)
        )
        if differing:
            taken[entry["manager"]] = taken.get(entry["manager"], frozenset()) | differing
    return taken


def _refusal(taken: dict[str, Fields]) -> Conflict:
    found = [(manager, dotted(path)) for manager, fields in taken.items() for path in sorted(fields)]
    causes = [
        {"reason": "FieldManagerConflict", "message": f'conflict with "{manager}"', "field": path}
        for manager, path in found
    ]
    listed = ", ".join(f'conflict with "{manager}": {path}' for manager, path in found)
    noun = "conflict" if len(found) == 1 else "conflicts"
    return Conflict(f"Apply failed with {len(found)} {noun}: {listed}", causes=causes)


def _overlaid(schema: Schema, live: Any, config: Any) -> Any:
    """`config` over `live`: maps merge, associative lists merge by key, sets unite, the rest is replaced."""
    if isinstance(config, dict) and isinstance(live, dict) and schema.get("x-kubernetes-map-type") != "atomic":
        laid = {key: _overlaid(child(schema, key), live.get(key), value) for key, value in config.items()}
        return {**live, **laid}
    if isinstance(config, list) and isinstance(live, list) and list_type(schema) != "atomic":
        wanted = {item_step(schema, item): item for item in config}
        result = [_overlaid(items(schema), old, wanted.pop(item_step(schema, old), old)) for old in live]
        return result + list(wanted.values())
    return config


def _without(entry: Object, fields: Fields) -> Object:
    return {**entry, "fieldsV1": to_tree(from_tree(entry["fieldsV1"]) - fields)} if fields else entry


def managed(obj: Object) -> list[Object]:
    """`metadata.managedFields`."""
    entries: list[Object] = obj["metadata"].get("managedFields") or []
    return entries


def with_managed(obj: Object, entries: list[Object], live: Object | None) -> Object:
    """The object with its managers; one whose fields are unchanged keeps its time, one without fields goes."""
    old = {(entry["manager"], entry["operation"], entry.get("subresource")): entry for entry in managed(live or obj)}
    settled = []
    for entry in entries:
        known = old.get((entry["manager"], entry["operation"], entry.get("subresource")))
        same = known is not None and known["fieldsV1"] == entry["fieldsV1"]
        settled.append(known if same else entry)
    left = [entry for entry in settled if entry and entry["fieldsV1"]]
    return {**obj, "metadata": {**obj["metadata"], "managedFields": left}}


def _entries(live: Object | None, new: Object) -> list[Object]:
    """The managers before a write: those the writer sent along (kubectl moves its own), else those of the object."""
    if live is None:
        return []
    sent = new["metadata"].get("managedFields")
    return managed(live) if sent is None else [entry for entry in sent if entry.get("fieldsV1")]


def tracked(resource: Resource, live: Object | None, new: Object, manager: Manager, time: str) -> Object:
    """The new object with the fields it changed given to the manager who wrote it."""
    schema = schema_of(resource)
    has = fields_of(schema, new)
    had = fields_of(schema, live) if live else frozenset()
    changed = frozenset(
        path for path in has if path not in had or value_at(schema, live, path) != value_at(schema, new, path)
    )
    entries = _entries(live, new)
    if live is not None and not changed and has == had:
        return with_managed(new, entries, live)
    before = next((from_tree(entry["fieldsV1"]) for entry in entries if manager.owns(entry)), frozenset())
    gone = (had - has) | changed
    others = [_without(entry, gone) for entry in entries if not manager.owns(entry)]
    return with_managed(new, [*others, manager.entry(resource, (before - (had - has)) | changed, time)], live)
