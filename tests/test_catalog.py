"""The user's own models, accelerators and calibrations: found by everything that needs them, refused when wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from textwrap import dedent
from typing import Any
from urllib.request import urlopen

import pytest

from pytest_gpulab import Fleet, Poisson, Profile, Shape, Workload
from pytest_gpulab.accelerators import ACCELERATORS, GIB, find_accelerator
from pytest_gpulab.catalog import VARIABLE
from pytest_gpulab.cli import main
from pytest_gpulab.cluster.cloud import instance_types, machine_for
from pytest_gpulab.cluster.fleet import simulate_fleet
from pytest_gpulab.engine import simulate
from pytest_gpulab.engine.calibration import Calibration, calibration_names, find_variant, load_calibration
from pytest_gpulab.engine.fit import start, variant_of
from pytest_gpulab.evidence import Decided
from pytest_gpulab.experiment import ClosedLoop
from pytest_gpulab.lab import Lab
from pytest_gpulab.live.arguments import read_arguments
from pytest_gpulab.models import MODELS, find_model
from pytest_gpulab.run import Run
from pytest_gpulab.run_store import Question, RunStore
from pytest_gpulab.targets.cluster import ClusterTarget
from pytest_gpulab.targets.sim import Sim
from pytest_gpulab.vllm_args import from_argv, to_argv
from tests.conftest import QUICK

MINI = {
    "repository": "nobody/mini-1.5b",
    "parameters": 1_500_000_000,
    "layers": 16,
    "kv_heads": 8,
    "head_size": 64,
    "max_position": 8192,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "vocab_size": 32_000,
    "tied_embeddings": True,
}
A10G = {
    "memory_bytes": 23 * GIB,
    "bytes_per_s": 600e9,
    "operations_per_s": 70e12,
    "instance_type": "g5.xlarge",
    "price_usd_per_hour": 1.006,
}
SHIPPED = Profile(model="qwen2.5-0.5b", accelerator="t4")
RECORDS = Path(__file__).parent.parent / "reports" / "records"
SLOWER = 1.3
"""What the GPU takes beyond the data sheet, in truth."""
STUDY = """
import pytest
from pytest_gpulab import ClosedLoop, Profile, Shape, Workload
from conftest import OWN

FOUR = Workload(arrivals=ClosedLoop(concurrency=4), shape=Shape(prompt_tokens=128, output_tokens=32), requests=16)

@pytest.mark.decision("own", "Serve it on our own")
def test_it(measure):
    assert measure(FOUR, OWN, label="ours").delivery_ratio >= 0.999
"""


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a model and an accelerator; in use."""
    folder = tmp_path / "catalog"
    write(folder / "models" / "mini.json", MINI)
    write(folder / "accelerators" / "a10g.json", A10G)
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def truth(slower: float = SLOWER) -> Calibration:
    """The data sheet's, but slower."""
    vector = start("mini", "a10g")
    vector[:6] *= slower
    variant = variant_of(vector).model_copy(update={"relative_error": 0.02, "runs": 1})
    return Calibration(
        name="a10g-mini",
        model="mini",
        accelerator="a10g",
        vllm="0.25.1",
        source="made up",
        reserved_bytes=0,
        variants={"base": variant},
    )


@pytest.fixture
def calibrated(catalog: Path) -> Path:
    """With a calibration, too."""
    write(catalog / "calibrations" / "a10g-mini.json", truth().model_dump_json())
    return catalog


def own() -> Profile:
    return Profile(model="mini", accelerator="a10g")


CLOSED = Workload(arrivals=ClosedLoop(concurrency=4), shape=Shape(prompt_tokens=2048, output_tokens=20), requests=8)
OPEN = Workload(arrivals=Poisson(rate=4.0), shape=Shape(prompt_tokens=512, output_tokens=16), requests=30)


# --- found ------------------------------------------------------------------------------------------------------


def test_without_a_catalog_own_names_are_unknown_and_the_refusal_says_where_they_go() -> None:
    for find, name in ((find_model, "mini"), (find_accelerator, "a10g")):
        with pytest.raises(
            ValueError, match=f"unknown .* '{name}': .*known: .*; --gpulab-catalog or GPULAB_CATALOG adds your own"
        ):
            find(name)


