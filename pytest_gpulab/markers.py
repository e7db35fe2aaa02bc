"""The `decision` marker, and the catalog of the items that can carry evidence."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytest

MARKERS = (
    "decision(id, statement): this experiment answers for the decision `id`; its gates give the verdict on "
    "`statement`",
    "verify: the quick path, end to end (needs a cluster target)",
    "evaluate: platform behaviour such as cold starts and lost nodes",
)

_ID = re.compile(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*")
_RIGHT = '@pytest.mark.decision("admission", "Use bounded admission before the model is ready")'
_MEASURING = frozenset({"measure", "lab"})
"""Fixtures whose users may record gates."""


class Entry(NamedTuple):
    """An item that can carry evidence, and the question it answers for."""

    nodeid: str
    decision: str | None
    """None: evidence that no decision claims."""
    statement: str
    """Of the decision, or the first line of the item's docstring."""


ENTRY_KEY = pytest.StashKey[Entry | None]()


def decision(id: str, statement: str) -> tuple[str, str]:
    """The decision marker's arguments, checked. ValueError names the field, what must hold and what was got."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise ValueError(
            f"id must be lower-case letters and digits joined by '-', '_' or '.', such as \"lc-caps\", got {id!r}"
        )
    if not isinstance(statement, str) or not statement.strip() or "\n" in statement.strip():
        raise ValueError(f"statement must be one sentence on one line, got {statement!r}")
    return id, statement.strip()


def enter(items: Iterable[pytest.Item]) -> list[str]:
    """Read every item's markers into its stash; returns what is wrong with them, one text each."""
    problems: list[str] = []
    statements: dict[str, tuple[str, pytest.Item]] = {}
    for item in items:
        try:
            entry = _entry(item)
        except (TypeError, ValueError) as wrong:
            problems.append(f"{_where(item)}: decision marker: {wrong}")
            continue
        item.stash[ENTRY_KEY] = entry
        if entry is None or entry.decision is None:
            continue
        known, first = statements.setdefault(entry.decision, (entry.statement, item))
        if known != entry.statement:
            problems.append(
                f"{_where(item)}: decision marker: statement of {entry.decision!r} must be the same everywhere, "
                f"got {entry.statement!r}, but {_where(first)} says {known!r}; use another id or the same statement"
            )
    return problems


def entry_of(item: pytest.Item) -> Entry | None:
    """What the catalog says of `item`; None for an ordinary test."""
    entry = item.stash.get(ENTRY_KEY, None)
    return entry._replace(nodeid=item.nodeid) if entry else None


def catalog_of(items: Sequence[pytest.Item]) -> dict[str, Entry]:
    """Entries of the items that will run, by node id, in order."""
    entries = (entry_of(item) for item in items)
    return {entry.nodeid: entry for entry in entries if entry is not None}


def statement_of(item: pytest.Item) -> str:
    """First line of the item's docstring; empty without one."""
    text = inspect.getdoc(getattr(item, "obj", None)) if isinstance(item, pytest.Function) else None
    return text.splitlines()[0].strip() if text else ""


def _entry(item: pytest.Item) -> Entry | None:
    markers = list(item.iter_markers("decision"))
    if not markers:
        measures = not _MEASURING.isdisjoint(getattr(item, "fixturenames", ()))
        return Entry(item.nodeid, None, statement_of(item)) if measures else None
    if len(markers) > 1:
        ids = ", ".join(repr(marker.args[0]) if marker.args else "?" for marker in markers)
        raise ValueError(f"must stand once on an item, got {len(markers)} ({ids}); mark the functions one by one")
    if item.get_closest_marker("xfail"):
        raise ValueError("must not stand with xfail: an undecided gate is open by itself; remove the xfail")
    if not isinstance(item, pytest.Function) or _is_unittest(item):
        raise ValueError(f"must stand on a test function, got {type(item).__name__}; write it as a function")
    marker = markers[0]
    try:
        inspect.signature(decision).bind(*marker.args, **marker.kwargs)
    except TypeError as wrong:
        given = ", ".join([*map(repr, marker.args), *(f"{k}={v!r}" for k, v in marker.kwargs.items())])
        raise TypeError(f"takes an id and a statement ({wrong}), got ({given}); write {_RIGHT}") from None
    return Entry(item.nodeid, *decision(*marker.args, **marker.kwargs))


def _is_unittest(item: pytest.Function) -> bool:
    import unittest

    return item.cls is not None and issubclass(item.cls, unittest.TestCase)


def _where(item: pytest.Item) -> str:
    path, line, name = item.reportinfo()
    try:
        path = item.path.relative_to(item.config.rootpath).as_posix()
    except ValueError:
        path = str(path)
    return f"{path}:{(line or 0) + 1}: {name}"
