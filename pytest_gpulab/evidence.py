"""Lazy evidence: Estimates over repeats, compared to Claims, which gate decisions.

Nothing runs until a claim is asked for its truth; then repeats are pulled, always from the first seed on, until
the sequential sign rule (`pytest_gpulab.rule`) decides.
"""

from __future__ import annotations

import math
import operator as operators
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from pytest_gpulab.definition import digest
from pytest_gpulab.gates import Figure, Gate, Role, TargetRefused, current_ledger, ledger_of_gate
from pytest_gpulab.rule import LOOKS, Outcome, Result, Vote, decide, interval_ranks, looks_for
from pytest_gpulab.source import Place, place_of_assert, place_of_call

if TYPE_CHECKING:
    from pytest_gpulab.measurement import Measurement

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operators.lt,
    "<=": operators.le,
    ">": operators.gt,
    ">=": operators.ge,
}

Off = Mapping[str, float]
"""Servers (calibrations), and how far the times of each are off: 0.05 is 5 % slower than simulated."""

EXACT: Off = {}


# --- estimates ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Estimate:
    """A quantity with one value a repeat. Compare it to make a claim; scale it to state a margin.

    Attributes:
        sources: the measurements it is computed from.
        value_of: repeat index (from 0), and how far servers' times are off, to value in `unit`.
        errors: the calibrations behind it, and by how much each may be off; none where it was measured or counted.
        shortage: repeat index to what its run has too few of for the value to mean anything; empty if it has enough.
    """

    label: str
    unit: str
    sources: tuple[Measurement, ...]
    value_of: Callable[[int, Off], float]
    errors: Callable[[], Off]
    shortage: Callable[[int], str] = lambda repeat: ""

    @property
    def value(self) -> float:
        """Median over the repeats pulled so far (one is pulled if there is none)."""
        return self.figure().value

    @property
    def low(self) -> float:
        """Lower end of the interval over the repeats pulled so far."""
        return self.figure().low

    @property
    def high(self) -> float:
        """Upper end of the interval over the repeats pulled so far."""
        return self.figure().high

    def figure(self, repeats: int | None = None, *, errors: Off = EXACT) -> Figure:
        """Median and matching order statistics over the first `repeats` repeats, the ends widened by `errors`."""
        count = repeats or max(1, *(source.pulled for source in self.sources))
        deterministic = len({_pair_key(self.sources, repeat) for repeat in range(count)}) == 1 < count
        lowest, highest = interval_ranks(count)
        values = self._ordered(count, EXACT)
        extremes = [self._ordered(count, off) for off in _extremes(errors)]
        return Figure(
            label=self.label,
            value=_median(values),
            low=_end(min, (ordered[lowest] for ordered in extremes), values[lowest]),
            high=_end(max, (ordered[highest] for ordered in extremes), values[highest]),
            n=1 if deterministic else count,
            unit=self.unit,
            deterministic=deterministic,
        )

    def _ordered(self, count: int, off: Off) -> list[float]:
        """The values of so many repeats, lowest first; those that nobody knows (NaN) last."""
        return sorted((self.value_of(repeat, off) for repeat in range(count)), key=lambda v: (math.isnan(v), v))

    def __repr__(self) -> str:
        if any(source.pulled == 0 for source in self.sources):
            return f"<{self.label}, not run yet>"
        return f"<{self.label} {figure_text(self.figure())}>"

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self.label} is an estimate, it has no truth: compare it, e.g. `estimate <= 2.0`")

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError(
            f"{self.label}: estimates are never equal; state a margin instead, e.g. `capped.p95 <= 0.9 * base.p95`"
        )

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __lt__(self, other: Estimate | float) -> Comparison:
        return Comparison(self, "<", other)

    def __le__(self, other: Estimate | float) -> Comparison:
        return Comparison(self, "<=", other)

    def __gt__(self, other: Estimate | float) -> Comparison:
        return Comparison(self, ">", other)

    def __ge__(self, other: Estimate | float) -> Comparison:
        return Comparison(self, ">=", other)

    def __mul__(self, factor: float) -> Estimate:
        require_number("an estimate", "*", factor)
        return self._scaled(factor, f"{factor:g} x {self.label}")

    __rmul__ = __mul__

    def __truediv__(self, other: Estimate | float) -> Estimate:
        if isinstance(other, Estimate):
            return _ratio(self, other)
        require_number("an estimate", "/", other)
        return self._scaled(1 / other, f"{self.label} / {other:g}")

    def __sub__(self, other: Estimate) -> Estimate:
        return _difference(self, other)

    def __rsub__(self, other: object) -> NoReturn:
        raise TypeError(
            f"{other!r} - {self.label}: no estimate is subtracted from a number; compare the estimate itself, "
            "e.g. `estimate >= 0.9` instead of `1 - estimate <= 0.1`"
        )

    def _scaled(self, factor: float, label: str) -> Estimate:
        value_of = self.value_of
        return replace(self, label=label, value_of=lambda repeat, off: factor * value_of(repeat, off))