def test_the_folder_says_what_models_and_accelerators_there_are(catalog: Path) -> None:
    assert asdict(find_model("mini")) == {"name": "mini", **MINI}
    assert asdict(find_accelerator("a10g")) == {"name": "a10g", "other_families": (), **A10G}
    assert find_model("llama-3.1-8b").layers == 32
    with pytest.raises(ValueError, match=r"known: llama-3\.1-8b, mini, qwen2\.5-0\.5b"):
        find_model("mistral")


def test_vllms_arguments_name_an_own_model(catalog: Path) -> None:
    assert from_argv(["--model", "nobody/mini-1.5b"], "a10g") == own()
    assert to_argv(own())[:2] == ["--model", "nobody/mini-1.5b"]


def test_an_own_calibration_is_what_an_own_profile_costs(calibrated: Path) -> None:
    assert find_variant(own()) == (truth(), truth().variants["base"])


def test_the_emulated_cloud_sells_the_machine_and_its_pods_serve_the_model(calibrated: Path) -> None:
    kind = machine_for("g5.xlarge", "a10g")
    assert (kind.gpus, kind.gpu_memory_mib, kind.price) == (1, 23 * 1024, 1.006)
    fleet = simulate_fleet(own().on(Fleet(warm=1)), OPEN)
    assert fleet.requests["ok"].all()
    assert fleet.provenance.server.startswith("a10g-mini (own, ")
    assert read_arguments(["--model", "nobody/mini-1.5b"], {}, "a10g").profile == own()


def test_a_machine_carries_one_accelerator(catalog: Path) -> None:
    write(catalog / "accelerators" / "t4x.json", {**A10G, "instance_type": "g4dn.xlarge"})
    assert [kind.gpu_name for kind in instance_types() if kind.name == "g4dn.xlarge"] == ["t4"]
    with pytest.raises(ValueError, match=r"g4dn\.xlarge must carry the profile's accelerator t4x, it carries t4"):
        machine_for("g4dn.xlarge", "t4x")


# --- provenance -------------------------------------------------------------------------------------------------


def served_by(folder: Path, monkeypatch: pytest.MonkeyPatch, *, slower: float, memory_bytes: int) -> str:
    """What a run says, with a catalog made anew."""
    write(folder / "models" / "mini.json", MINI)
    write(folder / "accelerators" / "a10g.json", {**A10G, "memory_bytes": memory_bytes})
    monkeypatch.setenv(VARIABLE, str(folder))
    write(folder / "calibrations" / "a10g-mini.json", truth(slower).model_dump_json())
    return simulate(own(), OPEN).provenance.server


def test_runs_tell_catalogs_of_the_same_names_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: list[tuple[float, int]] = [(1.3, 23 * GIB), (1.3, 23 * GIB), (1.4, 23 * GIB), (1.3, 22 * GIB)]
    said = [
        served_by(tmp_path / str(index), monkeypatch, slower=slower, memory_bytes=memory)
        for index, (slower, memory) in enumerate(facts)
    ]
    assert said[0] == said[1]
    assert len(set(said)) == 3
    assert all(text.startswith("a10g-mini (own, ") and text.endswith(") base") for text in said)


def test_stored_runs_of_the_emulation_are_told_apart_too(calibrated: Path, tmp_path: Path) -> None:
    target = ClusterTarget(None, tmp_path, print)  # type: ignore[arg-type]
    assert target.server(own()) == f"emulated by {simulate(own(), OPEN).provenance.server}"


def test_what_is_shipped_reads_as_before(calibrated: Path) -> None:
    profile = Profile(model="llama-3.1-8b", accelerator="h200")
    assert simulate(profile, OPEN).provenance.server == "h200-llama-3.1-8b base"


@pytest.fixture
def remeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    made = load_calibration("h200-llama-3.1-8b").model_copy(update={"vllm": "0.32.0"})
    write(tmp_path / "calibrations" / "h200-llama-3.1-8b.json", made.model_dump_json())
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return made


def test_an_own_calibration_takes_the_place_of_a_shipped_one_and_says_so(remeasured: Calibration) -> None:
    """Somebody has measured a newer vLLM."""
    profile = Profile(model="llama-3.1-8b", accelerator="h200")
    assert find_variant(profile)[0].vllm == "0.32.0"
    assert simulate(profile, OPEN).provenance.server.startswith("h200-llama-3.1-8b (own, ")


# --- refused ----------------------------------------------------------------------------------------------------


