"""Verdicts: what one test item says, and how items that share a decision combine.

Pure functions: nothing here knows of pytest or loads anything heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from pytest_gpulab.gates import Gate
    from pytest_gpulab.record import Verdict
    from pytest_gpulab.run import Basis

BASES: tuple[Basis, ...] = ("simulated", "emulated", "measured")
"""Weakest first."""


class Ending(NamedTuple):
    """How the body of a test item ended.

    Attributes:
        kind: asserted is an AssertionError, raised any other exception.
        reason: of a skip or a block, or the exception in one line.
        file, line: where an AssertionError was raised (the traceback's last entry).
    """

    kind: Literal["passed", "asserted", "raised", "blocked", "skipped", "xfailed"]
    reason: str = ""
    file: str = ""
    line: int = 0


class Judgement(NamedTuple):
    """A verdict and the sentence that decided it. None is no verdict: an error, or a plain skip."""

    verdict: Verdict | None
    reason: str


def judge(gates: Sequence[Gate], ending: Ending, *, gate_needed: bool) -> Judgement:
    """What an item says whose `gates` were recorded in this order and whose body ended so.

    `gate_needed`: passing without a gate is an error (the item carries a decision).
    """
    refuted = [gate for gate in gates if gate.role == "gate" and gate.outcome == "false"]
    if refuted:
        return _judge_refuted(refuted, ending)
    if ending.kind == "passed":
        return _judge_passed(gates, gate_needed)
    if ending.kind == "blocked":
        return Judgement("blocked", ending.reason)
    if ending.kind == "asserted":
        return Judgement(None, f"an assertion failed that is no gate: {ending.reason}")
    if ending.kind == "xfailed":
        return Judgement(None, "xfail together with gates: an undecided gate is open by itself, remove the xfail")
    return Judgement(None, ending.reason)


def _judge_refuted(refuted: Sequence[Gate], ending: Ending) -> Judgement:
    last = refuted[-1]
    ended_it = ending.kind == "asserted" and ending.file == last.file and last.line <= ending.line <= last.last_line
    swallowed = refuted[0] if len(refuted) > 1 or not ended_it else None
    if swallowed is None:
        return Judgement("rejected", last.reason)
    then = f" (the test then ended with: {ending.reason})" if ending.reason else ""
    return Judgement(
        None,
        f"a false gate did not end the test: `{swallowed.text}` at line {swallowed.line}: {swallowed.reason}; "
        f"do not catch its AssertionError, write caveat(...) or any_of(...) instead{then}",
    )


def _judge_passed(gates: Sequence[Gate], gate_needed: bool) -> Judgement:
    claims = [gate for gate in gates if gate.role == "gate"]
    if not claims:
        if not gate_needed:
            return Judgement(None, "")
        return Judgement(None, "a decision needs a gate: assert a comparison of estimates, such as `m.p95 <= 2.0`")
    undecided = [gate for gate in claims if gate.outcome == "undecided"]
    unmet = [gate for gate in gates if gate.role == "requires" and gate.outcome != "held"]
    if undecided or unmet:
        reason = undecided[0].reason if undecided else f"{unmet[0].note}: {unmet[0].reason}"
        held = any(gate.outcome == "held" for gate in claims)
        return Judgement("partial" if held else "open", reason)
    reserved = [gate for gate in gates if gate.role == "caveat" and gate.outcome != "held"]
    if reserved:
        return Judgement("caveated", f"{reserved[0].note}: {reserved[0].reason}")
    more = len(claims) - 1
    return Judgement("supported", claims[0].reason + (f" (and {more} more)" if more else ""))


def demand(judgement: Judgement, basis: Basis | None, required: Basis) -> Judgement:
    """`judgement` on evidence of `basis` where `required` is demanded: a weaker one leaves the question open."""
    if judgement.verdict not in ("supported", "caveated", "partial", "rejected") or strength(basis) >= strength(
        required
    ):
        return judgement
    return Judgement(
        "open",
        f"{basis or 'no'} evidence, {required} is required; it would be {judgement.verdict}: {judgement.reason}",
    )


def strength(basis: Basis | None) -> int:
    """Rank of a basis; None (nothing was run) is as weak as simulated."""
    return BASES.index(basis) if basis else 0


def weakest(bases: Iterable[Basis]) -> Basis | None:
    """The weakest of `bases`; None of none."""
    return min(bases, key=strength, default=None)


def combine(verdicts: Sequence[Verdict | None]) -> Verdict:
    """The verdict of a decision from those of its items; None is an item without one (error or missing).

    ValueError for no items.
    """
    if not verdicts:
        raise ValueError("a decision has at least one item, got none")
    if "rejected" in verdicts:
        return "rejected"
    if any(verdict in (None, "open", "partial") for verdict in verdicts):
        some = any(verdict in ("supported", "caveated", "partial") for verdict in verdicts)
        return "partial" if some else "open"
    if "blocked" in verdicts:
        return "blocked"
    return "caveated" if "caveated" in verdicts else "supported"


def decides(combined: Verdict, verdict: Verdict | None) -> bool:
    """Whether an item with `verdict` is one that made its decision `combined`."""
    if combined in ("open", "partial"):
        return verdict in (None, "open", "partial")
    return verdict == combined
