"""The baseline: a committed record that a session is held against."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from pytest_gpulab.errors import in_one_line
from pytest_gpulab.record import Record, Verdict

GOOD: tuple[Verdict, ...] = ("supported", "caveated")
"""Verdicts that can be lost."""


class Change(NamedTuple):
    """A decision whose verdict differs from the baseline's. None: absent there, or not run here."""

    id: str
    before: Verdict | None
    after: Verdict | None
    reason: str

    @property
    def is_loss(self) -> bool:
        """Supported or caveated in the baseline and no longer, or not run."""
        return self.before in GOOD and self.after not in GOOD

    @property
    def kind(self) -> str:
        """How it reads: lost, improved, new, not run or changed."""
        if self.after is None:
            return "not run"
        if self.before is None:
            return "new"
        if self.is_loss:
            return "lost"
        return "improved" if self.after in GOOD and self.before != "supported" else "changed"


def read_record(path: Path) -> Record:
    """The record at `path`. ValueError says what must hold when it is unreadable or invalid."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as wrong:
        raise ValueError(f"cannot read {path}: {wrong.strerror or wrong}; name a committed decision record") from None
    except ValidationError as wrong:
        raise ValueError(
            f"{path} is no decision record of this version: {in_one_line(wrong)}; write one with "
            "--gpulab-report-dir and commit its decision-record.json"
        ) from None


def load_baseline(path: Path, target: str, accelerator: str) -> Record:
    """The record at `path`. ValueError says what must hold when it is unreadable, invalid or of another setup."""
    record = read_record(path)
    if record.session.narrowed:
        raise ValueError(
            f"{path} is the record of a session that did not run the whole catalog ({record.session.narrowed}): a "
            "decision it lacks could be lost unseen; give the record of a full session"
        )
    for what, expected, got in (("target", target, record.target), ("accelerator", accelerator, record.accelerator)):
        if expected != got:
            raise ValueError(
                f"{path} is a record of {what} {got!r}, this session's is {expected!r}: verdicts of another {what} "
                f"are no baseline; give the record of {expected!r} or --gpulab-{what}={got}"
            )
    return record


def compare(record: Record, baseline: Record) -> list[Change]:
    """What changed since `baseline`, by decision id: losses first."""
    before = {decision.id: decision for decision in baseline.decisions}
    after = {decision.id: decision for decision in record.decisions}
    changes = [
        Change(
            id,
            before[id].verdict if id in before else None,
            after[id].verdict if id in after else None,
            after[id].reason if id in after else "",
        )
        for id in sorted(before.keys() | after.keys())
    ]
    return sorted((c for c in changes if c.before != c.after), key=lambda change: not change.is_loss)


def known_rejections(record: Record, baseline: Record) -> set[str]:
    """Node ids whose red test is no news: rejected here, and their decision (or they) rejected in the baseline."""
    decisions = {decision.id for decision in baseline.decisions if decision.verdict == "rejected"}
    evidence = {item.nodeid for item in baseline.evidence if item.verdict == "rejected"}
    quiet = {
        item.nodeid
        for decision in record.decisions
        if decision.id in decisions
        for item in decision.items
        if item.verdict == "rejected"
    }
    return quiet | {item.nodeid for item in record.evidence if item.verdict == "rejected"} & evidence


def exit_status(own: int, record: Record, baseline: Record, failed: set[str]) -> int:
    """The session's exit status against `baseline`; `own` is pytest's, `failed` the node ids that are red.

    1 for any error, 10 when a decision was lost or not run, 0 when every red test is a known rejection.
    """
    rejected = {item.nodeid for decision in record.decisions for item in decision.items if item.verdict == "rejected"}
    rejected |= {item.nodeid for item in record.evidence if item.verdict == "rejected"}
    if record.errors or failed - rejected:
        return 1
    if any(change.is_loss for change in compare(record, baseline)):
        return 10
    if failed - known_rejections(record, baseline):
        return 1
    return 0 if own == 1 and failed else own