WRONG_FILES: list[tuple[str, object, str]] = [
    ("models/mini.json", {**MINI, "layers": 0}, "models/mini.json: layers: .* greater than or equal to 1, got 0"),
    ("models/mini.json", {**MINI, "layer": 16}, "models/mini.json: unknown field 'layer': did you mean 'layers'?"),
    ("models/mini.json", {"repository": "x"}, r"models/mini.json: parameters: Field required \(and 8 more\)"),
    ("models/mini.json", {**MINI, "name": "maxi"}, "name must be that of the file, 'mini', got 'maxi'"),
    ("models/mini.json", [MINI], "models/mini.json: must be a JSON object, got list"),
    ("models/mini.json", "{", "models/mini.json: must be JSON: Expecting"),
    ("models/llama-3.1-8b.json", MINI, "must have a name of its own, llama-3.1-8b is shipped; rename the file"),
    ("accelerators/t4.json", A10G, "accelerators/t4.json: must have a name of its own, t4 is shipped"),
    (
        "accelerators/a10g.json",
        {**A10G, "bytes_per_s": "fast"},
        "accelerators/a10g.json: bytes_per_s: .* valid number.*, got 'fast'",
    ),
    ("calibrations/a10g-mini.json", {}, r"calibrations/a10g-mini.json: model: Field required \(and 5 more\)"),
]


@pytest.mark.parametrize(("name", "content", "words"), WRONG_FILES)
def test_a_wrong_file_is_refused(catalog: Path, name: str, content: object, words: str) -> None:
    write(catalog / name, content)
    with pytest.raises(ValueError, match=words):
        find_model("mini"), find_accelerator("a10g"), load_calibration("a10g-mini")


def test_a_negative_cost_is_refused(calibrated: Path) -> None:
    facts = truth().model_dump()
    facts["variants"]["base"]["gpu"]["step_s"] = -0.1
    write(calibrated / "calibrations" / "a10g-mini.json", facts)
    with pytest.raises(ValueError, match=r"a10g-mini.json: variants.base.gpu.step_s: .*or equal to 0, got -0\.1"):
        find_variant(own())


def test_a_folder_that_is_no_catalog_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(
        ValueError, match=r"must be a folder with at least one of models, .* /\S+/nothing has none; set GPULAB_"
    ):
        find_model("llama-3.1-8b")


