"""The catalog: a folder of the user's with models, accelerators and calibrations beside those that are shipped.

An environment variable says where it is, because whatever a session starts must find it too: workers, the forecast,
the embedded cluster and its servers. The `gpulab` commands read the same variable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

from pytest_gpulab.errors import in_one_line, unknown_name

VARIABLE: Final = "GPULAB_CATALOG"
KINDS: Final = ("models", "accelerators", "calibrations")

Facts = TypeVar("Facts")
"""A dataclass, or a pydantic model."""


def own_facts(kind: str, form: type[Facts]) -> Mapping[str, Facts]:
    """The user's own facts of a kind, by name; none without a catalog. Files are read once a process.

    ValueError names the file and the field, and says what must hold.
    """
    folder = os.environ.get(VARIABLE)
    return _read(Path(folder), kind, form) if folder else {}  # type: ignore[arg-type]  # a class is hashable


def with_own(kind: str, form: type[Facts], shipped: Mapping[str, Facts]) -> Mapping[str, Facts]:
    """The shipped facts and the user's own. ValueError, also for a file of a name that is shipped.

    Records and stored runs name models and accelerators: one name must mean one thing in all of them.
    """
    own = own_facts(kind, form)
    for name in sorted(own.keys() & shipped.keys()):
        path = Path(os.environ[VARIABLE], kind, f"{name}.json")
        raise ValueError(f"{path}: must have a name of its own, {name} is shipped; rename the file")
    return {**shipped, **own}


@cache
def _read(folder: Path, kind: str, form: type[Facts]) -> Mapping[str, Facts]:
    if not any((folder / name).is_dir() for name in KINDS):
        raise ValueError(
            f"the catalog must be a folder with at least one of {', '.join(KINDS)} in it, {folder} has none; set "
            f"{VARIABLE} or --gpulab-catalog to another, or to nothing"
        )
    return {path.stem: _facts(path, form) for path in sorted((folder / kind).glob("*.json"))}


def _facts(path: Path, form: type[Facts]) -> Facts:
    """What a file says. Its name is that of the facts, which may repeat it."""
    from pydantic import TypeAdapter, ValidationError  # most sessions have no catalog, and many no decision

    try:
        given = json.loads(path.read_bytes())
    except ValueError as wrong:
        raise ValueError(f"{path}: must be JSON: {wrong}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(given).__name__}")
    if (name := given.setdefault("name", path.stem)) != path.stem:
        raise ValueError(f"{path}: name must be that of the file, {path.stem!r}, got {name!r}")
    known = _field_names(form)
    for field in given.keys() - known:
        raise ValueError(f"{path}: {unknown_name('field', field, known)}")
    try:
        return TypeAdapter(form).validate_python(given)
    except ValidationError as wrong:
        raise ValueError(f"{path}: {in_one_line(wrong, with_value=True)}") from None


def _field_names(form: type) -> set[str]:
    return {field.name for field in fields(form)} if is_dataclass(form) else set(getattr(form, "model_fields", ()))
