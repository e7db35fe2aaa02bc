"""The record: written whole or not at all, the same every time, never replaced by a part."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulab.record import Record, schema_json
from tests.conftest import Project
from tests.test_plugin import ALL, GOOD

SCHEMA = Path(__file__).parents[1] / "reports" / "decision-record.schema.json"

TWO = """
@decision("a", "A holds")
@pytest.mark.parametrize("n", [1, 2])
def test_a(served, n):
    assert served(n).p50 <= 2.0

@decision("b", "B holds")
def test_b(served):
    assert served(3).p50 <= 2.0

@decision("c", "C holds")
def test_c(served):
    assert served(1).p50 <= 2.0
"""


def without_times(text: str) -> str:
    return re.sub(r'("started": )"[^"]*"|("seconds": )[\d.e-]+', r"\1\2", text)


# --- what is in it --------------------------------------------------------------------------------------------


def test_decision_says_what_decided_it(project: Project) -> None:
    project.write(TWO).run("--gpulab-seed=0")
    a = project.decision("a")
    assert (a.statement, a.verdict, a.basis) == ("A holds", "supported", "simulated")
    assert [item.nodeid for item in a.items] == ["test_exp.py::test_a[1]", "test_exp.py::test_a[2]"]
    assert [run.label for run in a.runs] == ["1 s", "2 s"]
    assert a.gates[0].text == "served(n).p50 <= 2.0"
    assert (a.gates[0].file, a.gates[0].line) == ("test_exp.py", 9)
    assert a.gates[0].runs == (a.runs[0].id,)
    assert a.provenance.seeds == tuple(range(6))
    assert {"python", "pytest", "pytest-gpulab", "numpy"} <= a.provenance.versions.keys()
    assert re.fullmatch("[0-9a-f]{16}", a.provenance.definition_hash)
    assert a.provenance.definition_hash != project.decision("b").provenance.definition_hash


def test_commit_and_uncommitted_changes(project: Project) -> None:
    project.write(GOOD).run()
    assert project.decision("yes").provenance.git_commit == ""
    for arguments in (
        ["init", "-q"],
        ["add", "test_exp.py", "conftest.py"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=project.path, check=True)
    (project.path / ".git" / "info" / "exclude").write_text("reports\n__pycache__\n")
    project.run()
    commit = project.decision("yes").provenance.git_commit
    assert re.fullmatch("[0-9a-f]{40}", commit)
    project.write(GOOD + "\n")
    project.run()
    assert project.decision("yes").provenance.git_commit == f"{commit}+dirty"


def test_provenance_names_the_accelerators_of_the_profiles(project: Project) -> None:
    """Not the session's, which an experiment with a profile of its own need not ask."""
    body = GOOD + "\n@decision('none', 's')\ndef test_none():\n    blocked('no capacity')\n"
    project.write(body).run("--gpulab-accelerator=h200")
    assert project.record.accelerator == "h200"
    assert project.decision("none").provenance.accelerator == "h200"
    others = {decision.provenance.accelerator for decision in project.record.decisions if decision.id != "none"}
    assert others == {"t4"}


def test_undelivered_requests_survive_json(project: Project) -> None:
    conftest = (project.path / "conftest.py").read_text()
    (project.path / "conftest.py").write_text(conftest.replace("seed=seed,", "seed=seed, delivered=20,"))
    project.write("@decision('d', 's')\ndef test_it(served):\n    assert served(1).p95 <= 2.0\n").run()
    assert project.decision().gates[0].left.value == float("inf")
    text = project.file().read_text()
    assert '"Infinity"' in text
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_schema_is_the_committed_one() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_json(), "python -m pytest_gpulab.record > " + str(SCHEMA)


def test_record_fits_the_schema(project: Project) -> None:
    project.write(ALL).run()
    schema = json.loads(schema_json())
    misfits = list(_misfits(json.loads(project.file().read_text()), schema, schema, "record"))
    assert not misfits


KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def _misfits(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str) -> Iterator[str]:
    """The part of JSON schema that pydantic writes, checked by hand."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        if all(list(_misfits(value, option, root, where)) for option in schema["anyOf"]):
            yield f"{where}: {value!r} fits none of {schema['anyOf']}"
    elif schema.get("type") in KINDS and not isinstance(value, KINDS[schema["type"]]):
        yield f"{where}: {value!r} is no {schema['type']}"
    elif value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{where}: {value!r} is not {schema}"
    elif isinstance(value, dict):
        yield from _misfits_of_object(value, schema, root, where)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _misfits(part, schema.get("items", {}), root, f"{where}[{index}]")


def _misfits_of_object(
    value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], where: str
) -> Iterator[str]:
    yield from (f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value)
    for name, part in value.items():
        inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if inner is False:
            yield f"{where}: {name} is too much"
        elif isinstance(inner, dict):
            yield from _misfits(part, inner, root, f"{where}.{name}")


def test_markdown_has_a_section_a_decision(project: Project) -> None:
    project.write(ALL).run()
    text = project.file(".md").read_text()
    for part in (
        "# Decision record",
        "| [slow](#slow) | caveated | simulated | misses the SLO: p95 e2e of 3 s 3 s against 2 s",
        "## yes\n\nIt holds.\n\n**supported**, simulated evidence: p50 e2e of 1 s",
        "| gate | `served(1).p50 <= 2.0` | held |",
        "| run | repeats | delivered |",
        "Provenance: target sim, accelerator t4;",
        "## Errors\n\n- `test_exp.py::test_broken` (decision broken): OSError: gone",
        "## Missing\n\n- `test_exp.py::test_never` (decision never): skipped: not today",
    ):
        assert part in text


def test_markdown_shows_each_item_with_its_own_gates_and_arms(project: Project) -> None:
    project.write(
        "@decision('d', 'It holds')\n@pytest.mark.parametrize('n', [1, 3])\n"
        "def test_it(served, n):\n    assert served(n).p50 <= 2.0\n"
    ).run()
    text = project.file(".md").read_text()
    _, one, three = text.split("\n### ")
    assert one.startswith("test\\_it\\[1\\]: supported") and three.startswith("test\\_it\\[3\\]: rejected")
    assert "| 1 s | " in one and "| 3 s | " not in one
    assert "- 1 s: Poisson(rate=1), Shape(prompt\\_tokens=10, output\\_tokens=11), requests=200; " in one
    assert "qwen2.5-0.5b on t4, max\\_num\\_seqs=1\n" in one


def test_text_cannot_break_the_markdown(project: Project) -> None:
    project.write('@decision("d", "a | b <script> *c*")\ndef test_it():\n    blocked("x | y\\nz <b>")\n').run()
    text = project.file(".md").read_text()
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "x \\| y z \\<b\\>" in text


# --- how it is written ----------------------------------------------------------------------------------------


def test_same_seed_same_record(project: Project) -> None:
    project.write(TWO).run()
    first = project.file().read_text()
    project.run("-p", "no:randomly")
    assert without_times(project.file().read_text()) == without_times(first)


def test_second_session_replaces_the_record_whole(project: Project) -> None:
    project.write(TWO).run()
    project.write(GOOD).run()
    assert [decision.id for decision in project.record.decisions] == ["yes"]
    assert "## a" not in project.file(".md").read_text()
    assert sorted(path.name for path in project.file().parent.iterdir()) == [
        "decision-record.json",
        "decision-record.md",
    ]


def test_folder_lost_during_the_session_is_reported(project: Project) -> None:
    project.write(
        GOOD + "\ndef test_z():\n    import pathlib, shutil\n    shutil.rmtree('reports')\n"
        "    pathlib.Path('reports').touch()\n"
    )
    result = project.run()
    assert result.ret == 1
    result.stdout.fnmatch_lines(["could not write *decision-record.json: *"])


# --- narrowed sessions ----------------------------------------------------------------------------------------

NARROW = {
    "-k": (["-k", "test_a"], "-k test_a"),
    "-m": (["-m", "not slow"], "-m not slow"),
    "node id": (["test_exp.py::test_a"], "test_exp.py::test_a"),
    "--deselect": (["--deselect=test_exp.py::test_b"], "--deselect=test_exp.py::test_b"),
    "-x": (["-x"], "stopping after 1 failures"),
    "--maxfail": (["--maxfail=1"], "stopping after 1 failures"),
    "--stepwise": (["--stepwise"], "--stepwise"),
    "-o": (["-o", "python_functions=test_a"], "-o python_functions=test_a"),
}


@pytest.mark.parametrize(("options", "why"), NARROW.values(), ids=NARROW)
def test_narrowed_session_never_replaces_the_full_record(project: Project, options: list[str], why: str) -> None:
    project.write(TWO).run()
    full = project.file().read_text()
    result = project.run(*options)
    result.stdout.fnmatch_lines(["record: *decision-record.partial.json (partial: *)"])
    assert project.file().read_text() == full
    assert project.partial.session.narrowed == why
    assert not project.record.session.narrowed
    assert "**Partial: " in project.file(".partial.md").read_text()


def test_last_failed_is_narrowed(project: Project) -> None:
    project.write(TWO)
    project.run()
    full = project.file().read_text()
    project.run("--lf")
    assert project.file().read_text() == full
    assert [decision.id for decision in project.partial.decisions] == ["b"]


def test_failed_first_is_full(project: Project) -> None:
    project.write(TWO)
    project.run()
    first = project.file().read_text()
    project.run("--ff")
    assert not project.file(".partial.json").exists()
    assert without_times(project.file().read_text()) == without_times(first)


def test_stopping_names_what_did_not_run(project: Project) -> None:
    project.write(TWO).run("-x")
    assert [problem.nodeid for problem in project.partial.missing] == ["test_exp.py::test_c"]
    assert {d.id: d.verdict for d in project.partial.decisions} == {"a": "supported", "b": "rejected", "c": "open"}


def test_stop_that_stopped_nothing_is_full(project: Project) -> None:
    project.write(GOOD).run("-x", "--maxfail=1")
    assert project.file().exists()
    project.write(TWO.partition('@decision("c"')[0]).run("-x")
    assert [decision.id for decision in project.record.decisions] == ["a", "b"]


def test_interrupted_session_is_partial(project: Project) -> None:
    project.write(GOOD + "\n@decision('stop', 's')\ndef test_stop():\n    raise KeyboardInterrupt\n" + TWO)
    assert project.spawn().ret == pytest.ExitCode.INTERRUPTED
    assert not project.file().exists()
    assert project.partial.session.narrowed == "KeyboardInterrupt"
    assert len(project.partial.missing) == 5
    assert project.partial.decisions[-1].verdict == "supported"


def test_what_the_project_leaves_out_itself_is_no_narrowing(project: Project) -> None:
    project.pytester.makeini("[pytest]\naddopts = -m 'not evaluate' --deselect=test_exp.py::test_c -ktest_\n")
    project.write(TWO).run()
    assert not project.file(".partial.json").exists()
    assert [decision.id for decision in project.record.decisions] == ["a", "b"]
    project.run("-m", "not verify")
    assert project.partial.session.narrowed == "-m not verify"


SHARD = """
def pytest_collection_modifyitems(config, items):
    gone = items[1::2]
    {tell}
    items[:] = items[::2]
