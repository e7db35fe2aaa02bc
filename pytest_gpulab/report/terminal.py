"""The terminal: verdict words for items, and the table of decisions with the gate that decided each."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import pytest

from pytest_gpulab.options import shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pytest_gpulab.baseline import Change
    from pytest_gpulab.options import Options
    from pytest_gpulab.record import Problem, Record, Verdict
    from pytest_gpulab.run import Basis
    from pytest_gpulab.session import Session

Status: TypeAlias = tuple[str, str, tuple[str, Mapping[str, bool]]]

_WORDS: dict[Verdict, tuple[str, str, str]] = {
    "supported": ("passed", ".", "green"),
    "caveated": ("passed", "c", "yellow"),
    "partial": ("xfailed", "p", "yellow"),
    "rejected": ("failed", "F", "red"),
    "open": ("xfailed", "o", "yellow"),
    "blocked": ("skipped", "b", "blue"),
}
"""Per verdict: the category pytest counts it in, its letter, its colour."""


def header(options: Options) -> str | None:
    """The resolved configuration, where any of it was given: a project without decisions sees nothing."""
    return f"gpulab: {options}" if options.explicit else None


def announcement(session: Session) -> str | None:
    """The resolved configuration, once it is known that something asks for evidence."""
    return f"gpulab: {session.options}" if session.asks and not session.options.explicit else None


def status(report: pytest.TestReport) -> Status | None:
    """The verdict instead of pytest's word, for the report that carries it."""
    evidence = getattr(report, "gpulab", None)
    if evidence is None or evidence["verdict"] is None or report.when == "teardown":
        return None
    category, letter, colour = _WORDS[evidence["verdict"]]
    if report.outcome != ("skipped" if category == "xfailed" else category):
        return None
    return category, letter, (evidence["verdict"].upper(), {colour: True})


def summarize(session: Session, terminalreporter: pytest.TerminalReporter) -> None:
    """Write decisions, evidence, errors and missing items, what changed, and where the record lies."""
    if session.record is None and not session.changes:
        return
    width = max(shutil.get_terminal_size().columns, 60)
    terminalreporter.section("decisions", bold=True)
    if session.record is not None:
        terminalreporter.write(_render(_tables(session.record), width, terminalreporter.hasmarkup))
    for line in _lines(session):
        terminalreporter.write_line(line)


def _tables(record: Record) -> list[RenderableType]:
    decided = [(d.id, d.verdict, d.basis, d.reason) for d in record.decisions]
    shown = [(e.nodeid.rpartition("::")[2], e.verdict, e.basis, e.reason) for e in record.evidence]
    parts: list[RenderableType] = []
    if decided:
        parts.append(_table("Decision", decided))
    if shown:
        parts += ["", _table("Evidence", shown)] if decided else [_table("Evidence", shown)]
    for title, problems in (("Errors", record.errors), ("Missing", record.missing)):
        if problems:
            parts += ["", _problems(title, problems)]
    return parts


def _table(title: str, rows: Sequence[tuple[str, Verdict | None, Basis | None, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, max_width=24, overflow="fold")
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Basis", no_wrap=True)
    table.add_column("Deciding gate", overflow="fold", ratio=1)
    for name, verdict, basis, reason in rows:
        style = _WORDS[verdict][2] if verdict else "red"
        table.add_row(Text(name), Text(verdict or "none", style=style), Text(basis or "-"), Text(reason))
    return table


def _problems(title: str, problems: Sequence[Problem]) -> RenderableType:
    from rich.text import Text

    text = Text(f"{title}: no verdict", style="bold red" if title == "Errors" else "bold yellow")
    for problem in problems:
        name = f"{problem.nodeid} ({problem.decision})" if problem.decision else problem.nodeid
        text.append(f"\n  {name}\n    {problem.reason}", style="not bold default")
    return text


def _render(parts: Sequence[RenderableType], width: int, coloured: bool) -> str:
    from rich.console import Console

    console: Console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=coloured,
        color_system="standard" if coloured else None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _lines(session: Session) -> list[str]:
    lines = [""] if session.record is not None else []
    if session.options.gate is not None:
        lines += _against(session)
    if session.record is not None:
        lines.append(f"{session.options}")
    if session.written is not None and session.record is not None:
        why = session.record.session.narrowed
        lines.append(f"record: {shown(session.written)}" + (f" (partial: {why})" if why else ""))
    if session.failure:
        lines.append(session.failure)
    return lines


def _against(session: Session) -> list[str]:
    assert session.options.gate is not None
    name = shown(session.options.gate)
    if not session.changes:
        return [f"baseline {name}: no verdict changed"]
    lines = [f"baseline {name}:", *(f"  {_change(change)}" for change in session.changes)]
    if any(change.after is None or change.is_other for change in session.changes):
        lines.append(f"run the whole catalog; if it was changed on purpose, commit its new record as {name}")
    return lines


def _change(change: Change) -> str:
    line = f"{change.kind:9} {change.id}: {change.before or 'absent'} -> {change.after or 'not run'}"
    if change.not_run:
        line += f", without {', '.join(change.not_run)}"
    if change.redefined:
        line += f", `{change.redefined}` asks something else than there"
    return line
