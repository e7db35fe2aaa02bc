"""The words of refusals: what must hold, what was got, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(what: str, got: str, known: Iterable[str]) -> str:
    """'unknown WHAT GOT: did you mean X? known: A, B'; the guess only where a name is near."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {got!r}: {guess}known: {', '.join(names)}"


def in_one_line(refusal: Exception, *, with_value: bool = False) -> str:
    """The words of `refusal`; of pydantic's many lines the first field, why, and how many more there are.

    `with_value`: also what the field was given, where that is short.
    """
    from pydantic import ValidationError

    if not isinstance(refusal, ValidationError):
        return str(refusal)
    first, *more = refusal.errors()
    field = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    if with_value and isinstance(first["input"], str | int | float):
        reason += f", got {first['input']!r}"
    return (f"{field}: " if field else "") + reason + (f" (and {len(more)} more)" if more else "")
