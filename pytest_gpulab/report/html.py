"""What pytest-gpulab adds to a pytest-html report, as functions that the plugin's hooks call.

The hooks and their functions: ``pytest_html_results_table_header`` `header_cells`,
``pytest_html_results_table_row`` `row_cells`, ``pytest_html_results_summary`` `summary` (extend its ``prefix``),
``pytest_runtest_makereport`` `extras` (extend ``report.extras`` in the call phase).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, get_args

from pytest_gpulab.gates import Figure, Gate, Ledger
from pytest_gpulab.record import Decision, RunSummary, Verdict
from pytest_gpulab.report.arm import in_words
from pytest_gpulab.report.canvas import colour, number
from pytest_gpulab.report.style import CSS
from pytest_gpulab.rule import Outcome

_CELLS_AT = 1
"""Where the two columns go: after pytest's own result, in the header and in every row."""

_URGENCY: tuple[Verdict, ...] = ("rejected", "open", "partial", "blocked", "caveated", "supported")
"""How the verdict column sorts."""

_OUTCOMES: dict[Outcome, str] = {"held": "✓ held", "false": "✗ false", "undecided": "? undecided"}

_COLUMNS = {
    "delivery ratio": "Delivered",
    "p50 e2e": "p50 e2e",
    "p95 e2e": "p95 e2e",
    "p99 e2e": "p99 e2e",
    "p95 ttft": "p95 TTFT",
    "p50 tpot": "p50 TPOT",
    "output rate": "Output",
    "mean queue delay": "Queue delay",
    "peak waiting": "Peak waiting",
}
"""Figures of the arm table, by their label in the record."""

_FLEET_COLUMNS = {
    "first replica ready": "1st ready",
    "2 replicas ready": "2nd ready",
    "time without a replica": "Down",
    "GPU utilization": "GPU used",
    "cost": "Cost",
}
"""What the table adds where an arm has a fleet."""


# --- the results table ----------------------------------------------------------------------------------------


def header_cells(cells: list[str]) -> None:
    """Add the sortable columns Verdict and Basis to the header, in place."""
    cells[_CELLS_AT:_CELLS_AT] = [
        '<th class="sortable" data-column-type="verdict">Verdict</th>',
        '<th class="sortable" data-column-type="basis">Basis</th>',
    ]


def row_cells(report: object, cells: list[str]) -> None:
    """Add the verdict and the basis of `report` to its row, in place; dashes where it carries no evidence.

    A row that another plugin has emptied stays empty: pytest-html then leaves it out.
    """
    if not cells:
        return
    evidence: Mapping[str, Any] = getattr(report, "gpulab", None) or {}
    reason = escape(" ".join(str(evidence.get("reason") or "").split()))
    cells[_CELLS_AT:_CELLS_AT] = [
        f'<td class="col-verdict" title="{reason}">{_badge(evidence.get("verdict"))}</td>',
        f'<td class="col-basis">{_basis(evidence.get("basis"))}</td>',
    ]


def _badge(verdict: str | None) -> str:
    """The verdict on its colour. pytest-html sorts by this text, so it starts with the order."""
    if verdict not in _URGENCY:
        return f'<span data-order="{len(_URGENCY)}" class="gpulab-none">–</span>'
    order = _URGENCY.index(verdict)
    return f'<span data-order="{order}" class="gpulab-badge gpulab-{verdict}">{verdict}</span>'


def _basis(basis: str | None) -> str:
    if not basis:
        return '<span class="gpulab-none">–</span>'
    return f'<span class="gpulab-basis gpulab-{escape(basis)}">{escape(basis)}</span>'


# --- the decision board ---------------------------------------------------------------------------------------


def summary(decisions: Sequence[Decision]) -> list[str]:
    """The style, and the decision board: one row a decision with verdict, basis and the gate that decided it."""
    style = f"<style>{CSS}</style>"
    if not decisions:
        return [style]
    counts = Counter(decision.verdict for decision in decisions)
    tally = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])
    rows = "".join(_board_row(decision) for decision in decisions)
    return [
        style,
        f'<section class="gpulab gpulab-board"><h3>Decisions</h3><p>{tally}</p><table>'
        "<thead><tr><th>Decision</th><th>Verdict</th><th>Basis</th><th>Deciding gate</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>",
    ]


def _board_row(decision: Decision) -> str:
    without = [item.nodeid for item in decision.items if item.verdict is None]
    missing = f"<br><small>no verdict: {escape(', '.join(without))}</small>" if without else ""
    return (
        f"<tr><td>{escape(decision.statement)}<br><small>{escape(decision.id)}</small></td>"
        f"<td>{_badge(decision.verdict)}</td><td>{_basis(decision.basis)}</td>"
        f"<td>{escape(decision.reason)}{missing}</td></tr>"
    )


# --- one experiment -------------------------------------------------------------------------------------------


def extras(
    ledger: Ledger, config: Any, evidence: Mapping[str, Any] | None = None, statement: str = ""
) -> list[dict[str, Any]]:
    """The pytest-html extras of one test item: a block with its gates, arms and plots.

    Empty without ``--html`` and for items that measured nothing and decided nothing. `evidence` is the report's
    ``gpulab`` attribute, `statement` the decision's; without them the block has neither verdict nor statement.
    """
    if not config.getoption("htmlpath", None) or not (ledger.gates or ledger.measurements):
        return []
    from pytest_html import extras as html_extras

    from pytest_gpulab.measurement import summarize
    from pytest_gpulab.report.choice import plots_of

    pulled = [measurement for measurement in ledger.measurements if measurement.pulled]
    shown, plots = plots_of(ledger)
    colours = {arm.id: colour(index) for index, arm in enumerate(shown)}
    runs = [summarize(measurement) for measurement in pulled]
    return [html_extras.html(experiment(evidence or {}, statement, ledger.gates, runs, plots, colours))]


