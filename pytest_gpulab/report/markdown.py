"""The record for readers: one short section a decision."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_gpulab.report.arm import in_words

if TYPE_CHECKING:
    from pytest_gpulab.gates import Figure, Gate
    from pytest_gpulab.record import Decision, Evidence, Problem, Record, RunSummary

_COLUMNS = {
    "delivery ratio": "delivered",
    "request rate": "requests/s",
    "output rate": "tokens/s",
    "p95 ttft": "p95 TTFT",
    "p50 tpot": "p50 TPOT",
    "p95 e2e": "p95 e2e",
    "mean queue delay": "queue delay",
}
"""Figures of the evidence table, by their label in the record."""

_FLEET_COLUMNS = {
    "first replica ready": "1st ready",
    "2 replicas ready": "2nd ready",
    "time without a replica": "down",
    "GPU utilization": "GPU used",
    "cost": "USD",
}
"""What the table adds where an arm has a fleet."""


def to_markdown(record: Record) -> str:
    """The whole record; ends in one newline."""
    info = record.session
    lines = [
        "# Decision record",
        "",
        f"Target {record.target}, --gpulab-accelerator={record.accelerator}, seeds from {info.first_seed}, up to "
        f"{info.max_repeats} repeats. Started {info.started}, {info.seconds:g} s.",
    ]
    if info.narrowed:
        lines += ["", f"**Partial: this session did not run the whole catalog ({_text(info.narrowed)}).**"]
    if record.decisions:
        lines += ["", "| decision | verdict | basis | deciding gate |", "| --- | --- | --- | --- |"]
        lines += [
            _row(f"[{d.id}](#{_anchor(d.id)})", d.verdict, d.basis or "–", _text(d.reason)) for d in record.decisions
        ]
    for decision in record.decisions:
        lines += ["", *_decision(decision)]
    if record.evidence:
        lines += ["", "## Evidence that no decision claims"]
    for evidence in record.evidence:
        lines += ["", *_evidence(evidence)]
    for title, problems in (("Errors", record.errors), ("Missing", record.missing)):
        if problems:
            lines += ["", f"## {title}", "", *map(_problem, problems)]
    return "\n".join(lines) + "\n"


def _decision(decision: Decision) -> list[str]:
    lines = [
        f"## {decision.id}",
        "",
        f"{_text(decision.statement)}.".replace("..", "."),
        "",
        f"**{decision.verdict}**, {_basis(decision.basis)}: {_text(decision.reason)}",
        *_items(decision),
        "",
        *_provenance(decision),
    ]
    without = [item for item in decision.items if item.verdict is None]
    return (
        lines
        + (["", *(f"- no verdict: `{item.nodeid}`: {_text(item.reason)}" for item in without)])[
            : 1 + len(without) if without else 0
        ]
    )


def _items(decision: Decision) -> Iterator[str]:
    """The gates and runs of each item; under its name where there are several."""
    runs = {run.id: run for run in decision.runs}
    for item in decision.items:
        if len(decision.items) > 1 and item.gates:
            yield from ("", f"### {_text(item.nodeid.rpartition('::')[2])}: {item.verdict or 'no verdict'}")
        yield from _gate_table(item.gates)
        yield from _run_table([runs[id] for id in item.runs])


def _evidence(evidence: Evidence) -> list[str]:
    return [
        f"### {_text(evidence.statement or evidence.nodeid)}",
        "",
        f"**{evidence.verdict or 'no verdict'}**, {_basis(evidence.basis)}: {_text(evidence.reason)} "
        f"(`{evidence.nodeid}`)",
        *_gate_table(evidence.gates),
        *_run_table(evidence.runs),
    ]


def _gate_table(gates: Sequence[Gate]) -> list[str]:
    if not gates:
        return []
    return [
        "",
        "| role | gate | outcome | numbers | line |",
        "| --- | --- | --- | --- | --- |",
        *(
            _row(
                gate.role,
                f"`{gate.text}`" + (f" ({_text(gate.note)})" if gate.note else ""),
                gate.outcome,
                _text(gate.reason),
                f"{gate.file}:{gate.line}",
            )
            for gate in gates
        ),
    ]


def _run_table(runs: Sequence[RunSummary]) -> list[str]:
    if not runs:
        return []
    columns = _COLUMNS | (_FLEET_COLUMNS if any("fleet" in run.profile for run in runs) else {})
    return [
        "",
        _row("run", "repeats", *columns.values()),
        _row("---", "---:", *("---:" for _ in columns)),
        *(_run_row(run, columns) for run in runs),
        "",
        *(f"- {_text(run.label)}: {_text(in_words(run))}" for run in runs),
        *(f"- {_text(run.label)} is invalid evidence: {_text(problem)}" for run in runs for problem in run.problems),
    ]


def _run_row(run: RunSummary, columns: Iterable[str]) -> str:
    figures = {figure.label: figure for figure in run.figures}
    fixed = any(figure.deterministic for figure in run.figures)
    repeats = "1 (deterministic)" if fixed else str(len(run.seeds))
    return _row(_text(run.label), repeats, *(_figure(figures.get(label)) for label in columns))


def _figure(figure: Figure | None) -> str:
    if figure is None or math.isnan(figure.value):
        return "–"
    if figure.unit == "ratio":
        return f"{100 * figure.value:.4g} %"
    unit = f" {figure.unit}" if figure.unit == "s" else ""
    if math.isinf(figure.value):
        return f"∞{unit}"
    return (f"{figure.value:.3g}" if abs(figure.value) < 1000 else f"{figure.value:.0f}") + unit


def _provenance(decision: Decision) -> list[str]:
    origin = decision.provenance
    servers = sorted({run.server for run in decision.runs})
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return [
        f"Provenance: target {origin.target}, accelerator {origin.accelerator}; "
        f"served by {', '.join(servers) or 'nothing'}; seeds {_seeds(origin.seeds)}; "
        f"definition {origin.definition_hash}; commit {origin.git_commit or 'none'}; {versions}.",
    ]


def _seeds(seeds: Sequence[int]) -> str:
    if not seeds:
        return "none"
    if len(seeds) > 1 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _problem(problem: Problem) -> str:
    claimed = f" (decision {problem.decision})" if problem.decision else ""
    return f"- `{problem.nodeid}`{claimed}: {_text(problem.reason)}"


def _basis(basis: str | None) -> str:
    return f"{basis} evidence" if basis else "no evidence"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _text(text: str) -> str:
    """One line that Markdown shows as it is."""
    return re.sub(r"([\\*_<>\[\]])", r"\\\1", " ".join(text.split()))


def _anchor(id: str) -> str:
    return id.replace(".", "")
