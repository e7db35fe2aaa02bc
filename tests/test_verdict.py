"""Verdicts as pure functions."""

from __future__ import annotations

from itertools import permutations

import pytest

from pytest_gpulab.gates import Figure, Gate, Role
from pytest_gpulab.rule import Outcome
from pytest_gpulab.verdict import Ending, Judgement, combine, decides, demand, judge, weakest

FIGURE = Figure(label="p95 e2e", value=1.0, low=1.0, high=1.0, n=1, unit="s")
PASSED = Ending("passed")


def gate(outcome: Outcome, role: Role = "gate", line: int = 5, reason: str = "numbers", note: str = "") -> Gate:
    return Gate(
        role=role,
        outcome=outcome,
        text="m.p95 <= 2.0",
        reason=reason,
        note=note,
        left=FIGURE,
        operator="<=",
        right=FIGURE,
        runs=(),
        file="/exp.py",
        line=line,
        last_line=line + 2,
    )


@pytest.mark.parametrize("line", [5, 6, 7])
def test_rejected_at_any_line_of_the_statement(line: int) -> None:
    assert judge([gate("false")], Ending("asserted", "x", "/exp.py", line), gate_needed=True).verdict == "rejected"


@pytest.mark.parametrize(
    "ending",
    [
        Ending("asserted", "x", "/exp.py", 4),
        Ending("asserted", "x", "/exp.py", 8),
        Ending("asserted", "x", "/other.py", 5),
        Ending("raised", "x"),
        Ending("skipped", "x"),
        Ending("blocked", "x"),
        PASSED,
    ],
)
def test_a_false_gate_that_did_not_end_the_test_is_no_verdict(ending: Ending) -> None:
    found = judge([gate("false")], ending, gate_needed=True)
    assert found.verdict is None
    assert "did not end the test" in found.reason


def test_the_deciding_gate_gives_the_reason() -> None:
    held = gate("held", reason="held so far")
    undecided = gate("undecided", reason="4 of 24")
    slow = gate("false", "caveat", reason="too slow", note="misses the SLO")
    assert judge([held], PASSED, gate_needed=True) == Judgement("supported", "held so far")
    assert judge([held, held], PASSED, gate_needed=True) == Judgement("supported", "held so far (and 1 more)")
    assert judge([slow, held], PASSED, gate_needed=True) == Judgement("caveated", "misses the SLO: too slow")
    assert judge([held, slow, undecided], PASSED, gate_needed=True) == Judgement("partial", "4 of 24")
    assert judge([undecided], PASSED, gate_needed=True) == Judgement("open", "4 of 24")


def test_a_gate_is_needed_for_a_decision_only() -> None:
    assert judge([], PASSED, gate_needed=False) == Judgement(None, "")
    assert judge([gate("held", "caveat")], PASSED, gate_needed=True).verdict is None


@pytest.mark.parametrize(
    ("verdicts", "combined"),
    [
        (["supported"], "supported"),
        (["supported", "caveated"], "caveated"),
        (["supported", "blocked"], "blocked"),
        (["blocked", "caveated"], "blocked"),
        (["open", "blocked"], "open"),
        (["open"], "open"),
        ([None], "open"),
        ([None, "blocked"], "open"),
        ([None, "supported"], "partial"),
        (["open", "supported"], "partial"),
        (["open", "caveated", "blocked"], "partial"),
        (["partial"], "partial"),
        (["partial", "open"], "partial"),
        (["rejected", "open", None, "supported", "blocked"], "rejected"),
    ],
)
def test_combine(verdicts: list, combined: str) -> None:  # type: ignore[type-arg]
    for order in permutations(verdicts):
        assert combine(order) == combined
    assert any(decides(combine(verdicts), verdict) for verdict in verdicts)


def test_combine_needs_an_item() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        combine([])


@pytest.mark.parametrize("verdict", ["supported", "caveated", "partial", "rejected"])
def test_demand(verdict) -> None:  # type: ignore[no-untyped-def]
    found = Judgement(verdict, "numbers")
    assert demand(found, "measured", "measured") == found
    assert demand(found, "emulated", "simulated") == found
    assert demand(found, None, "simulated") == found
    for basis in ("simulated", "emulated", None):
        opened = demand(found, basis, "measured")  # type: ignore[arg-type]
        assert opened.verdict == "open"
        assert verdict in opened.reason


@pytest.mark.parametrize("verdict", ["open", "blocked", None])
def test_demand_changes_nothing_that_decides_nothing(verdict) -> None:  # type: ignore[no-untyped-def]
    assert demand(Judgement(verdict, ""), "simulated", "measured").verdict == verdict


def test_weakest() -> None:
    assert weakest(["measured", "simulated", "emulated"]) == "simulated"
    assert weakest(["measured", "emulated"]) == "emulated"
    assert weakest([]) is None
