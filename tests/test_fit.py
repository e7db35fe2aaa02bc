"""Fitting calibrations: finds what generated the runs, tells its error honestly, refuses what is not data."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pytest_gpulab.cli import main
from pytest_gpulab.engine import simulate
from pytest_gpulab.engine.calibration import (
    Calibration,
    calibration_names,
    find_variant,
    load_calibration,
    variant_name,
)
from pytest_gpulab.engine.fit import (
    TERMS,
    Case,
    fit_calibration,
    fit_vector,
    leave_one_out,
    start,
    variant_of,
    vector_of,
)
from pytest_gpulab.engine.measured import BadData, MeasuredRun, of_calibration, read_runs
from pytest_gpulab.experiment import ClosedLoop, EngineArgs, Poisson, Profile, Shape, Workload
from pytest_gpulab.run_store import Question, RunStore, runs_to_fit

DATA = Path(__file__).parent.parent / "pytest_gpulab" / "engine" / "calibrations" / "data"
RECORDS = Path(__file__).parent.parent / "reports" / "records"
NAMES = [f"{part}.{name}" for part, name in TERMS]
LLAMA = Profile(model="llama-3.1-8b", accelerator="h200")
SHORT = Shape(prompt_tokens=512, output_tokens=16)


# --- finds what generated the runs --------------------------------------------------------------------


def one_request(c: dict[str, float], prompt: int, output: int) -> tuple[float, float]:
    """TTFT and E2E in seconds of a lone request, written down apart from the engine.

    Two steps are in flight: the CPU launches step k + 1 before it waits for step k.
    """
    cpu = c["front_end.per_request_s"]
    cpu += (c["front_end.per_prompt_token_s"] + c["front_end.prompt_token_latency_s"]) * prompt
    gpu_end, returned, ends = 0.0, [], []
    for step in range(output):
        if step == 0:
            gpu = max(c["gpu.step_s"], c["gpu.per_token_s"] * prompt)
            gpu += c["gpu.per_attended_token_s"] * prompt * prompt / 2
            launch = c["cpu.launch_small_s"] if prompt <= 512 else c["cpu.launch_large_s"]
            ready = cpu + c["cpu.step_s"] + c["cpu.per_prefill_s"]
        else:
            gpu = max(c["gpu.step_s"], c["gpu.per_token_s"]) + c["gpu.per_decode_s"]
            gpu += c["gpu.per_context_token_s"] * (prompt + step)
            launch = 0.0
            ready = cpu + c["cpu.step_s"] + c["cpu.per_sequence_s"]
        gpu_end = max(max(ready, gpu_end) + gpu, ready + launch)
        cpu = ready + launch
        ends.append(gpu_end)
        if step:
            cpu = max(cpu, ends[step - 1])
            returned.append(cpu)
    returned.append(max(cpu, ends[-1]))
    late = c["front_end.per_output_token_s"] + c["front_end.per_chunk_s"] + c["front_end.latency_s"]
    return returned[0] + late, returned[-1] + late


def lone_run(c: dict[str, float], prompt: int, output: int, factor: float = 1.0) -> MeasuredRun:
    ttft, e2e = one_request(c, prompt, output)
    return MeasuredRun(
        name=f"{prompt}-{output}",
        profile=LLAMA,
        workload=Workload.from_trace([(0.0, prompt, output)]),
        figures={"ttft_p50": ttft * factor, "e2e_p50": e2e * factor},
        open_loop=False,
        vllm="0.25.1",
    )


SHAPES = [
    (64, 200),
    (512, 50),
    (2048, 2),
    (2048, 200),
    (4096, 20),
    (8000, 2),
    (8000, 100),
    (30000, 200),
    (60000, 50),
    (60000, 200),
    (120000, 100),
]
TRUTH = dict(zip(NAMES, start("llama-3.1-8b", "h200").tolist(), strict=False)) | {
    "gpu.step_s": 6.1e-3,
    "gpu.per_token_s": 2.9e-5,
    "gpu.per_context_token_s": 5e-8,
    "gpu.per_attended_token_s": 1.3e-9,
}


def test_finds_the_coefficients_that_generated_the_runs():
    cases = [Case.of(lone_run(TRUTH, *shape)) for shape in SHAPES]
    vector = fit_vector(cases, start("llama-3.1-8b", "h200"))
    for case in cases:
        assert np.abs(case.errors(variant_of(vector))).max() < 0.02, case.run.name
    found = dict(zip(NAMES, vector.tolist(), strict=False))
    for name in ("gpu.step_s", "gpu.per_token_s", "gpu.per_attended_token_s"):
        assert found[name] == pytest.approx(TRUTH[name], rel=0.03), name
    # The starting value pulls at a term that makes up little of the figures.
    assert found["gpu.per_context_token_s"] == pytest.approx(TRUTH["gpu.per_context_token_s"], rel=0.15)


def test_the_engine_takes_as_long_as_the_costs_say():
    truth = variant_of(np.array([*(TRUTH[name] for name in NAMES), 1.0]))
    for shape in SHAPES:
        assert np.abs(Case.of(lone_run(TRUTH, *shape)).errors(truth)).max() < 1e-9


def test_runs_that_say_nothing_about_a_term_leave_it_where_it_starts():
    prior = start("llama-3.1-8b", "h200")
    found = fit_vector([Case.of(lone_run(TRUTH, 64, 200))], prior)
    unseen = NAMES.index("cpu.launch_large_s")
    assert found[unseen] == pytest.approx(prior[unseen])


@pytest.mark.slow
def test_the_left_out_run_has_no_say_in_its_own_prediction():
    prior = start("llama-3.1-8b", "h200")
    kept = [lone_run(TRUTH, *shape) for shape in SHAPES[:3]]
    first, other = lone_run(TRUTH, *SHAPES[3]), lone_run(TRUTH, *SHAPES[3], factor=3.0)
    predictions = []
    for run in (first, other):
        *_, left_out = leave_one_out([Case.of(one) for one in [*kept, run]], prior)
        predictions.append([run.figures[name] * (1 + error) for name, error in left_out.errors.items()])
    assert predictions[0] == pytest.approx(predictions[1])


@pytest.mark.slow
def test_repeats_of_an_arm_have_no_say_in_each_others_prediction():
    """Otherwise six repeats of one arm would tell each other what to expect."""
    prior = start("llama-3.1-8b", "h200")
    kept = [lone_run(TRUTH, *shape) for shape in SHAPES[:3]]
    repeats = [replace(lone_run(TRUTH, *SHAPES[3], factor=factor), arm="a") for factor in (3.0, 3.1)]
    *_, first, second = leave_one_out([Case.of(one) for one in [*kept, *repeats]], prior)
    (alone,) = leave_one_out([Case.of(one) for one in [*kept, repeats[0]]], prior)[3:]
    assert first.errors == pytest.approx(alone.errors)
    assert second.errors != first.errors


def test_the_error_of_a_run_is_that_of_the_fit_without_it():
    prior = start("llama-3.1-8b", "h200")
    cases = [Case.of(lone_run(TRUTH, *shape)) for shape in SHAPES[:3]]
    alone = fit_vector(cases[1:], prior)
    assert list(leave_one_out(cases, prior)[0].errors.values()) == pytest.approx(
        list(cases[0].errors(variant_of(alone)))
    )


def test_the_error_of_the_only_arm_is_that_of_where_the_fit_starts():
    prior = start("llama-3.1-8b", "h200")
    case = Case.of(lone_run(TRUTH, *SHAPES[0]))
    (alone,) = leave_one_out([case], prior)
    assert list(alone.errors.values()) == pytest.approx(list(case.errors(variant_of(prior))))


def test_a_calibration_needs_base_runs():
    run = lone_run(TRUTH, 64, 2)
    fp8 = replace(run, profile=LLAMA.with_engine_args(kv_cache_dtype="fp8"))
    with pytest.raises(ValueError, match="needs runs of the base format, got only fp8-kv"):
        fit_calibration([fp8], source="test")


def test_an_unseen_effect_of_a_number_format_is_that_on_the_other_accelerator():
    """One short FP8 prompt says nothing about long contexts; an H200 was asked about them."""
    like = load_calibration("h200-llama-3.1-8b")
    base = [on_h100(lone_run(TRUTH, *shape)) for shape in SHAPES]
    fp8 = on_h100(lone_run(TRUTH, 64, 2), kv_cache_dtype="fp8")
    made = fit_calibration([*base, fp8], source="test", like=like, check=False).calibration.variants
    for term in ("per_context_token_s", "per_context_token_mixed_s"):
        there = getattr(like.variants["fp8-kv"].gpu, term) / getattr(like.variants["base"].gpu, term)
        assert getattr(made["fp8-kv"].gpu, term) / getattr(made["base"].gpu, term) == pytest.approx(there, rel=0.01)
        assert "as in h200-llama-3.1-8b" in made["fp8-kv"].assumed[f"gpu.{term}"]


def on_h100(run: MeasuredRun, **engine_args: object) -> MeasuredRun:
    profile = Profile(model="llama-3.1-8b", accelerator="h100", engine_args=run.profile.engine_args)
    return replace(run, profile=profile.with_engine_args(**engine_args))


# --- the committed calibrations -----------------------------------------------------------------------


def data_of(name: str) -> list[MeasuredRun]:
    """The committed runs of an accelerator."""
    if name.startswith("h100"):
        return runs_to_fit(RECORDS / "vllm-h100-runs", "h100-llama-3.1-8b")
    files = sorted(DATA.glob("*.csv" if name.startswith("t4") else "*.jsonl.gz"))
    return [run for path in files for run in read_runs(path)]


@pytest.mark.slow
@pytest.mark.parametrize("name", calibration_names())
def test_committed_calibrations_predict_what_a_fit_of_the_committed_data_does(name):
    """Processors round differently, and where runs hardly tell terms apart the search may stop at others of them: the
    coefficients differ then (by half, once), what they predict does not."""
    committed = load_calibration(name)
    runs = of_calibration(data_of(name), name)
    like = load_calibration(committed.like) if committed.like else None
    made = fit_calibration(runs, source=committed.source, like=like, check=False).calibration
    assert (made.name, made.vllm, made.reserved_bytes) == (name, committed.vllm, committed.reserved_bytes)
    assert made.variants.keys() == committed.variants.keys()
    for variant in made.variants:
        cases = [Case.of(run) for run in runs if variant_name(run.profile) == variant and not short_of_blocks(run)]
        ratios = [case.predict(made.variants[variant]) / case.predict(committed.variants[variant]) for case in cases]
        apart = np.abs(np.concatenate(ratios) - 1)
        assert np.median(apart) <= 0.02, variant
        assert np.quantile(apart, 0.9) <= 0.05, variant


def short_of_blocks(run: MeasuredRun) -> bool:
    """Those runs are not fitted."""
    return run.profile.engine_args.num_gpu_blocks_override is not None


@pytest.mark.parametrize("name", calibration_names())
def test_committed_calibrations_say_how_far_they_are_off(name):
    calibration = load_calibration(name)
    assert calibration.source
    for variant in calibration.variants.values():
        assert variant.runs >= 1
        assert variant.leave_one_out
        assert 0 < variant.relative_error < 1
        assert (vector_of(variant) >= 0).all()


def test_an_unknown_calibration_lists_those_that_exist():
    with pytest.raises(
        ValueError, match=r"no calibration 'h300'; there are: h100-llama-3\.1-8b, h200-llama-3\.1-8b, h200-q"
    ):
        load_calibration("h300")


def test_a_calibration_of_another_accelerator_is_refused():
    profile = Profile(model="qwen2.5-0.5b", accelerator="t4")
    with pytest.raises(ValueError, match=r"is of qwen2\.5-0\.5b on h200, the profile is qwen2\.5-0\.5b on t4"):
        find_variant(profile, "h200-qwen2.5-0.5b")


def test_a_missing_number_format_is_refused():
    profile = Profile(model="qwen2.5-0.5b", accelerator="h200", engine_args=EngineArgs(quantization="fp8"))
    with pytest.raises(ValueError, match="has no number format 'fp8-weights', only base; measure all of them on"):
        find_variant(profile)


# --- reading ------------------------------------------------------------------------------------------

REQUEST = {"sched": 0.0, "sent": 0.1, "first": 0.2, "last": 0.3, "inp": 8, "out": 4, "err": None}
ROW = {
    "run": "a/b",
    "gpu": "NVIDIA H200",
    "model": "llama-3.1-8b",
    "n_in": 8,
    "n_out": 4,
    "arrival": None,
    "concurrency": 1,
    "server_flags": ["--max-num-seqs", "16", "--max-model-len", "1600"],
    "kv_cache_tokens": 1600,
    "vllm": "0.25.1",
    "requests": [REQUEST],
}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_a_run(tmp_path):
    (run,) = read_runs(jsonl(tmp_path / "a.jsonl", ROW, ROW | {"run": "a/warm"}))
    assert run.profile.engine_args.max_num_seqs == 16
    assert run.figures["ttft_p50"] == pytest.approx(0.1)
    assert run.figures["e2e_p50"] == pytest.approx(0.2)
    assert not run.open_loop


def test_an_open_loop_counts_from_the_scheduled_time(tmp_path):
    (run,) = read_runs(jsonl(tmp_path / "a.jsonl", ROW | {"arrival": "poisson"}))
    assert run.figures["ttft_p50"] == pytest.approx(0.2)
    assert run.open_loop


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA A10"}, r"line 2: gpu must be a known one \(NVIDIA H200\), got 'NVIDIA A10'"),
        ({"run": 7}, "line 2: run must be a non-empty string, got 7"),
        (
            {"concurrency": 0, "requests": [REQUEST, REQUEST]},
            "line 2: concurrency must be a whole number of at least 1, got 0",
        ),
        ({"kv_cache_tokens": 1.5}, "line 2: kv_cache_tokens must be a whole number"),
        ({"server_flags": ["--max-num-seqs"]}, "line 2: server_flags must be a list of strings, --flag and value"),
        ({"requests": []}, "line 2: requests must be a list of at least one request"),
        ({"requests": [REQUEST | {"err": "lost"}]}, "line 2: requests must be answered at least once"),
        ({"requests": [REQUEST | {"first": "soon"}]}, r"line 2: requests\[0\]\.first must be seconds .*, got 'soon'"),
        ({"requests": [REQUEST | {"last": 0.0}]}, r"line 2: requests\[0\] must be in order: sent, first, last"),
        ({"requests": [REQUEST | {"out": None}]}, r"line 2: requests\[0\]\.out must be a whole number"),
    ],
)
def test_malformed_runs_are_refused(tmp_path, change, words):
    path = jsonl(tmp_path / "a.jsonl", ROW, ROW | change)
    with pytest.raises(BadData, match=words) as refusal:
        read_runs(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"{}\n", "line 1: run must be"),
        ("a.jsonl", b"[]\n", "line 1: must be one JSON object, got list"),
        ("a.jsonl", b'{"run"\n', "line 1: must be one JSON object, got Expecting"),
        ("a.jsonl.gz", b"plain", "must be a readable .jsonl.gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:20], "must be a readable .jsonl.gz file"),
        ("a.txt", b"", r"must be named \.jsonl\.gz, \.jsonl, \.csv"),
        ("a.csv", b"case\nx\n", "line 1: must name the columns arrival, itl_p50_s"),
    ],
)
def test_files_that_are_no_data_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=words):
        read_runs(tmp_path / name)


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadData, match="must be a file, or a folder of --gpulab-runs, got nothing there"):
        read_runs(tmp_path / "runs")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("max_num_seqs", "many", "line 2: max_num_seqs must be a whole number of at least 1, got 'many'"),
        ("p95_e2e_s", "-1", "line 2: p95_e2e_s must be seconds or a rate above 0, or empty, got '-1'"),
        ("arrival", "gusts", "line 2: arrival must be 'constant'"),
        ("rate_req_s", "", "line 2: rate_req_s must be requests per second above 0, got ''"),
    ],
)
def test_malformed_cases_are_refused(tmp_path, column, value, words):
    head, first = (DATA / "t4-vllm-0.9.csv").read_text().splitlines()[:2]
    cells = dict(zip(head.split(","), first.split(","), strict=True)) | {column: value}
    (tmp_path / "a.csv").write_text(f"{head}\n{','.join(cells.values())}\n")
    with pytest.raises(BadData, match=words):
        read_runs(tmp_path / "a.csv")


# --- the command --------------------------------------------------------------------------------------


def test_the_command_writes_a_calibration(tmp_path, capsys):
    rows = [ROW | {"requests": [REQUEST | {"last": 0.3 + step}]} for step in (0.0, 0.1)]
    output = tmp_path / "h200-llama-3.1-8b.json"
    assert main(["fit", str(jsonl(tmp_path / "a.jsonl", *rows)), "-o", str(output)]) == 0
    written = json.loads(output.read_text())
    assert (written["name"], written["source"]) == ("h200-llama-3.1-8b", "a.jsonl")
    assert written["variants"]["base"]["runs"] == 2
    assert "each run predicted by a fit without it" in capsys.readouterr().out


def test_the_command_reads_what_a_campaign_has_kept(tmp_path, capsys):
    """Runs as a measuring target stores them; simulated here, so the calibration they came from is known."""
    store = RunStore(tmp_path / "runs")
    closed = Workload(
        arrivals=ClosedLoop(concurrency=4), shape=Shape(prompt_tokens=2048, output_tokens=20), requests=8
    )
    for seed, workload in ((0, closed), (5, Workload(arrivals=Poisson(rate=4.0), shape=SHORT, requests=30))):
        run = simulate(LLAMA, workload, seed=seed)
        measured = replace(run.provenance, basis="measured", server="vllm 0.25.1, NVIDIA H200", relative_error=0.0)
        store.save(Question(workload, LLAMA, seed), replace(run, provenance=measured))
    output = tmp_path / "h200-llama-3.1-8b.json"
    assert main(["fit", str(store.folder), "-o", str(output)]) == 0
    written = Calibration.model_validate_json(output.read_text())
    assert (written.vllm, written.source, written.variants["base"].runs) == ("0.25.1", "runs", 2)
    truth, found = find_variant(LLAMA)[1].gpu, written.variants["base"].gpu
    assert found.per_token_s == pytest.approx(truth.per_token_s, rel=0.1)


def test_a_fit_may_start_from_the_same_model_on_another_accelerator(tmp_path):
    """An H100 has the H200's cores, and reads 3.35 instead of 4.8 TB/s. One short run says little about the rest."""
    there = find_variant(LLAMA)[1]
    run = replace(lone_run(TRUTH, 64, 50), profile=Profile(model="llama-3.1-8b", accelerator="h100"))
    report = fit_calibration([run], source="a run", like=load_calibration("h200-llama-3.1-8b"), check=False)
    made = report.calibration.variants["base"]
    assert report.calibration.like == "h200-llama-3.1-8b"
    assert made.gpu.per_context_token_mixed_s == pytest.approx(there.gpu.per_context_token_mixed_s * 4.8 / 3.35)
    assert made.gpu.per_attended_token_s == pytest.approx(there.gpu.per_attended_token_s, rel=1e-3)
    assert made.cpu.launch_large_s == pytest.approx(there.cpu.launch_large_s)
    assert made.assumed["cpu.launch_large_s"] == "h200-llama-3.1-8b, scaled by the data sheets"