"""


@pytest.mark.parametrize("tell", ["config.hook.pytest_deselected(items=gone)", "pass"], ids=["told", "untold"])
def test_plugin_that_leaves_items_out_narrows(project: Project, tell: str) -> None:
    """Even where the project leaves out some itself."""
    project.pytester.makeini("[pytest]\naddopts = --deselect=test_exp.py::test_a[1]\n")
    project.pytester.makepyfile(shard=SHARD.format(tell=tell))
    project.pytester.syspathinsert()
    project.write(TWO).run("-p", "shard")
    assert not project.file().exists()
    assert project.partial.session.narrowed == "a plugin left out test_exp.py::test_a[2] and 1 more"


@pytest.fixture
def two_folders(project: Project) -> Project:
    """experiments/first and experiments/second, a decision each, as deep below the root as in many projects."""
    for name in ("first", "second"):
        folder = project.path / "experiments" / name
        folder.mkdir(parents=True)
        project.write(GOOD.replace("yes", name), f"experiments/{name}/test_{name}.py")
    return project


def test_folder_never_replaces_the_record_of_more(two_folders: Project) -> None:
    two_folders.run("experiments/first")
    assert two_folders.record.session.collected == ("experiments/first",)
    two_folders.run("experiments")
    assert [decision.id for decision in two_folders.record.decisions] == ["first", "second"]
    two_folders.run("experiments/first")
    assert two_folders.partial.session.narrowed == "only experiments/first of experiments"
    assert len(two_folders.record.decisions) == 2
    two_folders.run()
    assert two_folders.record.session.collected == (".",)


def test_folder_that_is_gone_keeps_no_record_from_being_replaced(two_folders: Project) -> None:
    two_folders.run("experiments/first")
    (two_folders.path / "experiments/first").rename(two_folders.path / "experiments/third")
    two_folders.run("experiments/third", "experiments/second")
    assert two_folders.record.session.collected == ("experiments/second", "experiments/third")


def test_part_of_testpaths_is_narrowed(two_folders: Project) -> None:
    two_folders.pytester.makeini("[pytest]\ntestpaths = plain experiments/\n")
    two_folders.run("experiments/first")
    assert not two_folders.file().exists()
    assert two_folders.partial.session.narrowed == "only experiments/first of experiments"
    two_folders.run("experiments")
    assert len(two_folders.record.decisions) == 2


def test_record_of_a_folder_is_no_baseline_for_more(two_folders: Project) -> None:
    """A decision that broke elsewhere would read as new."""
    two_folders.run("experiments/first")
    two_folders.file().rename(two_folders.path / "baseline.json")
    assert two_folders.run("experiments/first", "--gpulab-gate=baseline.json").ret == 0
    result = two_folders.run("experiments", "--gpulab-gate=baseline.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["*collected experiments/first, this one collects experiments: *give the record of *"]
    )


def test_file_that_cannot_be_collected_makes_the_record_partial(project: Project) -> None:
    project.write(TWO).write("import absent_module\n", "test_broken.py")
    project.run("--continue-on-collection-errors")
    assert not project.file().exists()
    assert project.partial.session.narrowed == "could not collect test_broken.py"
    (error,) = project.partial.errors
    assert error.nodeid == "test_broken.py"
    assert "absent_module" in error.reason


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "in a worker"])
def test_file_with_experiments_that_skips_itself_makes_the_record_partial(
    project: Project, workers: list[str]
) -> None:
    skips = "pytest.importorskip('absent_module')\n"
    project.write(TWO).pytester.makepyfile(test_plain=f"import pytest\n{skips}def test_plain():\n    pass\n")
    project.run()
    full = project.file().read_bytes()
    project.write(f"{skips}@decision('z', 'Z')\ndef test_z(served):\n    assert served(1).p50 <= 2.0\n", "test_z.py")
    project.spawn(*workers)
    assert project.file().read_bytes() == full
    assert project.partial.session.narrowed == "skipped as a whole: test_z.py"


@pytest.mark.parametrize("option", ["--fixtures", "--fixtures-per-test", "--setup-plan"])
def test_showing_something_is_no_session(project: Project, option: str) -> None:
    project.write(TWO).run()
    full = project.file().read_bytes()
    project.run(option)
    assert project.file().read_bytes() == full


def test_report_folder_is_where_the_user_said(project: Project) -> None:
    project.write(GOOD).run("--gpulab-report-dir=elsewhere/deep")
    assert not project.file().exists()
    record = Record.model_validate_json(Path(project.path, "elsewhere/deep/decision-record.json").read_bytes())
    assert record.decisions[0].id == "yes"
