"""Workers: the same record as without, and no item is lost with its worker."""

from __future__ import annotations

import pytest

from tests.conftest import Project
from tests.test_plugin import ALL, GOOD
from tests.test_record import without_times

MORE = """
@decision("many", "Many items answer for one decision")
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 500])
def test_many(served, n):
    assert served(n).p50 <= 2.5

def test_shown(served):
    "TTFT stays low"
    assert served(1).ttft.p50 <= 2.0
"""
KILLED = """
@decision("killed", "It survives")
def test_killed():
    import os
    os._exit(1)
"""


@pytest.fixture
def spawned(project: Project) -> Project:
    project.write(ALL).write(MORE, "test_more.py")
    return project


@pytest.mark.parametrize(
    "options",
    [["-n", "2"], pytest.param(["-n", "2", "--dist", "loadfile"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_same_record_as_without_workers(spawned: Project, options: list[str]) -> None:
    spawned.run()
    alone = [without_times(spawned.file(suffix).read_text()) for suffix in (".json",)]
    result = spawned.spawn(*options, "--html=report.html", "--junitxml=junit.xml")
    assert result.ret == 1
    assert [without_times(spawned.file(suffix).read_text()) for suffix in (".json",)] == alone
    result.stdout.fnmatch_lines(["many *rejected *", "record: *decision-record.json"])
    assert (spawned.path / "junit.xml").read_text().count('name="verdict"') == 13
    assert "gpulab-board" in (spawned.path / "report.html").read_text()


@pytest.mark.slow
def test_killed_worker_is_a_named_error(project: Project) -> None:
    project.write(KILLED + GOOD).write(MORE, "test_more.py")
    result = project.spawn("-n", "2")
    assert result.ret == 1
    (error,) = project.record.errors
    assert error.nodeid == "test_exp.py::test_killed"
    assert error.decision == "killed"
    assert error.reason == "the worker process died while it ran"
    assert {d.id: d.verdict for d in project.record.decisions} == {
        "killed": "open",
        "yes": "supported",
        "many": "rejected",
    }
    result.stdout.fnmatch_lines(["killed *open *", "Errors: no verdict", "  test_exp.py::test_killed (killed)"])


@pytest.mark.slow
def test_items_lost_with_the_last_worker_are_missing(project: Project) -> None:
    project.write(KILLED + GOOD)
    result = project.spawn("-n", "1", "--max-worker-restart=0")
    assert result.ret != 0
    found = project.record if project.file().exists() else project.partial
    assert [problem.nodeid for problem in found.errors] == ["test_exp.py::test_killed"]
    assert [problem.nodeid for problem in found.missing] == ["test_exp.py::test_yes"]
    assert {d.id: d.verdict for d in found.decisions} == {"killed": "open", "yes": "open"}


@pytest.mark.slow
def test_killed_worker_is_an_error_for_the_gate(project: Project) -> None:
    project.write(GOOD).run()
    project.file().rename(project.path / "baseline.json")
    project.write(KILLED + GOOD)
    assert project.spawn("-n", "2", "--gpulab-gate=baseline.json").ret == 1


@pytest.mark.slow
def test_gate_with_workers(spawned: Project) -> None:
    spawned.write(MORE).run()
    spawned.file().rename(spawned.path / "baseline.json")
    assert spawned.spawn("-n", "2", "--gpulab-gate=baseline.json", "test_more.py", "test_exp.py").ret == 0


def test_bad_marker_is_refused_before_anything_runs(project: Project) -> None:
    project.write("@decision('d')\ndef test_it():\n    open('ran', 'w')\n\ndef test_other():\n    open('ran', 'w')\n")
    result = project.spawn("-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "test_exp.py:5: test_it: decision marker: takes an id and a statement" in "\n".join(result.errlines)
    assert not (project.path / "ran").exists()


@pytest.mark.slow
def test_narrowed_and_stopped(project: Project) -> None:
    project.write(GOOD).write(MORE, "test_more.py")
    project.spawn("-n", "2", "-k", "test_yes")
    assert not project.file().exists()
    assert [decision.id for decision in project.partial.decisions] == ["yes"]
    project.write("@decision('no', 's')\ndef test_no(served):\n    assert served(3).p50 <= 2.0\n" + MORE * 1)
    project.spawn("-n", "1", "-x")
    assert not project.file().exists()
    assert project.partial.session.narrowed == "stopping after 1 failures"
    assert project.partial.missing


@pytest.mark.slow
def test_plugin_that_leaves_items_out_of_workers_narrows(project: Project) -> None:
    project.write(GOOD).write(MORE, "test_more.py")
    with (project.path / "conftest.py").open("a") as conftest:
        conftest.write("\ndef pytest_collection_modifyitems(items):\n    items[:] = items[:1]\n")
    project.spawn("-n", "1")
    assert not project.file().exists()
    assert project.partial.session.narrowed.startswith("a plugin left out test_")


@pytest.mark.slow
def test_reruns(project: Project) -> None:
    project.write(
        """
        @decision("infra", "It holds once the crash is over")
        def test_infra(served):
            import pathlib
            if not pathlib.Path("seen").exists():
                pathlib.Path("seen").touch()
                raise OSError("lost the connection")
            assert served(1).p50 <= 2.0
        """
    )
    assert project.spawn("-n", "2", "--reruns", "1").ret == 0
    assert project.decision("infra").verdict == "supported"


@pytest.mark.slow
def test_unwritable_report_folder(project: Project) -> None:
    (project.path / "reports").touch()
    result = project.write(GOOD).spawn("-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gpulab-report-dir: cannot write into" in "\n".join(result.errlines)
