"""Status conditions, as pods, nodes, deployments, autoscalers and NodeClaims carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_gpulab.cluster.objects import Object, seconds, timestamp


def condition(obj: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """The condition of this type, None when it was never set."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item["type"] == kind), None)


def is_true(obj: Mapping[str, Any], kind: str) -> bool:
    """Whether the condition is set and True."""
    found = condition(obj, kind)
    return found is not None and found["status"] == "True"


def since(obj: Mapping[str, Any], kind: str) -> float | None:
    """When the condition last changed its status, seconds of the clock (whole: the API keeps no fractions)."""
    found = condition(obj, kind)
    return seconds(found["lastTransitionTime"]) if found else None


def with_condition(
    obj: Object,
    now: float,
    kind: str,
    status: str | bool,
    reason: str = "",
    message: str = "",
    *,
    updated: float | None = None,
) -> Object:
    """A copy with the condition set; the transition time moves only when its status does.

    `updated`: lastUpdateTime, of conditions that have one.
    """
    text = status if isinstance(status, str) else str(status)
    old = condition(obj, kind)
    moved = old is None or old["status"] != text
    at = timestamp(now) if moved or old is None else old["lastTransitionTime"]
    new = {"type": kind, "status": text, "lastTransitionTime": at}
    new |= {} if updated is None else {"lastUpdateTime": timestamp(updated)}
    new |= {"reason": reason} if reason else {}
    new |= {"message": message} if message else {}
    conditions = (obj.get("status") or {}).get("conditions") or ()
    replaced = [new if item["type"] == kind else item for item in conditions]
    return with_status(obj, conditions=replaced if old else [*replaced, new])


def with_status(obj: Object, **fields: Any) -> Object:
    """A copy with some status fields replaced; None removes one."""
    status = {**(obj.get("status") or {}), **fields}
    return {**obj, "status": {key: value for key, value in status.items() if value is not None}}
