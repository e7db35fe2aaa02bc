"""The `gpulab` command; each subcommand is a function of the parsed arguments that returns an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpulab.aws.command import add_eks, add_reap
from pytest_gpulab.compare import add_compare
from pytest_gpulab.errors import in_one_line
from pytest_gpulab.live.command import add_cluster
from pytest_gpulab.serving.command import add_serve

if TYPE_CHECKING:
    from pytest_gpulab.engine.fit import Prediction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand. 0: done; 2: it was refused, with the reason on stderr."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except (ValueError, ImportError, OSError) as refusal:
        print(f"gpulab {options.command}: {in_one_line(refusal)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpulab", description="Tools around pytest-gpulab's experiments.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fit(commands)
    add_cluster(commands)
    add_compare(commands)
    add_eks(commands)
    add_reap(commands)
    add_serve(commands)
    return parser


def _add_fit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a calibration to measured runs",
        description="Fits the step and front-end costs of one model on one accelerator to measured runs, and "
        "writes them as a calibration. Prints how well each run is predicted by a fit without it.",
    )
    fit.add_argument(
        "data",
        nargs="+",
        type=Path,
        metavar="DATA",
        help="measured runs: a folder of --gpulab-runs, or *.jsonl.gz, *.jsonl or *.csv",
    )
    fit.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="ACCELERATOR-MODEL.json: the name says which of the runs are fitted",
    )
    fit.add_argument("--source", help="what was measured, by whom, when (default: the names of the files)")
    fit.add_argument("--like", metavar="CALIBRATION", help="start from the same model's on another accelerator")
    fit.add_argument("--no-check", action="store_true", help="skip the leave-one-out fits; no gate decides on it")
    fit.set_defaults(run=_fit)


def _fit(options: argparse.Namespace) -> int:
    from pytest_gpulab.engine.calibration import load_calibration
    from pytest_gpulab.engine.fit import fit_calibration
    from pytest_gpulab.engine.measured import of_calibration, read_runs
    from pytest_gpulab.run_store import runs_to_fit

    if options.output.suffix != ".json":
        raise ValueError(f"the output must be named ACCELERATOR-MODEL.json, got {options.output.name!r}")
    name = options.output.stem
    every = [run for path in options.data for run in (runs_to_fit(path, name) if path.is_dir() else read_runs(path))]
    runs = of_calibration(every, name)
    source = options.source or ", ".join(path.name for path in options.data)
    like = load_calibration(options.like) if options.like else None
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report = fit_calibration(runs, source=source, like=like, check=not options.no_check)
    options.output.write_text(report.calibration.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _print_errors("each run predicted by a fit without it", report.left_out)
    _print_errors("open-loop runs predicted by a fit of the closed-loop ones", report.opened)
    print(f"\nwrote {options.output}")
    if options.no_check:
        print("its error was not found: no gate decides on it until it is fitted without --no-check")
    return 0


def _print_errors(title: str, by_variant: Mapping[str, Sequence[Prediction]]) -> None:
    """A table of relative errors in %, one run a line, and their median and 90th percentile."""
    import numpy as np

    from pytest_gpulab.engine.fit import absolute_errors

    for variant, predictions in by_variant.items():
        if not predictions:
            continue
        print(f"\n{variant}: {title}; error in %")
        for one in predictions:
            errors = "  ".join(f"{name} {100 * error:+.1f}" for name, error in one.errors.items())
            print(f"  {one.run.name:<40} {errors}")
        median, high = 100 * np.quantile(absolute_errors(predictions), (0.5, 0.9))
        print(f"  median {median:.1f}, 90th percentile {high:.1f}")