def without_extras(crash: Exception) -> list[dict[str, Any]]:
    """What stands in place of `extras` where they could not be made: a note that says why."""
    from pytest_html import extras as html_extras

    why = escape(f"{type(crash).__name__}: {crash}")
    note = f'<p class="gpulab-problem">gpulab: tables and plots could not be made: {why}</p>'
    return [html_extras.html(f'<section class="gpulab gpulab-experiment">{note}</section>')]


def experiment(
    evidence: Mapping[str, Any],
    statement: str,
    gates: Sequence[Gate],
    runs: Sequence[RunSummary],
    plots: Iterable[str],
    colours: Mapping[str, str],
) -> str:
    """The block of one experiment. `colours` are those of its arms in the plots, by run id."""
    parts = [
        _head(evidence, statement),
        _gate_table(gates) if gates else "",
        "".join(map(_problems, runs)),
        _arm_table(runs, colours) if runs else "",
        f'<div class="gpulab-plots">{"".join(plots)}</div>',
    ]
    return f'<section class="gpulab gpulab-experiment">{"".join(parts)}</section>'


def _head(evidence: Mapping[str, Any], statement: str) -> str:
    title = f"<h3>{escape(statement)}</h3>" if statement else ""
    tags = "".join(
        (
            _badge(evidence["verdict"]) if evidence.get("verdict") else "",
            _basis(evidence["basis"]) if evidence.get("basis") else "",
            f"<small>{escape(evidence['decision'])}</small>" if evidence.get("decision") else "",
        )
    )
    reason = f"<p>{escape(evidence['reason'])}</p>" if evidence.get("reason") else ""
    return f'{title}<div class="gpulab-head">{tags}</div>{reason}'


def _problems(run: RunSummary) -> str:
    return "".join(
        f'<p class="gpulab-problem">{escape(run.label)}: {escape(problem)}</p>' for problem in run.problems
    )


def _gate_table(gates: Sequence[Gate]) -> str:
    return (
        '<h4>Gates</h4><div class="gpulab-scroll"><table><thead><tr><th>Role</th><th>Claim</th><th>Outcome</th>'
        f"<th>Numbers</th><th>Line</th></tr></thead><tbody>{''.join(map(_gate_row, gates))}</tbody></table></div>"
    )


def _gate_row(gate: Gate) -> str:
    note = f"<br><small>{escape(gate.note)}</small>" if gate.note else ""
    file = gate.file.replace("\\", "/").rsplit("/", 1)[-1]
    return (
        f"<tr><td>{gate.role}</td><td><code>{escape(gate.text)}</code>{note}</td>"
        f'<td class="gpulab-tight gpulab-outcome-{gate.outcome}">{_OUTCOMES[gate.outcome]}</td>'
        f'<td>{escape(gate.reason)}</td><td class="gpulab-tight">{escape(file)}:{gate.line}</td></tr>'
    )


def _arm_table(runs: Sequence[RunSummary], colours: Mapping[str, str]) -> str:
    columns = _COLUMNS | (_FLEET_COLUMNS if any("fleet" in run.profile for run in runs) else {})
    heads = "".join(f'<th class="gpulab-n">{title}</th>' for title in columns.values())
    rows = "".join(_arm_row(run, columns, colours.get(run.id, "transparent")) for run in runs)
    return (
        '<h4>Arms</h4><div class="gpulab-scroll"><table><thead><tr><th>Arm</th>'
        f'<th class="gpulab-n">Repeats</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f"<p><small>served by {escape('; '.join(sorted({run.server for run in runs})))}</small></p>"
    )


def _arm_row(run: RunSummary, columns: Iterable[str], shade: str) -> str:
    figures = {figure.label: figure for figure in run.figures}
    cells = "".join(f'<td class="gpulab-n">{_figure(figures.get(label))}</td>' for label in columns)
    fixed = any(figure.deterministic for figure in run.figures)
    repeats = "1<small>deterministic</small>" if fixed else str(len(run.seeds))
    return (
        f'<tr><td><span class="gpulab-swatch" style="background:{shade}"></span>{escape(run.label)}'
        f'<small class="gpulab-arm">{escape(in_words(run))}</small></td>'
        f'<td class="gpulab-n">{repeats}</td>{cells}</tr>'
    )


def _figure(figure: Figure | None) -> str:
    """Value and unit, the interval in small print below; ratios in per cent."""
    if figure is None or math.isnan(figure.value):
        return "–"
    factor, unit = (100.0, "%") if figure.unit == "ratio" else (1.0, figure.unit)
    if 0 < figure.value < 0.1 and unit == "s":
        factor, unit = 1000.0, "ms"
    digits = 1 if unit == "ms" else 9
    value, low, high = (number(round(factor * part, digits)) for part in (figure.value, figure.low, figure.high))
    interval = f"<small>{low} to {high}</small>" if low != high else ""
    return f"{value} {escape('' if unit == 'requests' else unit)}".strip() + interval
