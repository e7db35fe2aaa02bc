"""What every piece of an experiment is: data that is frozen, validated, comparable and hashable."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from pytest_gpulab.errors import unknown_name


class Definition(BaseModel):
    """A frozen piece of an experiment; unknown fields are refused with the nearest name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values:
                if name not in cls.model_fields:
                    raise ValueError(unknown_name(f"field of {cls.__name__}", str(name), cls.model_fields))
        return values

    @property
    def definition_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON: equal definitions, equal hash."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
