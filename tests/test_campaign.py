"""What a session will measure is said before it starts."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_gpulab.campaign import arrivals_s, estimate_s, forecast, time_text
from pytest_gpulab.experiment import ClosedLoop, Constant, Profile, Shape, Workload
from pytest_gpulab.fleet import Fleet
from pytest_gpulab.report.telling import teller
from pytest_gpulab.run_store import Question, RunStore
from tests.conftest import Project
from tests.known import known_run

SHAPE = Shape(prompt_tokens=512, output_tokens=128)

STUDY = """
import pytest
from pytest_gpulab import Fleet, Poisson, Profile, Shape, Workload

SERVED = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})
TRAFFIC = Workload(arrivals=Poisson(rate=8), shape=Shape(prompt_tokens=512, output_tokens=128), duration_s=20)

@pytest.mark.decision("limit", "One request at a time is slower")
def test_limit(measure):
    free, one = measure(TRAFFIC, SERVED), measure(TRAFFIC, SERVED.with_engine_args(max_num_seqs=1))
    assert free.p95 <= 0.5 * one.p95

@pytest.mark.decision("other", "What another machine may answer")
def test_other(measure):
    small = Workload(arrivals=Poisson(rate=4), shape=Shape(prompt_tokens=128, output_tokens=16), duration_s=20)
    assert measure(small, Profile(model="llama-3.1-8b", accelerator="h200")).delivery_ratio >= 0.999

@pytest.mark.decision("fleet", "What no single server can answer")
def test_fleet(measure):
    assert measure(TRAFFIC, SERVED.on(Fleet())).p95 <= 1
"""
GATE = "assert served(1).p50 <= 2.0"
SERVED = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})
TRAFFIC = Workload.model_validate(
    {"arrivals": {"kind": "poisson", "rate": 8}, "shape": SHAPE.model_dump(), "duration_s": 20}
)


@pytest.mark.parametrize(
    ("workload", "seconds"),
    [
        (Workload(arrivals=Constant(rate=2.0), shape=SHAPE, duration_s=30), 30),
        (Workload(arrivals=Constant(rate=2.0), shape=SHAPE, requests=30), 15),
        (Workload.from_trace([(0.0, 5, 5), (12.5, 5, 5)]), 12.5),
        (Workload(arrivals=ClosedLoop(concurrency=4), shape=SHAPE, requests=40), 50),
    ],
)
def test_arrivals_take_their_time(workload: Workload, seconds: float) -> None:
    assert arrivals_s(workload) == seconds


def test_every_change_of_profile_starts_a_server() -> None:
    one, other = Question(TRAFFIC, SERVED, 0), Question(TRAFFIC, SERVED.with_engine_args(max_num_seqs=1), 0)
    assert estimate_s([one, one, other, one]) == 4 * 20 + 3 * 95
    assert estimate_s([]) == 0


def test_every_run_of_a_fleet_deploys_it() -> None:
    cold, warm = (Question(TRAFFIC, SERVED.on(Fleet(warm=warm)), 0) for warm in (0, 1))
    assert estimate_s([cold, cold]) == 2 * (20 + 60)
    assert estimate_s([warm, warm]) == 2 * (432 + 20 + 60)


@pytest.mark.parametrize(("seconds", "text"), [(45.2, "45 s"), (3000, "50 min"), (12_000, "3 h 20 min")])
def test_times_read_well(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.slow
def test_a_session_is_played_through_first(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms of six repeats of 20 s, three server starts; with two of the runs stored there are ten left.

    Nobody measures here what is for another machine, nor a fleet.
    """
    pytester.makepyfile(test_study=STUDY)
    config = pytester.parseconfigure(
        "--gpulab-target=vllm", "--gpulab-campaign=quick", f"--rootdir={pytester.path}", str(pytester.path)
    )
    store = RunStore(Path(pytester.path, "runs"))
    target = SimpleNamespace(server=lambda p: "vllm" if p.accelerator == "t4" and p.fleet is None else "")
    assert forecast(config, store, target) == (
        "the campaign is about 9 min, if the simulator is right about what its gates need: "
        "12 runs, 0 are already measured; 12 more are of profiles that this target cannot serve"
    )
    for seed in (0, 1):
        store.save(Question(TRAFFIC, SERVED, seed), known_run(1.0, seed=seed))
    assert "10 runs, 2 are already measured; 12 more" in forecast(config, store, target)
    target.server = lambda profile: ""
    assert "nothing is known to be left to measure" in forecast(config, store, target)
    assert not Path(pytester.path, "reports").exists()


