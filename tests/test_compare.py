"""The simulator's prediction beside measured figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulab.cli import main
from pytest_gpulab.compare import predictions
from pytest_gpulab.engine import simulate
from pytest_gpulab.experiment import Poisson, Profile, Shape, Workload
from pytest_gpulab.measurement import summarize
from pytest_gpulab.record import Evidence, Record, SessionInfo
from pytest_gpulab.run import Basis, Run
from tests.known import known_lab

WORKLOAD = Workload(arrivals=Poisson(rate=2.0), shape=Shape(prompt_tokens=256, output_tokens=32), duration_s=80)
PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4")
UNKNOWN = Profile(model="llama-3.1-8b", accelerator="b200")


def twice_as_slow(profile: Profile, seed: int, basis: Basis = "measured") -> Run:
    """As the simulator says for a T4, every latency doubled, one request in ten lost."""
    run = simulate(PROFILE, WORKLOAD, seed=seed)
    table = run.requests.copy()
    for moment in ("first_token", "last_token"):
        table[moment] = table["scheduled"] + 2 * (table[moment] - table["scheduled"])
    table["ok"][::10] = False
    return replace(run, requests=table, provenance=replace(run.provenance, basis=basis, target="vllm"))


def record_of(profile: Profile, basis: Basis = "measured", repeats: int = 6) -> Record:
    lab = known_lab(lambda profile, seed: twice_as_slow(profile, seed, basis), basis=basis)
    arm = lab.measure(WORKLOAD, profile, label="the arm")
    lab.pull([arm], repeats)
    evidence = Evidence(
        nodeid="n", statement="", verdict=None, basis=basis, reason="", gates=(), runs=(summarize(arm),)
    )
    session = SessionInfo(started="", seconds=0, first_seed=0, max_repeats=12, require="simulated", narrowed="")
    return Record(
        target="vllm", accelerator="t4", session=session, decisions=(), evidence=(evidence,), errors=(), missing=()
    )


def row(table: str, figure: str) -> list[str]:
    return next(line for line in table.splitlines() if f"| {figure} |" in line).strip("| ").split(" | ")


def test_half_the_latency_is_predicted() -> None:
    table = predictions(record_of(PROFILE))
    arm, _, measured, predicted, error = row(table, "p50 ttft")
    assert arm == "the arm"
    assert error == "-50%"
    assert float(measured.split()[0]) == pytest.approx(2 * float(predicted.split()[0]), rel=0.01)
    assert row(table, "delivery ratio")[-1].startswith("+10.")
    assert "Without a prediction" not in table


def test_what_has_no_calibration_is_listed() -> None:
    table = predictions(record_of(UNKNOWN))
    assert "| the arm |" not in table
    assert "- the arm: no calibration 'b200-llama-3.1-8b'" in table


def test_simulated_arms_are_no_measurements() -> None:
    assert "the arm" not in predictions(record_of(PROFILE, basis="simulated"))


def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decision-record.json"
    path.write_text(record_of(PROFILE).to_json())
    assert main(["compare", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| arm | figure | measured | predicted | error |\n")
    assert main(["compare", str(path), "-o", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text() == printed
