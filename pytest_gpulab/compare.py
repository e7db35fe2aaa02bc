"""``gpulab compare``: what the simulator predicts beside each figure of a measured record."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpulab.errors import in_one_line

if TYPE_CHECKING:
    from pytest_gpulab.gates import Figure
    from pytest_gpulab.record import Record, RunSummary


def add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "compare",
        help="the simulator's prediction beside each measured figure of a record",
        description="Simulates every measured arm of a decision record under the same seeds, and prints both figures "
        "and the prediction's error as a table in Markdown.",
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="decision-record.json of a measured session")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table here (default: stdout)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from pytest_gpulab.baseline import read_record
    from pytest_gpulab.engine.calibration import read_catalog

    read_catalog()  # a wrong one would be a reason for every arm
    record = read_record(options.record)
    if not any(_measured(record)):
        raise ValueError(
            f"{options.record} must hold a measured arm to compare with, it has none; name the record of a "
            "session on vllm, endpoint or eks"
        )
    table = predictions(record)
    if options.output is None:
        print(table, end="")
    else:
        options.output.write_text(table, encoding="utf-8")
    return 0


def predictions(record: Record) -> str:
    """The table in Markdown: a row for every measured arm and figure, medians over the same repeats."""
    rows = ["| arm | figure | measured | predicted | error |", "| --- | --- | ---: | ---: | ---: |"]
    missing = []
    for arm in _measured(record):
        try:
            predicted = _simulated(arm)
        except ValueError as refusal:
            missing.append(f"- {arm.label}: {in_one_line(refusal)}")
            continue
        rows += _rows(arm, predicted)
    return "\n".join([*rows, *(["", "Without a prediction:", "", *missing] if missing else [])]) + "\n"


def _measured(record: Record) -> list[RunSummary]:
    """Every measured arm once: of the item that repeated it most often."""
    found: dict[str, RunSummary] = {}
    for runs in (*(decision.runs for decision in record.decisions), *(evidence.runs for evidence in record.evidence)):
        for run in runs:
            known = found.get(run.id)
            if run.basis == "measured" and (known is None or len(run.seeds) > len(known.seeds)):
                found[run.id] = run
    return list(found.values())


def _simulated(arm: RunSummary) -> RunSummary:
    """The same arm on the simulator. ValueError without a calibration."""
    from pytest_gpulab.experiment import Profile, Workload
    from pytest_gpulab.gates import TargetRefused
    from pytest_gpulab.lab import Lab
    from pytest_gpulab.measurement import summarize
    from pytest_gpulab.targets.sim import Sim

    lab = Lab(Sim(), first_seed=min(arm.seeds))
    measurement = lab.measure(Workload.model_validate(arm.workload), Profile.model_validate(arm.profile))
    try:
        for repeat in range(len(arm.seeds)):
            measurement.run(repeat)
    except TargetRefused as refusal:
        raise ValueError(str(refusal)) from None
    return summarize(measurement)


def _rows(arm: RunSummary, predicted: RunSummary) -> Iterator[str]:
    by_label = {figure.label: figure for figure in predicted.figures}
    for figure in arm.figures:
        other = by_label[figure.label]
        yield f"| {arm.label} | {figure.label} | {_text(figure)} | {_text(other)} | {_error(figure, other)} |"


def _text(figure: Figure) -> str:
    from pytest_gpulab.evidence import figure_text

    return figure_text(figure)


def _error(measured: Figure, predicted: Figure) -> str:
    """The prediction's relative error; of a ratio the difference in percentage points."""
    if measured.unit == "ratio" and not math.isnan(predicted.value - measured.value):
        return f"{100 * (predicted.value - measured.value):+.1f} points"
    if not (math.isfinite(measured.value) and math.isfinite(predicted.value) and measured.value):
        return "none" if measured.value == predicted.value else "–"
    return f"{predicted.value / measured.value - 1:+.0%}"
