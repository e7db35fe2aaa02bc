"""The knee: the highest rate at which a profile is still stable, bracketed by a search with repeats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pytest_gpulab.evidence import EXACT, Claim, Decided, Off, figure_text, number_text, require_number
from pytest_gpulab.gates import Figure, TargetRefused, current_ledger
from pytest_gpulab.measurement import Measurement
from pytest_gpulab.rule import Outcome

UNIT = "requests/s"


@dataclass(frozen=True)
class Point:
    """One rate that was tried: what the stability claim asked and came to, and the measurement, so often repeated."""

    rate: float
    outcome: Outcome
    reason: str
    measurement: Measurement
    repeats: int
    definition: str


@dataclass(frozen=True, eq=False)
class Knee:
    """A bracket around the knee in requests/s: stable at `stable_rate`, not at `unstable_rate`.

    0 when even the lowest rate was not stable, inf when the highest was. Comparing a knee makes a claim: it holds
    when the whole bracket (widened by the calibration's error) does, is false when none of it does.
    """

    stable_rate: float
    unstable_rate: float
    points: tuple[Point, ...]
    scale: float = 1.0

    @property
    def definition(self) -> str:
        """What stable means, asked of the lowest rate: which others are asked depends on what comes out."""
        return f"{self.scale} x knee by {self.points[0].definition}"

    @property
    def errors(self) -> Off:
        """The calibrations behind it, and how far each may be off."""
        return {name: error for point in self.points for name, error in point.measurement.errors.items()}

    @property
    def gap(self) -> str:
        """Why the bracket is wider than it was asked to be, or has no end; empty when it is neither."""
        for point in self.points:
            if point.outcome == "undecided":
                return f"at {point.rate:.3g} {UNIT}: {point.reason}"
        if math.isinf(self.unstable_rate):
            return f"{self.stable_rate:.3g} {UNIT}, the highest rate tried, was still stable"
        return ""

    def figure(self, errors: Off) -> Figure:
        """The bracket as a figure, ends widened by the largest of `errors`; the value is its middle."""
        error = max(errors.values(), default=0.0)
        finite = self.unstable_rate if math.isfinite(self.unstable_rate) else self.stable_rate
        return Figure(
            label="knee" if self.scale == 1 else f"{self.scale:g} x knee",
            value=self.scale * math.sqrt(self.stable_rate * finite),
            low=self.scale * self.stable_rate * (1 - error),
            high=self.scale * self.unstable_rate * (1 + error),
            n=len(self.points),
            unit=UNIT,
        )

    def __rmul__(self, factor: float) -> Knee:
        require_number("a knee", "*", factor)
        return replace(self, scale=self.scale * factor)

    __mul__ = __rmul__

    def __ge__(self, other: Knee | float) -> KneeClaim:
        return KneeClaim(self, ">=", other)

    def __le__(self, other: Knee | float) -> KneeClaim:
        return KneeClaim(self, "<=", other)

    __gt__, __lt__ = __ge__, __le__


class KneeClaim(Claim):
    """A bracket against a rate or against another bracket."""

    splits = False

    def __init__(self, left: Knee, operator: str, right: Knee | float) -> None:
        if not isinstance(right, Knee):
            require_number("a knee (in requests/s, against another knee or a rate)", operator, right)
        self.left, self.operator, self.right = left, operator, right

    @property
    def text(self) -> str:
        right = "knee" if isinstance(self.right, Knee) else number_text(self.right, UNIT)
        return f"knee {self.operator} {right}"

    @property
    def definition(self) -> str:
        right = self.right.definition if isinstance(self.right, Knee) else float(self.right)
        return f"{self.left.definition} {self.operator} {right}"

    @property
    def _knees(self) -> list[Knee]:
        return [self.left, *([self.right] if isinstance(self.right, Knee) else [])]

    @property
    def sources(self) -> tuple[Measurement, ...]:
        return tuple(point.measurement for knee in self._knees for point in knee.points)

    def decide(self, alternatives: int = 1) -> Decided:
        """Compare the brackets; the repeats were spent in the search, maybe for an item before this one."""
        for knee in self._knees:
            for point in knee.points:
                point.measurement.pulled = max(point.measurement.pulled, point.repeats)
        errors = {name: error for knee in self._knees for name, error in knee.errors.items()}
        left = self.left.figure(self.left.errors)
        if isinstance(self.right, Knee):
            right = self.right.figure(self.right.errors)
            if self.left.errors == self.right.errors:  # both are off by the same factor
                left, right, errors = self.left.figure(EXACT), self.right.figure(EXACT), {}
        else:
            rate = float(self.right)
            right = Figure(label="constant", value=rate, low=rate, high=rate, n=0, unit=UNIT)
        least, most = (right, left) if self.operator == ">=" else (left, right)
        outcome: Outcome = "undecided"
        if most.low >= least.high:
            outcome = "held"
        elif most.high < least.low:
            outcome = "false"
        reason = f"{left.label} {figure_text(left)} against {figure_text(right)}: {outcome} by the bracket"
        if outcome == "undecided":
            reason += "".join(f"; {knee.gap}" for knee in self._knees if knee.gap)
        if errors:
            reason += f" (calibration error {max(errors.values()):.1%} included)"
        return Decided(outcome, reason, left, self.operator, right)


def find_knee(
    arm: Callable[[float], Measurement],
    *,
    low: float,
    high: float,
    stable: Callable[[Measurement], Claim],
    resolution: float = 0.1,
) -> Knee:
    """Bisect the rate between `low` and `high` requests/s until the bracket is `resolution` wide (0.1 = 10 %).

    `arm` measures at a rate; `stable` claims that a measurement is stable, e.g. ``lambda m: m.queue_delay <= 1``.
    An undecided rate ends the search, and so does a target that serves no more: the bracket then stays as wide as it
    is. ValueError for an impossible range, or an arm that does not depend on the rate.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"a knee search needs 0 < low < high requests/s, got low={low} and high={high}")
    if not 0 < resolution < 1:
        raise ValueError(f"resolution must be between 0 and 1 (0.1 = 10 %), got {resolution}")
    points: list[Point] = []

    def outcome(rate: float) -> Outcome:
        measurement = arm(rate)
        same = next((point for point in points if point.measurement.id == measurement.id), None)
        if same is not None:
            raise ValueError(
                f"arm must measure at the rate that it is given, got the same measurement at {same.rate:.3g} and "
                f"{rate:.3g} {UNIT}; use the rate, e.g. `lambda rate: measure(at(rate), profile)`"
            )
        try:
            claim = stable(measurement)
            if not isinstance(claim, Claim):
                raise TypeError(f"stable must return a claim, such as `m.queue_delay <= 1`, got {claim!r}")
            decided = claim.decide()
        except TargetRefused:
            if not points:
                raise
            return "undecided"  # the target served for a while, then no more
        points.append(Point(rate, decided.outcome, decided.reason, measurement, measurement.pulled, claim.definition))
        return decided.outcome

    knee = _bracket(outcome, low, high, resolution)
    found = Knee(*knee, points=tuple(sorted(points, key=lambda point: point.rate)))
    ledger = current_ledger()
    if ledger is not None:
        ledger.knees.append(found)
    return found


def _bracket(outcome: Callable[[float], Outcome], low: float, high: float, resolution: float) -> tuple[float, float]:
    """(highest stable rate, lowest unstable rate); an undecided rate ends the search with the bracket around it."""
    at_low = outcome(low)
    if at_low != "held":
        return 0.0, (low if at_low == "false" else math.inf)
    at_high = outcome(high)
    if at_high != "false":
        return (high, math.inf) if at_high == "held" else (low, math.inf)
    while high / low > 1 + resolution:
        middle = math.sqrt(low * high)
        found = outcome(middle)
        if found == "undecided":
            break
        low, high = (middle, high) if found == "held" else (low, middle)
    return low, high