@pytest.mark.slow
def test_what_the_simulator_cannot_play_through_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has measured a B200; the machine that will may be this one."""
    pytester.makepyfile(
        """
        import pytest
        from pytest_gpulab import Poisson, Profile, Shape, Workload

        TRAFFIC = Workload(arrivals=Poisson(rate=4), shape=Shape(prompt_tokens=8, output_tokens=8), duration_s=20)

        @pytest.mark.decision("fp4", "Nobody knows")
        def test_fp4(measure):
            assert measure(TRAFFIC, Profile(model="llama-3.1-8b", accelerator="b200")).delivery_ratio >= 0.999

        def test_evidence(measure):
            assert measure(TRAFFIC, Profile(model="llama-3.1-8b", accelerator="b200")).p50 <= 1
        """
    )
    config = pytester.parseconfigure("--gpulab-target=vllm", f"--rootdir={pytester.path}", str(pytester.path))
    told = forecast(config, RunStore(Path(pytester.path, "runs")), SimpleNamespace(server=lambda profile: "vllm"))
    assert told.endswith("not counted, because the simulator cannot play it through: fp4, test_evidence")


def test_a_session_that_is_played_through_runs_no_ordinary_test(project: Project) -> None:
    project.write("def test_plain():\n    open('ran', 'w')\n\n@decision('d', 's')\ndef test_d(served):\n    " + GATE)
    project.run("--gpulab-target=plan").assert_outcomes(passed=1, deselected=1)
    assert [decision.id for decision in project.record.decisions] == ["d"]
    assert not (project.path / "ran").exists()


@pytest.mark.slow
def test_a_session_that_is_played_through_leaves_the_real_one_alone(pytester: pytest.Pytester) -> None:
    """What the real session has in its temporary folder and its reports outlasts the forecast."""
    pytester.makepyfile(test_study=STUDY + "\ndef test_plain():\n    open('ran', 'w')\n")
    written = {name: pytester.path / name for name in ("temporary/mine", "junit.xml", "log.txt")}
    (pytester.path / "temporary").mkdir()
    for path in written.values():
        path.write_text("of the real session")
    config = pytester.parseconfig(
        *("--gpulab-target=vllm", "--gpulab-campaign=quick", f"--rootdir={pytester.path}", str(pytester.path)),
        *("--basetemp=temporary", "--junitxml=junit.xml", "--log-file=log.txt"),
    )
    target = SimpleNamespace(server=lambda profile: "vllm")
    assert "24 runs" in forecast(config, RunStore(Path(pytester.path, "runs")), target)
    assert {name: path.read_text() for name, path in written.items()} == dict.fromkeys(written, "of the real session")
    assert not (pytester.path / "ran").exists()


def test_a_plan_that_fails_is_no_forecast(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_gpulab.campaign.sys.executable", "false")
    config = pytester.parseconfigure("--gpulab-target=vllm")
    assert forecast(config, RunStore(pytester.path), SimpleNamespace()).startswith("no forecast: ")


@pytest.mark.parametrize("capture", ["fd", "sys", "no"])
def test_lines_are_told_past_the_capturing(pytester: pytest.Pytester, capture: str) -> None:
    pytester.makepyfile(
        """
        from pytest_gpulab.report.telling import teller

        def test_it(pytestconfig, capfd):
            print("hidden")
            teller(pytestconfig)("starting vLLM")
            assert capfd.readouterr().out == "hidden\\n"
        """
    )
    result = pytester.runpytest_inprocess(f"--capture={capture}", "-p", "no:hypothesispytest")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpulab: starting vLLM"])


def test_a_terminal_that_is_gone_ends_nothing(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teardown goes on when the connection is lost that its lines would take."""
    lost: list[str] = []

    def write_line(line: str) -> None:
        lost.append(line)
        raise OSError(errno.EIO, "Input/output error")

    config = pytester.parseconfigure()
    monkeypatch.setattr(config.pluginmanager.get_plugin("terminalreporter"), "write_line", write_line)
    teller(config)("taking down")
    assert lost == ["gpulab: taking down"]