def test_a_folder_without_measured_runs_is_refused(tmp_path, capsys):
    assert main(["fit", str(tmp_path), "-o", str(tmp_path / "h200-llama-3.1-8b.json")]) == 2
    assert "must hold measured runs that are valid evidence, it has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ("h201-llama-3.1-8b", "no calibration 'h201-llama-3.1-8b'; there are: "),
        (
            "t4-qwen2.5-0.5b",
            "the calibration to start from must be of llama-3.1-8b, t4-qwen2.5-0.5b is of",
        ),
    ],
)
def test_the_command_refuses_to_start_from_another_model(tmp_path, capsys, like, words):
    output = str(tmp_path / "h200-llama-3.1-8b.json")
    assert main(["fit", str(jsonl(tmp_path / "a.jsonl", ROW)), "-o", output, "--like", like]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("h200-qwen2.5-0.5b.json", "unknown calibration in the data 'h200-qwen2.5-0.5b'"),
        ("h200-llama-3.1-8b.txt", "the output must be named ACCELERATOR-MODEL.json"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, output, words):
    assert main(["fit", str(jsonl(tmp_path / "a.jsonl", ROW)), "-o", str(tmp_path / output)]) == 2
    assert words in capsys.readouterr().err


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'pytest-gpulab\[fit\]'"):
        fit_vector([Case.of(lone_run(TRUTH, 64, 2))], np.ones(len(TERMS) + 1))
