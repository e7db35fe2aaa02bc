"""Kubernetes objects as plain JSON: copying, merging and naming them.

An object that came out of the store, or was handed to it, is shared and must not be changed: build a new one with
`edited` (all of it is a copy) or `merged` (only what the patch touches is).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace ("" for cluster-scoped kinds) and name."""


def edited(value: Any) -> Any:
    """A deep copy of JSON, free to change."""
    if isinstance(value, dict):
        return {key: edited(item) for key, item in value.items()}
    if isinstance(value, list):
        return [edited(item) for item in value]
    return value


def merged(value: Any, patch: Any) -> Any:
    """RFC 7386: `patch` laid over `value`; a null removes. Neither is changed, untouched parts are shared."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for key, item in patch.items():
        if item is None:
            result.pop(key, None)
        elif isinstance(item, dict):
            result[key] = merged(result.get(key), item)
        else:
            result[key] = item
    return result


def at(value: Any, path: str, default: Any = None) -> Any:
    """What is at a dotted path such as `status.phase`."""
    for key in path.split("."):
        if not isinstance(value, dict):
            return default
        value = value.get(key)
    return default if value is None else value


def name_of(obj: Mapping[str, Any]) -> str:
    """`metadata.name`."""
    name: str = obj["metadata"]["name"]
    return name


def namespace_of(obj: Mapping[str, Any]) -> str:
    """`metadata.namespace`, "" for cluster-scoped objects."""
    namespace: str = obj["metadata"].get("namespace", "")
    return namespace


def uid_of(obj: Mapping[str, Any]) -> str:
    """`metadata.uid`."""
    uid: str = obj["metadata"]["uid"]
    return uid


def owners(obj: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`metadata.ownerReferences`."""
    references: list[dict[str, Any]] = obj["metadata"].get("ownerReferences") or []
    return references


def controller_of(obj: Mapping[str, Any]) -> dict[str, Any] | None:
    """The owner reference that says `controller: true`."""
    return next((reference for reference in owners(obj) if reference.get("controller")), None)


def owner_reference(owner: Mapping[str, Any], *, controller: bool = True) -> dict[str, Any]:
    """The reference a dependent carries; its owner waits for it in a foreground deletion."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": name_of(owner),
        "uid": uid_of(owner),
        "controller": controller,
        "blockOwnerDeletion": True,
    }


def is_deleting(obj: Mapping[str, Any]) -> bool:
    """Whether the object waits for finalizers, its kubelet or its contents."""
    return bool(obj["metadata"].get("deletionTimestamp"))


@lru_cache(maxsize=4096)
def timestamp(now: float) -> str:
    """RFC 3339 in whole seconds, as `metav1.Time`."""
    return datetime.fromtimestamp(int(now), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(stamp: str) -> float:
    """The clock reading of an RFC 3339 time."""
    return datetime.fromisoformat(stamp).timestamp()