def _ratio(top: Estimate, bottom: Estimate) -> Estimate:
    unit = "ratio" if top.unit == bottom.unit else f"{top.unit} / {bottom.unit}"
    return _combined(f"({top.label} / {bottom.label})", unit, top, bottom, _quotient)


def _quotient(above: float, below: float) -> float:
    """`above` / `below`; infinite over 0, and unknown (NaN) where 0 stands over 0."""
    if below:
        return above / below
    return math.copysign(math.inf, above) if above and not math.isnan(above) else math.nan


def _difference(left: Estimate, right: Estimate) -> Estimate:
    if not isinstance(right, Estimate):
        raise TypeError(
            f"{left.label} - {right!r}: subtract an estimate of the same unit; put numbers on the other side"
        )
    _require_same_unit(left, "-", right)
    return _combined(f"({left.label} - {right.label})", left.unit, left, right, operators.sub)


def _combined(
    label: str, unit: str, left: Estimate, right: Estimate, combine: Callable[[float, float], float]
) -> Estimate:
    return Estimate(
        label,
        unit,
        left.sources + right.sources,
        lambda repeat, off: combine(left.value_of(repeat, off), right.value_of(repeat, off)),
        lambda: {**left.errors(), **right.errors()},
        lambda repeat: left.shortage(repeat) or right.shortage(repeat),
    )


def _extremes(errors: Off) -> list[Off]:
    """Every way in which all calibrations are off by as much as they may be."""
    return [dict(zip(errors, ends, strict=True)) for ends in product(*((-e, e) for e in errors.values()))]


def _end(extreme: Callable[[Iterable[float]], float], ends: Iterable[float], exact: float) -> float:
    """The extreme one of `ends`; `exact` where they differ from it by rounding only, because errors cancel."""
    found = extreme(ends)
    return exact if math.isclose(found, exact) else found


def require_number(side: str, sign: str, value: object) -> None:
    """`value`, at the right of `sign`, must be a plain number; `side` says what stands at the left.

    TypeError for anything else, ValueError for NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{side} {sign} must be given a plain number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{side} {sign} must be given a number, got {value!r}, which nothing can be compared with")


def _require_same_unit(left: Estimate, sign: str, right: Estimate) -> None:
    if left.unit != right.unit:
        raise TypeError(
            f"both sides of {sign} must have the same unit, got {left.label} in {left.unit} and {right.label} in "
            f"{right.unit}"
        )


# --- claims -------------------------------------------------------------------------------------------------


class Decided(NamedTuple):
    """What a claim came to: outcome, the numbers in a sentence, and both sides."""

    outcome: Outcome
    reason: str
    left: Figure
    operator: str
    right: Figure


class Claim(ABC):
    """Something that repeats can hold, refute or leave undecided. Its truth in an ``assert`` is a gate."""

    _reason = ""
    """Of the gate it was last asked as."""

    splits = True
    """Whether it can be one of several alternatives, each at its share of the error level."""

    @abstractmethod
    def decide(self, alternatives: int = 1) -> Decided:
        """Pull repeats until the rule decides; to hold, at an error level split over so many `alternatives`."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The claim in words, for where the source does not show it."""

    @property
    @abstractmethod
    def definition(self) -> str:
        """What is asked, whatever comes out: the claim with its exact constants, and the ids of its arms."""

    @property
    @abstractmethod
    def sources(self) -> tuple[Measurement, ...]:
        """The measurements that decide it."""

    def __repr__(self) -> str:
        return f"<{self._reason}>" if self._reason else f"<claim {self.text}>"

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError(
            f"{self.text}: a claim is never equal to anything, it has a truth: write `assert claim` alone"
        )

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        """False only when refuted. An undecided gate does not raise: the item ends as open instead.

        TypeError outside of ``assert``.
        """
        frame = sys._getframe(1)
        held = self.gate("gate", place_of_assert(frame)).outcome != "false"
        ledger = current_ledger()
        if ledger is not None and not held:
            ledger.refuted, ledger.refuted_in = self, frame
        return held

    def gate(self, role: Role, place: Place, note: str = "") -> Gate:
        """Decide this claim, and record it in the item that asks: once in each role, however often it asks."""
        ledger = ledger_of_gate(f"{place.file}:{place.line}")
        if ledger is None:
            return self._make_gate(role, place, note)
        if (self, role) not in ledger.asked:
            gate = self._make_gate(role, place, note, ledger.unmet)
            ledger.record(gate, self.sources)
            ledger.asked[self, role] = gate
        return ledger.asked[self, role]

    def _make_gate(self, role: Role, place: Place, note: str, unmet: str = "") -> Gate:
        decided = self._decided_as(role)
        if unmet and decided.outcome != "undecided":
            decided = decided._replace(outcome="undecided", reason=f"{unmet} ({decided.reason})")
        self._reason = decided.reason
        return Gate(
            role=role,
            outcome=decided.outcome,
            text=place.text or self.text,
            reason=decided.reason,
            note=note,
            left=decided.left,
            operator=decided.operator,
            right=decided.right,
            runs=tuple(dict.fromkeys(source.id for source in self.sources if source.pulled)),
            definition_hash=digest(self.definition),
            file=place.file,
            line=place.line,
            last_line=place.last_line,
        )

    def _decided_as(self, role: Role) -> Decided:
        """What the claim came to; a reservation that the target refuses stays one, and blocks nothing."""
        try:
            return self.decide()
        except TargetRefused as refusal:
            if role != "caveat":
                raise
            return _refused(self, refusal)


