"""Gates: comparisons that count for a decision, and the ledger in which a test item collects them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from pytest_gpulab.rule import Outcome

if TYPE_CHECKING:
    from pytest_gpulab.evidence import Claim
    from pytest_gpulab.knee import Knee
    from pytest_gpulab.measurement import Measurement

Role = Literal["gate", "caveat", "requires"]


class Figure(BaseModel):
    """One side of a gate in numbers: the median over repeats and its order-statistic interval.

    A constant has n = 0 and low = high = value. Infinite: undelivered requests reach into the percentile.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    label: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    deterministic: bool = False
    """All repeats were the same run, so n is 1 and there is no spread."""


class Gate(BaseModel):
    """One comparison that counted, with its numbers and its line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    outcome: Outcome
    text: str
    """As written in the experiment, e.g. ``queued.delivery_ratio >= 0.999``."""
    reason: str
    """The numbers in a sentence, e.g. ``p95 e2e 1.93 s [1.71, 2.20] against 2.0 s: 6 of 6 repeats held``."""
    note: str = ""
    """What a caveat or a requirement says when it does not hold."""
    left: Figure
    operator: str
    right: Figure
    runs: tuple[str, ...]
    """Ids of the measurements that were compared."""
    definition_hash: str = ""
    """Over what was asked, whatever came out: the claim with its constants, and its arms. Empty in older records."""
    file: str
    line: int
    last_line: int
    """Source lines of the statement, inclusive: an AssertionError raised there is this gate's."""


@dataclass
class Ledger:
    """What one test item has shown so far: its gates, in order, and what it measured."""

    nodeid: str
    in_test: bool = True
    """False while fixtures run: a gate there is an error, because no test would answer for it."""
    gates: list[Gate] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    knees: list[Knee] = field(default_factory=list)
    asked: dict[tuple[Claim, Role], Gate] = field(default_factory=dict)
    """The gate that each claim has become here: a claim that two items share is a gate of both."""
    lost: str = ""
    """Why a gate was asked that could not be recorded: the item then says nothing."""
    unmet: str = ""
    """The text of the first requirement that did not hold; later gates are undecided because of it."""
    refuted: Claim | None = None
    """Of the last false gate that was asserted."""
    refuted_in: FrameType | None = None
    """Where that was: only an AssertionError from there is its own."""
    process: int = field(default_factory=os.getpid)

    def record(self, gate: Gate, sources: Sequence[Measurement] = ()) -> None:
        """Add `gate`, decided by `sources`; RuntimeError in a fixture, where a false gate could not reject anything.

        A measurement that a shared fixture made, on whatever target, is evidence of each item that asks it.
        """
        if not self.in_test:
            raise RuntimeError(
                f"{gate.file}:{gate.line}: a gate must stand in the test, not in a fixture; "
                "let the fixture return the measurement and assert on it in the test"
            )
        self.gates.append(gate)
        for source in sources:
            if source.pulled and not any(source is known for known in self.measurements):
                self.measurements.append(source)
        if gate.role == "requires" and gate.outcome != "held" and not self.unmet:
            self.unmet = f"{gate.note}: {gate.reason}"


_ledger: ContextVar[Ledger | None] = ContextVar("gpulab_ledger", default=None)

_open: list[Ledger] = []
"""The ledgers that collect in this process, the innermost last: a thread sees them, though it inherits no context."""


def current_ledger() -> Ledger | None:
    """The ledger of the test item that runs now; None outside pytest."""
    return _ledger.get()


def ledger_of_gate(where: str) -> Ledger | None:
    """The ledger for a gate that is asked at `where`; None outside pytest.

    RuntimeError where the item cannot be told: in a thread that did not inherit it, or that outlived it.
    """
    ledger = _ledger.get()
    if ledger is not None and ledger.process != os.getpid():
        raise RuntimeError(
            f"{where}: a gate must be asked in the test's own process, got one in a process that it forked: the "
            "answer would be lost; hand back the measurement and assert on it in the test"
        )
    if (ledger is None and not _open) or any(ledger is one for one in _open):
        return ledger
    lost = (
        f"{where}: a gate must know its test, got one in a thread without the test's context; ask it in the test, or "
        "give each call a context: `pool.submit(contextvars.copy_context().run, function, ...)`"
    )
    if _open:
        _open[-1].lost = lost
    raise RuntimeError(lost)


@contextmanager
def collecting(ledger: Ledger) -> Iterator[Ledger]:
    """Gates decided inside are recorded in `ledger`."""
    token = _ledger.set(ledger)
    _open.append(ledger)
    try:
        yield ledger
    finally:
        _open.pop()
        _ledger.reset(token)


class Blocked(Exception):
    """The question cannot be asked here (capacity, quota, a missing artifact): no evidence either way."""


class TargetRefused(Blocked):
    """The target cannot serve this profile."""


def blocked(reason: str) -> NoReturn:
    """End the test with the verdict blocked."""
    raise Blocked(reason)
