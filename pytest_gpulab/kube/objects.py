"""Objects of the Kubernetes API as plain dictionaries, and which object is meant."""

from __future__ import annotations

from typing import Any, NamedTuple

Object = dict[str, Any]


class Ref(NamedTuple):
    """Which object."""

    api_version: str
    kind: str
    name: str
    namespace: str = ""

    @classmethod
    def of(cls, obj: Object) -> Ref:
        """The one that `obj` describes."""
        meta = obj["metadata"]
        return cls(obj["apiVersion"], obj["kind"], meta["name"], meta.get("namespace") or "")

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"