class Comparison(Claim):
    """Estimate against Estimate (paired repeat by repeat) or against a constant in the Estimate's unit."""

    def __init__(self, left: Estimate, operator: str, right: Estimate | float) -> None:
        if isinstance(right, Estimate):
            _require_same_unit(left, operator, right)
        else:
            require_number("an estimate", operator, right)
        self.left, self.operator, self.right = left, operator, right

    @property
    def text(self) -> str:
        right = self.right.label if isinstance(self.right, Estimate) else number_text(self.right, self.left.unit)
        return f"{self.left.label} {self.operator} {right}"

    @property
    def definition(self) -> str:
        right = self.right.label if isinstance(self.right, Estimate) else float(self.right)
        arms = " ".join(source.id for source in self.sources)
        return f"{self.left.label} {self.operator} {right} ({arms})"

    @property
    def _estimates(self) -> list[Estimate]:
        return [side for side in (self.left, self.right) if isinstance(side, Estimate)]

    @property
    def sources(self) -> tuple[Measurement, ...]:
        return tuple(source for side in self._estimates for source in side.sources)

    def decide(self, alternatives: int = 1) -> Decided:
        try:
            result, deterministic = self._result(alternatives)
            ended = ""
        except TargetRefused as refusal:
            result, deterministic = self._what_there_is(refusal), False
            ended = f": {refusal}"
        outcome, why = result.outcome, votes_text(result, deterministic) + ended
        if outcome == "undecided" and alternatives > 1 and not ended:
            why += f"; one of {alternatives} alternatives needs more repeats than a claim alone"
        if outcome == "undecided" and self._unknown_in_all(result.repeats):
            why = f"it has no value in any of {result.repeats} runs"
        invalid = self._invalid(result.repeats)
        if invalid:
            outcome, why = "undecided", invalid
        left, right = self._figures(result.repeats, self._own_errors)
        reason = f"{left.label} {figure_text(left)} against {figure_text(right)}: {why}"
        if self._own_errors and (left, right) != self._figures(result.repeats, EXACT):
            reason += f" (calibration error {max(self._own_errors.values()):.1%} included)"
        if outcome == "held" and self._promises_delivery and result.held == result.repeats and not deterministic:
            reason += f"; up to {1 - 0.05 ** (1 / result.repeats):.0%} of runs could still fail"
        return Decided(outcome, reason, left, self.operator, right)

    def _result(self, alternatives: int) -> tuple[Result, bool]:
        """The rule's result; with identical repeats the one there is decides, and (result, True) comes back."""
        most = min(source.max_repeats for source in self.sources)
        self._pull(LOOKS[0].repeats)
        distinct = {_pair_key(self.sources, repeat) for repeat in range(LOOKS[0].repeats)}
        if len(distinct) == 1 and self._simulated:
            vote = self._vote(0)
            outcome: Outcome = "held" if vote == 1 else "false" if vote == -1 else "undecided"
            return Result(outcome, LOOKS[0].repeats, vote == 1, vote == -1), True
        if self._unknown_in_all(LOOKS[0].repeats):  # more repeats would show no more
            return Result("undecided", LOOKS[0].repeats, 0, 0), False
        # Alternatives are several chances to hold: the split pays for that. All are false only when each one is: to
        # be wrong there, the rule must be wrong about the very one that holds, which is no likelier than alone.
        return decide(self._vote, looks_for(most, alternatives), self._pull, looks_for(most)), False

    def _what_there_is(self, refusal: TargetRefused) -> Result:
        """The votes of an unfinished look: the target served for a while, then no more. Raises without any vote."""
        seen = min(source.lab.available(source) for source in self.sources)
        if not seen:
            raise refusal
        votes = [self._vote(repeat) for repeat in range(seen)]
        return Result("undecided", seen, votes.count(1), votes.count(-1))

    def _pull(self, repeats: int) -> None:
        """Make the runs that a look needs together, so that the Lab can order them."""
        for lab in dict.fromkeys(source.lab for source in self.sources):
            lab.pull([source for source in self.sources if source.lab is lab], repeats)

    @property
    def _promises_delivery(self) -> bool:
        """Whether it says that runs deliver: a few perfect repeats do not prove that all will."""
        at_least = self.operator in (">", ">=") and not isinstance(self.right, Estimate)
        return at_least and self.left.label.startswith("delivery ratio")

    @property
    def _simulated(self) -> bool:
        return all(source.run(0).provenance.basis == "simulated" for source in self.sources)

    @cached_property
    def _errors(self) -> Off:
        """The calibrations behind both sides, and by how much each may be off."""
        return {**self.left.errors(), **(self.right.errors() if isinstance(self.right, Estimate) else {})}

    @cached_property
    def _own_errors(self) -> Off:
        """`_errors` that move the sides apart: those of one calibration are common to two of its arms."""
        common = isinstance(self.right, Estimate) and self.left.errors() == self.right.errors()
        return {} if common else self._errors

    def _vote(self, repeat: int) -> Vote:
        """1 when the claim holds however far the calibrations are off, -1 when it never does."""
        answers = {self._holds(repeat, off) for off in _extremes(self._errors)}
        return 1 if answers == {True} else -1 if answers == {False} else 0

    def _holds(self, repeat: int, off: Off) -> bool | None:
        """Whether the claim holds in `repeat`; None where nobody knows."""
        left = self.left.value_of(repeat, off)
        if isinstance(self.right, Estimate):
            right = self.right.value_of(repeat, off)
            if math.isinf(left) and math.isinf(right):
                return None  # two undelivered percentiles say nothing of one another
        else:
            right = self.right
        if math.isnan(left) or math.isnan(right):
            return None
        return _COMPARE[self.operator](left, right)

    def _unknown_in_all(self, repeats: int) -> bool:
        """Whether a side never has a value: 0 / 0, a latency of none, what the server did not show."""
        return any(all(math.isnan(side.value_of(r, EXACT)) for r in range(repeats)) for side in self._estimates)

    def _invalid(self, repeats: int) -> str:
        """Why the evidence cannot decide, or nothing."""
        for repeat in range(repeats):
            for source in self.sources:
                run = source.run(repeat)
                if run.problems:
                    return f"invalid evidence (seed {run.provenance.seed}): {'; '.join(run.problems)}"
            short = next(filter(None, (side.shortage(repeat) for side in self._estimates)), "")
            if short:
                return short
        return _several_servers(self.sources)

    def _figures(self, repeats: int, errors: Off) -> tuple[Figure, Figure]:
        """Both sides over the first `repeats` repeats, their ends widened by `errors`."""
        left = self.left.figure(repeats, errors=errors)
        if isinstance(self.right, Estimate):
            return left, self.right.figure(repeats, errors=errors)
        value = float(self.right)
        return left, Figure(label="constant", value=value, low=value, high=value, n=0, unit=self.left.unit)


