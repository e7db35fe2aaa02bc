"""The baseline: a committed record that a session is held against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from pytest_gpulab.errors import in_one_line
from pytest_gpulab.gates import Gate
from pytest_gpulab.record import Decision, Item, Record, Verdict

if TYPE_CHECKING:
    from pytest_gpulab.options import Options

GOOD: tuple[Verdict, ...] = ("supported", "caveated")
"""Verdicts that can be lost."""


class Change(NamedTuple):
    """How a decision differs from the baseline's. A verdict of None: absent there, or not run here."""

    id: str
    before: Verdict | None
    after: Verdict | None
    not_run: tuple[str, ...] = ()
    """Node ids of items that are in the baseline only."""
    redefined: str = ""
    """The first gate that asks something else than in the baseline, as written in the experiment."""

    @property
    def is_loss(self) -> bool:
        """Supported or caveated in the baseline, and no longer so by the same items and gates."""
        return self.before in GOOD and (self.after not in GOOD or self.is_other)

    @property
    def is_other(self) -> bool:
        """The question was not asked in full, or was another one, so that the verdicts do not compare."""
        return bool(self.not_run or self.redefined)

    @property
    def kind(self) -> str:
        """How it reads: lost, improved, new, not run, redefined or changed."""
        if self.before is None:
            return "new"
        if self.after is None:
            return "not run"
        if self.before in GOOD and self.after not in GOOD:
            return "lost"
        if self.is_other:
            return "not run" if self.not_run else "redefined"
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


def load_baseline(path: Path, options: Options, collected: Sequence[str]) -> Record:
    """The record at `path`, for a session that was given `options` and `collected`.

    ValueError says what must hold when it is unreadable, invalid, a part, or of another setup.
    """
    record = read_record(path)
    if record.session.narrowed:
        raise ValueError(
            f"{path} is the record of a session that did not run the whole catalog ({record.session.narrowed}): a "
            "decision it lacks could be lost unseen; give the record of a full session"
        )
    if record.session.collected and not covers(record.session.collected, collected):
        theirs, mine = ", ".join(record.session.collected), ", ".join(collected)
        raise ValueError(
            f"{path} is the record of a session that collected {theirs}, this one collects {mine}: a decision that "
            "the record lacks could be lost unseen; give the record of a session over the same folders, or give this "
            "session the folders of the record"
        )
    for what, expected, got in (
        ("target", options.target, record.target),
        ("accelerator", options.accelerator, record.accelerator),
        ("load-from", options.load_from, record.session.load_from),
    ):
        if expected != got:
            raise ValueError(
                f"{path} is a record of {what} {got!r}, this session's is {expected!r}: verdicts of another {what} "
                f"are no baseline; give the record of {expected!r} or --gpulab-{what}={got}"
            )
    return record


def covers(whole: Iterable[str], parts: Iterable[str]) -> bool:
    """Whether each of `parts` is, or lies in, one of `whole`: paths from one root folder, ``.`` is all of it."""
    return all(any(PurePosixPath(part).is_relative_to(folder) for folder in whole) for part in parts)


def compare(record: Record, baseline: Record) -> list[Change]:
    """What changed since `baseline`, by decision id: losses first."""
    before = {decision.id: decision for decision in baseline.decisions}
    after = {decision.id: decision for decision in record.decisions}
    changes = [_change(id, before.get(id), after.get(id)) for id in sorted(before.keys() | after.keys())]
    return sorted(
        (change for change in changes if change.before != change.after or change.is_other),
        key=lambda change: not change.is_loss,
    )


def _change(id: str, before: Decision | None, after: Decision | None) -> Change:
    if before is None or after is None:
        return Change(id, before.verdict if before else None, after.verdict if after else None)
    items = {item.nodeid: item for item in after.items}
    both = [(item, items[item.nodeid]) for item in before.items if item.nodeid in items]
    return Change(
        id,
        before.verdict,
        after.verdict,
        not_run=tuple(item.nodeid for item in before.items if item.nodeid not in items),
        redefined=next(filter(None, (_redefined(*pair) for pair in both)), ""),
    )


def _redefined(before: Item, after: Item) -> str:
    """The text of the first gate that is not the same in both; empty when those that both reached are."""
    to_the_end = before.verdict in GOOD and after.verdict in GOOD
    for was, now in zip_longest(before.gates, after.gates):
        if was is None or now is None:
            return (was or now).text if to_the_end else ""
        if not _same(was, now):
            return now.text
    return ""


def _same(was: Gate, now: Gate) -> bool:
    """Whether both ask the same. Older records do not say what their gates asked."""
    return was.role == now.role and was.definition_hash in ("", now.definition_hash)


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

    1 for any error, 10 when a decision was lost, redefined or not run in full, 0 when every red test is a known
    rejection.
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
