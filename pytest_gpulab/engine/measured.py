"""Measured runs as files hold them: what was asked of the server, and the figures that came out.

Two formats. ``*.jsonl.gz`` (or ``*.jsonl``): one run a line with every request's times, as recorded from vLLM on
an H200. ``*.csv``: one published case a line with figures only, as recorded on a T4. Both are described in
`calibrations/data/README.md`.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.errors import unknown_name
from pytest_gpulab.experiment import (
    ClosedLoop,
    Constant,
    Direct,
    Profile,
    Ramp,
    Shape,
    Workload,
)
from pytest_gpulab.figures import percentile
from pytest_gpulab.run import REQUEST_DTYPE

FIGURES = (
    "ttft_p50",
    "ttft_p95",
    "e2e_p50",
    "e2e_p95",
    "itl_p50",
    "itl_p95",
    "requests_per_s",
    "output_tokens_per_s",
)
"""Seconds, or a rate. Latencies count from the scheduled time and cover the answered requests; `itl` is a
request's mean time between tokens."""

SERVED_FIGURES = ("ttft_p50", "ttft_p95", "e2e_p50", "e2e_p95", "output_tokens_per_s")
"""The figures that decisions are about."""

_PERCENTILE_FLOOR = 20
"""A run of fewer requests has no 95th percentile."""

_EARLIEST_S = -0.01
"""A client may read its clock just before the run's start."""

_ACCELERATORS = {"NVIDIA H200": "h200"}


@dataclass(frozen=True)
class MeasuredRun:
    """One run: the question (profile, workload) and the answer (figures by name, see FIGURES)."""

    name: str
    profile: Profile
    workload: Workload
    figures: Mapping[str, float]
    open_loop: bool
    vllm: str
    kv_cache_tokens: int | None = None
    """What the server reported at start-up."""
    traced: bool = False
    """Measured with time stamps taken inside the server, which slows its host down."""
    until_s: float = math.inf
    """Answers after this time from the run's start were not counted."""
    seed: int = 0
    """Of the workload's schedule."""
    arm: str = ""
    """Equal for the repeats of one arm, which predict each other too well; empty: a run of its own."""


class BadData(ValueError):
    """A measured run that cannot be read; says file, line, field, value and what would be right."""


@dataclass(frozen=True)
class _Line:
    """Where we are, for refusals."""

    path: Path
    number: int
    row: Mapping[str, Any]

    def refuse(self, name: str, value: object, right: str) -> BadData:
        return BadData(f"{self.path}, line {self.number}: {name} must be {right}, got {value!r}")

    def number_of(self, name: str, right: str, at_least: float = 0.0) -> float:
        """A finite number of the row's field."""
        value = self.row.get(name)
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise self.refuse(name, value, right) from None
        if isinstance(value, bool) or not math.isfinite(number) or number < at_least:
            raise self.refuse(name, value, right)
        return number

    def count_of(self, name: str) -> int:
        number = self.number_of(name, "a whole number of at least 1", 1)
        if number != int(number):
            raise self.refuse(name, self.row[name], "a whole number of at least 1")
        return int(number)

    def text_of(self, name: str) -> str:
        value = self.row.get(name)
        if not isinstance(value, str) or not value:
            raise self.refuse(name, value, "a non-empty string")
        return value


def read_runs(path: Path) -> list[MeasuredRun]:
    """The runs in a file, warm-up runs left out. BadData when it does not hold what it should."""
    readers = {".jsonl.gz": _read_jsonl, ".jsonl": _read_jsonl, ".csv": _read_csv}
    for suffix, read in readers.items():
        if path.name.endswith(suffix):
            try:
                return list(read(path))
            except (OSError, EOFError, UnicodeDecodeError) as error:
                raise BadData(f"{path}: must be a readable {suffix} file, got {error}") from error
    if not path.exists():
        raise BadData(f"{path}: must be a file, or a folder of --gpulab-runs, got nothing there")
    raise BadData(f"{path}: must be named {', '.join(readers)}, got {path.name!r}")