def _several_servers(sources: tuple[Measurement, ...]) -> str:
    """Why measured arms on one accelerator are no pairs: another vLLM or driver would be part of what they show."""
    served: dict[str, set[str]] = {}
    for source in sources:
        provenance = source.run(0).provenance
        if provenance.basis == "measured":
            served.setdefault(source.profile.accelerator, set()).add(provenance.server)
    differ = next((sorted(servers) for servers in served.values() if len(servers) > 1), None)
    return f"the arms were measured on different servers ({'; '.join(differ)})" if differ else ""


class AnyOf(Claim):
    """Held when one of its claims holds at an error level split between them; false when each one is at the whole.

    An alternative that the target refuses is undecided; TargetRefused when it refuses all.
    """

    def __init__(self, claims: tuple[Claim, ...]) -> None:
        if len(claims) < 2 or not all(isinstance(claim, Claim) for claim in claims):
            raise TypeError(f"any_of needs at least two claims such as `a.p95 <= 2.0`, got {claims!r}")
        whole = next((claim for claim in claims if not claim.splits), None)
        if whole is not None:
            raise TypeError(
                f"any_of splits the error level between its claims, which `{whole.text}` cannot: its search has used "
                "the whole of it; compare figures at one rate instead, or assert it in a test of its own"
            )
        self.claims = claims

    @property
    def text(self) -> str:
        return f"any_of({', '.join(claim.text for claim in self.claims)})"

    @property
    def definition(self) -> str:
        return f"any_of({', '.join(claim.definition for claim in self.claims)})"

    @property
    def sources(self) -> tuple[Measurement, ...]:
        return tuple(source for claim in self.claims for source in claim.sources)

    def decide(self, alternatives: int = 1) -> Decided:
        decided, refused = self._each(alternatives * len(self.claims))
        decided += refused
        for outcome in ("held", "undecided", "false"):
            chosen = [one for one in decided if one.outcome == outcome]
            if chosen:
                reason = "; ".join(one.reason for one in (chosen if outcome == "held" else decided))
                return chosen[0]._replace(reason=reason)
        raise AssertionError("unreachable: every claim has an outcome")

    def _each(self, alternatives: int) -> tuple[list[Decided], list[Decided]]:
        """What the claims came to: those that the target serves, and the others. TargetRefused without any."""
        decided, refused, refusals = [], [], []
        for claim in self.claims:
            try:
                decided.append(claim.decide(alternatives))
            except TargetRefused as refusal:
                refused.append(_refused(claim, refusal))
                refusals.append(refusal)
        if not decided:
            raise refusals[0]
        return decided, refused


