"""Kubernetes quantities and durations: "500m", "16Gi", "30s"."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

_SUFFIXES = {
    "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000), "": Fraction(1),
    "k": Fraction(10**3), "M": Fraction(10**6), "G": Fraction(10**9), "T": Fraction(10**12), "P": Fraction(10**15),
    "E": Fraction(10**18), "Ei": Fraction(2**60),
    "Ki": Fraction(2**10), "Mi": Fraction(2**20), "Gi": Fraction(2**30), "Ti": Fraction(2**40), "Pi": Fraction(2**50),
}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d+)|(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei))?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s)")
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def quantity(text: str | int | float) -> Fraction:
    """The exact value of a quantity; ValueError for anything else."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f"a quantity is a number with a suffix such as m, Ki or G, got {text!r}")
    number, exponent, suffix = match.groups()
    return Fraction(number) * (Fraction(10) ** int(exponent) if exponent else _SUFFIXES[suffix or ""])


def is_quantity(value: Any) -> bool:
    """Whether `quantity` reads it."""
    return _QUANTITY.fullmatch(str(value)) is not None


@lru_cache(maxsize=4096)
def milli(text: str | int | float) -> int:
    """Thousandths, rounded up as Kubernetes does."""
    return -((-quantity(text) * 1000) // 1)


def milli_text(value: int) -> str:
    """Thousandths as the shortest quantity: 1500 is "1500m", 2000 is "2"."""
    return str(value // 1000) if value % 1000 == 0 else f"{value}m"


def duration(text: str | None) -> float | None:
    """Seconds of a Go duration such as "1m30s"; None for None and for "Never"."""
    if text is None or text == "Never":
        return None
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text or not parts:
        raise ValueError(f"a duration is a number with h, m, s or ms, such as 30s, got {text!r}")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


Amounts = dict[str, int]
"""Resource name to amount in thousandths: cpu in millicores, memory in millibytes, nvidia.com/gpu in milligpus."""


def pod_requests(spec: dict[str, Any]) -> Amounts:
    """What a pod asks the scheduler for; a limit without a request counts as one.

    The sum over containers, or the largest init container where that is more, and one of `pods`.
    """
    total: Amounts = {}
    for container in spec.get("containers", ()):
        for name, amount in _requests(container).items():
            total[name] = total.get(name, 0) + amount
    for container in spec.get("initContainers", ()):
        for name, amount in _requests(container).items():
            total[name] = max(total.get(name, 0), amount)
    total["pods"] = 1000
    return total


def _requests(container: dict[str, Any]) -> Amounts:
    resources = container.get("resources") or {}
    return amounts({**(resources.get("limits") or {}), **(resources.get("requests") or {})})


def amounts(texts: dict[str, Any] | None) -> Amounts:
    """A resource list of the API as numbers."""
    return {name: milli(text) for name, text in (texts or {}).items()}


def texts(values: Amounts) -> dict[str, str]:
    """The inverse of `amounts`."""
    return {name: milli_text(amount) for name, amount in values.items()}


def fits(wanted: Amounts, free: Amounts) -> bool:
    """Whether every amount is free; what a node does not list it does not have."""
    return all(amount <= free.get(name, 0) for name, amount in wanted.items() if amount > 0)


def plus(first: Amounts, second: Amounts, sign: int = 1) -> Amounts:
    """first + sign * second."""
    result = dict(first)
    for name, amount in second.items():
        result[name] = result.get(name, 0) + sign * amount
    return result