def table_figures(table: NDArray[Any]) -> dict[str, float]:
    """FIGURES of a request table (REQUEST_DTYPE) over its answered requests."""
    table = table[table["ok"]]
    ttft = table["first_token"] - table["scheduled"]
    e2e = table["last_token"] - table["scheduled"]
    figures = {"ttft_p50": percentile(ttft, 50), "e2e_p50": percentile(e2e, 50)}
    if len(table) >= _PERCENTILE_FLOOR:
        figures |= {"ttft_p95": percentile(ttft, 95), "e2e_p95": percentile(e2e, 95)}
    gaps = table["output_tokens"] - 1
    if gaps.min() > 0:
        itl = (table["last_token"] - table["first_token"]) / gaps
        figures |= {"itl_p50": percentile(itl, 50), "itl_p95": percentile(itl, 95)}
    wall = float(table["last_token"].max() - table["scheduled"].min())
    figures["requests_per_s"] = len(table) / wall
    figures["output_tokens_per_s"] = float(table["output_tokens"].sum()) / wall
    return figures


# --- runs with every request --------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[MeasuredRun]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, 1):
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise BadData(f"{path}, line {number}: must be one JSON object, got {error}") from error
            if not isinstance(row, dict):
                raise BadData(f"{path}, line {number}: must be one JSON object, got {type(row).__name__}")
            line = _Line(path, number, row)
            # `warm` pays compilation; runs with `sizes` inject prompts beside decoders that are cut off.
            if not line.text_of("run").endswith("/warm") and "sizes" not in row:
                yield _run_of(line)


def _run_of(line: _Line) -> MeasuredRun:
    row = line.row
    gpu = line.text_of("gpu")
    if gpu not in _ACCELERATORS:
        raise line.refuse("gpu", gpu, f"a known one ({', '.join(_ACCELERATORS)})")
    profile = Profile(model=line.text_of("model"), accelerator=_ACCELERATORS[gpu], engine_args=_engine_args(line))
    open_loop = row.get("arrival") is not None
    table = _request_table(line, open_loop)
    figures = table_figures(table)
    if line.row.get("n_out") == 2:
        # The second token often arrives together with the first: only the end of the request means something.
        figures = {name: value for name, value in figures.items() if name.startswith(("ttft", "e2e"))}
    return MeasuredRun(
        name=line.text_of("run"),
        profile=profile,
        workload=_workload(line, table, open_loop),
        figures=figures,
        open_loop=open_loop,
        vllm=line.text_of("vllm"),
        kv_cache_tokens=line.count_of("kv_cache_tokens"),
        traced=row.get("traced", False) is True,
    )


def _engine_args(line: _Line) -> dict[str, Any]:
    """vLLM's flags as engine arguments: --max-num-seqs 16 -> max_num_seqs=16."""
    flags = line.row.get("server_flags")
    if not isinstance(flags, list) or len(flags) % 2 or not all(isinstance(flag, str) for flag in flags):
        raise line.refuse("server_flags", flags, "a list of strings, --flag and value in turn")
    return {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)
    }


def _request_table(line: _Line, open_loop: bool) -> NDArray[Any]:
    """REQUEST_DTYPE rows of the answered requests, in order of their scheduled times; closed loops are due when
    they are sent."""
    requests = line.row.get("requests")
    if not isinstance(requests, list) or not requests:
        raise line.refuse("requests", requests, "a list of at least one request")
    rows = []
    for index, request in enumerate(requests):
        if not isinstance(request, dict):
            raise line.refuse(f"requests[{index}]", request, "an object")
        if request.get("err") is not None:
            continue
        one = _Line(line.path, line.number, {f"requests[{index}].{k}": v for k, v in request.items()})
        seconds = {
            name: one.number_of(f"requests[{index}].{name}", "seconds from the run's start", _EARLIEST_S)
            for name in ("sched", "sent", "first", "last")
        }
        tokens = [one.count_of(f"requests[{index}].{name}") for name in ("inp", "out")]
        if not seconds["sent"] <= seconds["first"] <= seconds["last"]:
            raise line.refuse(f"requests[{index}]", seconds, "in order: sent, first, last")
        due = max(0.0, seconds["sched"] if open_loop else seconds["sent"])
        rows.append((due, seconds["sent"], seconds["first"], seconds["last"], *tokens, True))
    if not rows:
        raise line.refuse("requests", f"{len(requests)} failed ones", "answered at least once")
    return np.sort(np.array(rows, dtype=REQUEST_DTYPE), order="scheduled")


def _workload(line: _Line, table: NDArray[Any], open_loop: bool) -> Workload:
    if not open_loop:
        users = line.count_of("concurrency")
        if users < len(table):
            shape = Shape(prompt_tokens=line.count_of("n_in"), output_tokens=line.count_of("n_out"))
            return Workload(arrivals=ClosedLoop(concurrency=users), shape=shape, requests=len(table))
    return Workload.from_trace(table[["scheduled", "prompt_tokens", "output_tokens"]].tolist())