def _refused(claim: Claim, refusal: TargetRefused) -> Decided:
    """A claim that the target gives no numbers for: undecided."""
    nothing = Figure(label=claim.text, value=math.nan, low=math.nan, high=math.nan, n=0, unit="")
    return Decided("undecided", f"{claim.text}: {refusal}", nothing, "", nothing)


def any_of(*claims: Claim) -> AnyOf:
    """The claim that at least one of `claims` holds. TypeError for fewer than two."""
    return AnyOf(claims)


def caveat(claim: Claim, text: str) -> None:
    """Record `claim` as a reservation: false, undecided or refused by the target turns supported into caveated.

    It never fails and never blocks.
    """
    _require_claim(claim, "caveat")
    claim.gate("caveat", place_of_call(sys._getframe(1)), text)


def requires(claim: Claim, text: str) -> None:
    """Record `claim` as a precondition of the evidence: when it does not hold, later gates are undecided."""
    _require_claim(claim, "requires")
    claim.gate("requires", place_of_call(sys._getframe(1)), text)


def _require_claim(claim: object, name: str) -> None:
    if not isinstance(claim, Claim):
        raise TypeError(f"{name}() needs a comparison of estimates such as `m.p95 <= 2.0`, got {claim!r}")


# --- words --------------------------------------------------------------------------------------------------


def _pair_key(sources: tuple[Measurement, ...], repeat: int) -> tuple[int, ...]:
    """Which runs repeat `repeat` compares: the Lab hands out the same object for the same run."""
    return tuple(id(source.run(repeat)) for source in sources)


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    low, high = ordered[middle - 1], ordered[middle]
    return low if low == high else (low + high) / 2


def votes_text(result: Result, deterministic: bool) -> str:
    """``6 of 6 repeats held``, ``4 of 24 repeats held; undecided after 24``, or ``deterministic, n=1``."""
    if deterministic:
        return f"{result.outcome}; deterministic, n=1"
    counted = result.false if result.outcome == "false" else result.held
    word = "refuted it" if result.outcome == "false" else "held"
    text = f"{counted} of {result.repeats} repeats {word}"
    return text + (f"; undecided after {result.repeats}" if result.outcome == "undecided" else "")


def number_text(value: float, unit: str) -> str:
    """Three significant digits and the unit: ``1.93 s``, ``0.999``, ``inf s``."""
    digits = f"{value:.3g}" if abs(value) < 1000 or math.isinf(value) else f"{value:.0f}"
    if unit == "ratio":
        digits = f"{value:.4g}"
    return digits if unit == "ratio" else f"{digits} {unit}"


def figure_text(figure: Figure) -> str:
    """``1.93 s [1.71, 2.20]``; a constant, a single run and what nobody knows (NaN) have no interval."""
    text = "unknown" if math.isnan(figure.value) else number_text(figure.value, figure.unit)
    if figure.low == figure.high or math.isnan(figure.value):
        return text
    low, high = (
        number_text(end, "ratio" if figure.unit == "ratio" else "").strip() for end in (figure.low, figure.high)
    )
    return f"{text} [{low}, {high}]"
