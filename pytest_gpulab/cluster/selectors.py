"""Label and field selectors, compiled once and asked often."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pytest_gpulab.cluster.errors import BadRequest
from pytest_gpulab.cluster.objects import at

Labels = Mapping[str, str]
Matches = Callable[[Labels], bool]

_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^()]*)\)$")
_EQUAL = re.compile(r"^([^!=\s]+)\s*(==|=|!=)\s*(\S*)$")
_EXISTS = re.compile(r"^(!?)\s*([A-Za-z0-9][-A-Za-z0-9_./]*)$")
_BETWEEN = re.compile(r",(?![^(]*\))")


@lru_cache(maxsize=1024)
def label_selector(text: str) -> Matches:
    """`app=web,tier in (a, b),!canary` as a predicate over labels."""
    return _all([_requirement(part.strip()) for part in _BETWEEN.split(text) if part.strip()])


def _all(tests: list[Matches]) -> Matches:
    return lambda labels: all(test(labels) for test in tests)


def _requirement(part: str) -> Matches:
    if found := _SET.match(part):
        key, operator, values = found[1], found[2], {value.strip() for value in found[3].split(",")}
        return _in(key, values) if operator == "in" else _not_in(key, values)
    if found := _EQUAL.match(part):
        key, operator, value = found[1], found[2], found[3]
        return _not_in(key, {value}) if operator == "!=" else _in(key, {value})
    if found := _EXISTS.match(part):
        return _absent(found[2]) if found[1] else _present(found[2])
    raise BadRequest(f"unable to parse requirement: {part!r} is not key=value, key!=value, key in (a,b), key or !key")


def _in(key: str, values: set[str]) -> Matches:
    return lambda labels: labels.get(key) in values


def _not_in(key: str, values: set[str]) -> Matches:
    return lambda labels: labels.get(key) not in values


def _present(key: str) -> Matches:
    return lambda labels: key in labels


def _absent(key: str) -> Matches:
    return lambda labels: key not in labels


def selector_text(selector: Mapping[str, Any] | None) -> str:
    """An object's `spec.selector` (a LabelSelector) in the query's words. None selects nothing, {} everything."""
    if selector is None:
        return "!kubernetes.io/none,kubernetes.io/none"
    parts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    return ",".join(parts + [_expression(item) for item in selector.get("matchExpressions") or []])


def _expression(item: Mapping[str, Any]) -> str:
    key, operator, values = item["key"], item["operator"], ",".join(item.get("values") or [])
    words: dict[str, str] = {
        "In": f"{key} in ({values})",
        "NotIn": f"{key} notin ({values})",
        "Exists": key,
        "DoesNotExist": f"!{key}",
    }
    return words[operator]


@lru_cache(maxsize=1024)
def field_selector(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """`status.phase=Running,spec.nodeName!=` as a predicate over objects."""
    tests = [_field(part.strip()) for part in text.split(",") if part.strip()]
    return lambda obj: all(test(obj) for test in tests)


def _field(part: str) -> Callable[[Mapping[str, Any]], bool]:
    found = _EQUAL.match(part)
    if not found:
        raise BadRequest(f"invalid selector: {part!r} is neither path=value nor path!=value")
    path, negated, value = found[1], found[2] == "!=", found[3]
    return lambda obj: (_text(at(obj, path, "")) == value) != negated


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
