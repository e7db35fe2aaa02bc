"""What every piece of an experiment is: data that is frozen, validated, comparable and hashable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from pytest_gpulab.errors import unknown_name


def digest(text: str) -> str:
    """First 16 hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Definition(BaseModel):
    """A frozen piece of an experiment; unknown fields are refused with the nearest name.

    ValidationError for a value that a field cannot have, TypeError for one without the name of its field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, *unnamed: object, **fields: Any) -> None:
        __tracebackhide__ = True  # the mistake is the caller's
        if unnamed:
            raise TypeError(f"{type(self).__name__} takes its fields by name: {_named(type(self), unnamed, fields)}")
        super().__init__(**fields)

    @model_validator(mode="before")
    @classmethod
    def _values_are_of_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, value in values.items():
                if name not in cls.model_fields:
                    raise ValueError(unknown_name(f"field of {cls.__name__}", str(name), cls.model_fields))
                if isinstance(value, type) and issubclass(value, Definition):
                    kind = value.__name__
                    raise ValueError(f"{name} must be one {kind}, got the class; write {kind}(...)")
        return values

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with the fields of `update` changed, validated like one that is written out.

        Nothing in it can change, so it is never `deep`.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **(update or {})})

    @property
    def definition_hash(self) -> str:
        """The digest of the canonical JSON: equal definitions, equal hash."""
        return digest(json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")))


def _named(kind: type[Definition], unnamed: tuple[object, ...], fields: Mapping[str, object]) -> str:
    """How `kind` is written with names: `unnamed` are taken for its first fields, in order."""
    names = (name for name in kind.model_fields if name != "kind")
    meant = {**dict(zip(names, unnamed, strict=False)), **fields}
    return f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in meant.items())})"