# --- published cases with figures only ----------------------------------------------------------------

_CSV_FIGURES = {
    "ttft_p50_s": "ttft_p50",
    "ttft_p95_s": "ttft_p95",
    "p50_e2e_s": "e2e_p50",
    "p95_e2e_s": "e2e_p95",
    "itl_p50_s": "itl_p50",
    "itl_p95_s": "itl_p95",
    "req_s": "requests_per_s",
    "output_tok_s": "output_tokens_per_s",
}

_CASE_S = 300.0
"""How long a published case kept its rate."""

_COUNTED_S = 375.0
"""When a constant-rate case ended for the client: the overloaded ones delivered 207 and 201 of 300 requests, and that
divided by their delivered rate is 375 s."""

_VIRTUAL_USERS = 64
"""The client of the ramp cases dropped a request that was due while it had 64 unanswered ones: in the rows that
delivered less than all, delivered rate x p95 latency is 64. The overloaded constant-rate cases had up to 135
unanswered, so their client had no such limit."""


def _read_csv(path: Path) -> Iterator[MeasuredRun]:
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = {"case", "arrival", *_CSV_FIGURES} - set(reader.fieldnames or ())
        if missing:
            raise BadData(f"{path}, line 1: must name the columns {', '.join(sorted(missing))} too")
        for row in reader:
            yield _case_of(_Line(path, reader.line_num, row))


def _case_of(line: _Line) -> MeasuredRun:
    case = line.text_of("case")
    batched = line.count_of("max_num_batched_tokens")
    args = {
        "max_num_seqs": line.count_of("max_num_seqs"),
        "max_num_batched_tokens": batched,
        "max_model_len": max(batched, 4096),
        "kv_cache_dtype": "fp8" if "fp8 KV" in case else "auto",
    }
    figures = {
        name: line.number_of(column, "seconds or a rate above 0, or empty", 1e-9)
        for column, name in _CSV_FIGURES.items()
        if line.row[column]
    }
    if not figures:
        raise line.refuse("figures", "none", "given in at least one column")
    workload = _case_workload(line)
    delivered = line.number_of("delivery_ratio", "a share of 1, or empty") if line.row["delivery_ratio"] else 1.0
    if delivered == 1:
        # Their wall time includes waiting for nothing, and the offered rate decides anyway.
        figures.pop("requests_per_s", None)
        figures.pop("output_tokens_per_s", None)
    elif isinstance(workload.arrivals, Ramp):
        # Half of the answers that fast, but the server 60 s behind? It is what the server alone took.
        figures.pop("e2e_p50", None)
    return MeasuredRun(
        name=f"{line.text_of('study')}/{case}",
        profile=Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args=args),
        workload=workload,
        figures=figures,
        open_loop=not isinstance(workload.arrivals, ClosedLoop),
        vllm="0.9.0",
        until_s=_COUNTED_S if isinstance(workload.arrivals, Constant) else math.inf,
    )


def _case_workload(line: _Line) -> Workload:
    shape = Shape(prompt_tokens=line.count_of("prompt_tokens"), output_tokens=line.count_of("output_tokens"))
    arrival = line.text_of("arrival")
    if arrival.startswith("closed loop of "):
        users = int(arrival.removeprefix("closed loop of "))
        return Workload(arrivals=ClosedLoop(concurrency=users), shape=shape, requests=4 * users)
    rate = line.number_of("rate_req_s", "requests per second above 0", 1e-9)
    if arrival == "constant":
        return Workload(arrivals=Constant(rate=rate), shape=shape, duration_s=_CASE_S)
    if arrival.startswith("ramp 2-8 over 30 s"):
        arrivals = Ramp(start_rate=2, rate=rate, ramp_s=30)
        client = Direct(max_outstanding=_VIRTUAL_USERS)
        return Workload(arrivals=arrivals, shape=shape, duration_s=30 + _CASE_S, admission=client)
    raise line.refuse("arrival", arrival, "'constant', 'closed loop of N' or 'ramp 2-8 over 30 s ...'")


def of_calibration(runs: Iterable[MeasuredRun], name: str) -> list[MeasuredRun]:
    """The runs that the calibration called ACCELERATOR-MODEL is fitted from; ValueError lists the names there are."""
    names = [f"{run.profile.accelerator}-{run.profile.model}" for run in runs]
    if name not in names:
        raise ValueError(unknown_name("calibration in the data", name, set(names)))
    return [run for run, known in zip(runs, names, strict=True) if known == name]