def test_commands_refuse_a_wrong_catalog(catalog: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(catalog / "models" / "mini.json", {**MINI, "layers": 0})
    assert main(["serve", "--model", "mini", "--accelerator", "a10g"]) == 2
    assert "models/mini.json: layers: " in capsys.readouterr().err


# --- runs of what only a catalog describes -----------------------------------------------------------------------


def measured(profile: Profile, server: str = "vllm 0.25.1, NVIDIA A10G") -> Run:
    """Simulated, but kept as a measuring target would."""
    run = simulate(profile, CLOSED)
    return replace(run, provenance=replace(run.provenance, basis="measured", server=server, relative_error=0.0))


@pytest.fixture
def store(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A run of an own and of a shipped model; the catalog is no longer in use."""
    store = RunStore(tmp_path / "runs")
    for profile in (own(), SHIPPED):
        store.save(Question(CLOSED, profile, 0), measured(profile))
    monkeypatch.delenv(VARIABLE)
    return store


def test_runs_of_unknown_models_do_not_stop_others(store: RunStore, tmp_path: Path) -> None:
    again = RunStore(store.folder)
    assert again.servers(Question(CLOSED, SHIPPED, 0)) == ["vllm 0.25.1, NVIDIA A10G"]
    assert list(again.unknown) == ["a10g-mini"]
    assert main(["fit", str(store.folder), "-o", str(tmp_path / "t4-qwen2.5-0.5b.json"), "--no-check"]) == 0


def test_a_fit_of_them_asks_for_their_catalog(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", str(store.folder), "-o", str(tmp_path / "a10g-mini.json"), "--no-check"]) == 2
    said = capsys.readouterr().err
    assert "is of a10g-mini and needs the catalog that it was measured with: set GPULAB_CATALOG" in said
    assert "remove it" not in said


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_wrong_catalog_is_no_fault_of_what_was_measured(
    command: str, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "nope")
    asked = {
        "fit": [str(store.folder), "-o", str(tmp_path / "t4-qwen2.5-0.5b.json"), "--no-check"],
        "compare": [str(RECORDS / "vllm-h200.json")],
    }
    assert main([command, *asked[command]]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(
        f"gpulab {command}: the catalog must be a folder .*, nope has none; set GPULAB_.*\n", said.err
    )


def test_a_comparison_says_in_a_line_what_it_does_not_know(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = (RECORDS / "vllm-h200.json").read_text(encoding="utf-8").replace('"llama-3.1-8b"', '"mini"')
    assert main(["compare", str(write(tmp_path / "own.json", record))]) == 0
    told = capsys.readouterr().out.partition("Without a prediction:")[2].strip().splitlines()
    assert told and all(re.match(r"- .+: model: unknown model 'mini'.*GPULAB_CATALOG", line) for line in told)


# --- a session --------------------------------------------------------------------------------------------------


@pytest.fixture
def project(pytester: pytest.Pytester, calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A study of the own profile, which its conftest file names; the catalog in a folder of it, not in use yet."""
    monkeypatch.delenv(VARIABLE)
    calibrated.rename(pytester.path / "facts")
    pytester.makeconftest("from pytest_gpulab import Profile\nOWN = Profile(model='mini', accelerator='a10g')\n")
    pytester.makepyfile(test_own=STUDY)
    return pytester


def record_of(project: pytest.Pytester) -> dict[str, Any]:
    return json.loads((project.path / "reports" / "decision-record.json").read_text())


def test_a_session_decides_on_what_is_in_the_catalog(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess(*QUICK, "--gpulab-catalog=facts", "--gpulab-accelerator=a10g")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpulab: *catalog facts*"])
    (decision,) = record_of(project)["decisions"]
    assert (decision["verdict"], decision["basis"]) == ("supported", "simulated")
    assert decision["runs"][0]["server"].startswith("a10g-mini (own, ")


def test_a_session_leaves_nothing_of_its_catalog(project: pytest.Pytester) -> None:
    project.runpytest_inprocess(*QUICK, "--gpulab-catalog=facts").assert_outcomes(passed=1)
    with pytest.raises(ValueError, match="unknown model 'mini'"):
        find_model("mini")


def test_a_session_refuses_a_wrong_file_before_anything_else(project: pytest.Pytester) -> None:
    write(project.path / "facts" / "models" / "mini.json", {**MINI, "layers": 0})
    result = project.runpytest_inprocess(*QUICK, "--gpulab-catalog=facts")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --gpulab-catalog: */facts/models/mini.json: layers: * got 0"])


@pytest.mark.slow
def test_workers_find_what_the_ini_file_names(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\ngpulab_catalog = facts\n")
    project.runpytest_subprocess(*QUICK, "-n", "2", timeout=120).assert_outcomes(passed=1)


@pytest.mark.slow
def test_the_forecast_finds_what_the_environment_names(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "facts")
    result = project.runpytest_subprocess(*QUICK, "--gpulab-target=vllm", timeout=120)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(
        ["gpulab: nothing is known to be left to measure*; 6 more are of profiles that this target cannot*"]
    )


@pytest.mark.slow
def test_the_embedded_cluster_serves_what_is_in_the_catalog(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a node with the own accelerator."""
    monkeypatch.setenv("XDG_STATE_HOME", str(project.path / "state"))
    conftest = project.path / "conftest.py"
    patient = (
        "from pytest_gpulab.load import headroom, reconcile\nreconcile.MOST_LAG_S = headroom._MOST_LAG_S = 60.0\n"
    )
    conftest.write_text(patient + conftest.read_text())
    options = ("--gpulab-target=cluster", "--gpulab-campaign=quick", "--gpulab-accelerator=a10g")
    result = project.runpytest_subprocess(*QUICK, "--gpulab-catalog=facts", *options, timeout=300)
    result.assert_outcomes(passed=1)
    (decision,) = record_of(project)["decisions"]
    assert (decision["verdict"], decision["basis"]) == ("supported", "emulated")
    assert decision["runs"][0]["server"].startswith("emulated by a10g-mini (own, ")


# --- the whole way ----------------------------------------------------------------------------------------------


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The URL of `gpulab serve`."""
    command = [sys.executable, "-m", "pytest_gpulab", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.mark.slow
def test_from_facts_over_measured_runs_to_decisions(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a server whose costs are known are fitted; what is found serves, and decides a session on workers."""
    folder = project.path / "facts"
    monkeypatch.setenv(VARIABLE, str(folder))
    store = RunStore(project.path / "runs")
    for seed, workload in ((0, CLOSED), (5, OPEN)):
        run = simulate(own(), workload, seed=seed)
        measured = replace(run.provenance, basis="measured", server="vllm 0.25.1, NVIDIA A10G", relative_error=0.0)
        store.save(Question(workload, own(), seed), replace(run, provenance=measured))
    fitted = folder / "calibrations" / "a10g-mini.json"
    fitted.unlink()
    assert main(["fit", str(store.folder), "-o", str(fitted), "--source", "our rack"]) == 0
    found = Calibration.model_validate_json(fitted.read_text())
    assert found.source == "our rack"
    assert found.variants["base"].gpu.per_token_s == pytest.approx(truth().variants["base"].gpu.per_token_s, rel=0.1)

    with served("--model", "mini", "--accelerator", "a10g") as url, urlopen(f"{url}/v1/models") as answer:
        assert [model["id"] for model in json.load(answer)["data"]] == ["mini"]
    monkeypatch.delenv(VARIABLE)
    project.runpytest_subprocess(*QUICK, "--gpulab-catalog=facts", "-n", "2", timeout=120).assert_outcomes(passed=1)
    (decision,) = record_of(project)["decisions"]
    assert (decision["verdict"], decision["basis"]) == ("supported", "simulated")


def test_a_calibration_that_was_never_checked_decides_nothing(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error is unknown, not none: neither alone nor as a fleet, though the same gate holds with a known error."""
    arms = [own(), own().on(Fleet(warm=1, autoscaling=None, stages="brief"))]

    def outcomes() -> list[Decided]:
        lab = Lab(Sim())
        return [(lab.measure(OPEN, arm).p50 <= 1000).decide() for arm in arms]

    assert [decided.outcome for decided in outcomes()] == ["held", "held"]
    store = RunStore(tmp_path / "runs")
    store.save(Question(CLOSED, own(), 0), measured(own()))
    fitted = copytree(calibrated, tmp_path / "fitted")
    output = str(fitted / "calibrations" / "a10g-mini.json")
    assert main(["fit", str(store.folder), "-o", output, "--no-check"]) == 0
    assert "no gate decides on it" in capsys.readouterr().out
    monkeypatch.setenv(VARIABLE, str(fitted))
    for decided in outcomes():
        assert decided.outcome == "undecided"
        assert "the calibration's error was never found; run gpulab fit without --no-check" in decided.reason


# --- the page ---------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "catalog.md").read_text(encoding="utf-8")


def shipped_rows() -> Iterator[str]:
    """The tables of the page, as they should be."""
    for model in MODELS.values():
        yield (
            f"| `{model.name}` | {model.repository} | {model.parameters / 1e9:.2f} billion | {model.layers} | "
            f"{model.max_position:,} |"
        )
    for one in ACCELERATORS.values():
        yield (
            f"| `{one.name}` | {one.memory_bytes / GIB:.1f} | {one.bytes_per_s / 1e12:.2f} | "
            f"{one.operations_per_s / 1e12:,.0f} | {one.instance_type} | {one.price_usd_per_hour:.3f} |"
        )
    for name in calibration_names():
        made = load_calibration(name)
        formats = ", ".join(f"{key} {100 * costs.relative_error:.1f} %" for key, costs in made.variants.items())
        yield f"| `{name}` | {made.vllm} | {formats} |"


def test_the_page_lists_what_is_shipped() -> None:
    assert [line for line in PAGE.splitlines() if line.startswith("| `")] == list(shipped_rows())


def test_the_files_on_the_page_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = re.findall(r"^`(\w+/[\w.-]+\.json)`:\n\n```json\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    for name, content in files:
        write(tmp_path / name, content)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert Profile(model="mistral-7b", accelerator="a10g").price == 1.006
    assert len(files) == 2


def test_the_experiments_on_the_page_run(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the simulator, where the calibration that they are for is missing: each is blocked, none is wrong."""
    test_the_files_on_the_page_are_right(tmp_path, monkeypatch)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    pytester.makepyfile(dedent("   " + example))
    pytester.runpytest_inprocess(*QUICK).assert_outcomes(skipped=8)
