"""The plugin in pytest: markers, options, what a user sees, and what a project without decisions does not."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pytest_gpulab.options import refuse_workers
from tests.conftest import QUICK, Project

GOOD = """
@decision("yes", "It holds")
def test_yes(served):
    assert served(1).p50 <= 2.0
"""
ALL = (
    GOOD
    + """
@decision("no", "It does not hold")
def test_no(served):
    assert served(3).p50 <= 2.0

@decision("slow", "It holds slowly")
def test_slow(served):
    assert served(1).p50 <= 2.0
    caveat(served(3).p95 <= 2.0, "misses the SLO")

@decision("half", "It half holds")
def test_half(served, coin):
    assert served(1).p50 <= 2.0
    assert coin.p50 <= 2.0

@decision("unknown", "It is unknown")
def test_unknown(coin):
    assert coin.p50 <= 2.0

@decision("later", "It waits")
def test_later():
    blocked("no capacity")

@decision("broken", "It is broken")
def test_broken():
    raise OSError("gone")

@decision("never", "It never runs")
def test_never():
    pytest.skip("not today")
"""
)


# --- markers --------------------------------------------------------------------------------------------------

BAD_MARKERS = {
    "no arguments": ("decision()", "takes an id and a statement", "write @pytest.mark.decision("),
    "no statement": ('decision("d")', "missing a required argument: 'statement'", "got ('d')"),
    "too many": ('decision("d", "s", "t")', "too many positional arguments", "got ('d', 's', 't')"),
    "unknown keyword": ('decision("d", "s", owner="me")', "owner", "write @pytest.mark.decision("),
    "id not a text": ("decision(3, 's')", "id must be lower-case letters", "got 3"),
    "id with spaces": ("decision('a b', 's')", "id must be lower-case letters", "got 'a b'"),
    "empty statement": ("decision('d', ' ')", "statement must be one sentence", "got ' '"),
    "two lines": ("decision('d', 'a\\nb')", "statement must be one sentence", "got 'a\\nb'"),
    "twice": ("decision('d', 's')\n@decision('e', 's')", "must stand once on an item", "('e', 'd')"),
    "with xfail": ("decision('d', 's')\n@pytest.mark.xfail", "must not stand with xfail", "remove the xfail"),
}


@pytest.mark.parametrize(("marker", "field", "hint"), BAD_MARKERS.values(), ids=BAD_MARKERS)
def test_bad_marker_is_refused_before_anything_runs(project: Project, marker: str, field: str, hint: str) -> None:
    project.write(f"@{marker}\ndef test_it():\n    print('ran')\n\ndef test_other():\n    print('ran')\n")
    result = project.run("-s")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = "\n".join(result.errlines)
    assert "test_exp.py:5: test_it: decision marker: " in message
    assert field in message
    assert hint in message
    assert "ran" not in result.outlines
    assert not project.file().exists()


def test_duplicate_ids_must_agree_across_files(project: Project) -> None:
    project.write(GOOD).write(GOOD.replace("It holds", "It is something else"), "test_more.py")
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = "\n".join(result.errlines)
    for part in ("test_more.py:6", "test_exp.py:6", "'yes'", "'It holds'", "'It is something else'"):
        assert part in message


def test_duplicate_ids_are_seen_through_a_deselection(project: Project) -> None:
    project.write(GOOD).write(GOOD.replace("It holds", "It is something else"), "test_more.py")
    assert project.run("-k", "test_exp").ret == pytest.ExitCode.USAGE_ERROR


def test_decision_on_a_unittest_method_is_refused(project: Project) -> None:
    project.write(
        "import unittest\nclass TestIt(unittest.TestCase):\n    @decision('d', 's')\n    def test_it(self): ..."
    )
    result = project.run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "must stand on a test function, got TestCaseFunction" in "\n".join(result.errlines)


def test_a_marker_that_a_conftest_adds_counts(project: Project) -> None:
    project.pytester.makepyfile(
        marks="""
        import pytest
        def pytest_collection_modifyitems(items):
            for item in items:
                item.add_marker(pytest.mark.decision("late", "It holds"))
        """
    )
    project.pytester.syspathinsert()
    project.write("def test_late(served):\n    assert served(1).p50 <= 2.0\n").run("-p", "marks")
    assert project.decision("late").verdict == "supported"


def test_asserts_that_python_leaves_out_are_no_gates(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    result = project.write("def test_it(served):\n    assert served(1).p50 <= 2.0\n").spawn()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*gates are asserts, which python -O*run without them*"])


def test_markers_are_registered(project: Project) -> None:
    project.write("@pytest.mark.verify\n@pytest.mark.evaluate\ndef test_it(): ...")
    project.run("--strict-markers").assert_outcomes(passed=1)


# --- options --------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "target": ("smi", "unknown target 'smi': did you mean 'sim'? known: "),
    "accelerator": ("h20", "unknown accelerator 'h20': did you mean 'h200'?"),
    "max-repeats": ("7", "must be a look of the rule (6, 12, 18, 24), got '7'"),
    "seed": ("-1", "must be a whole number of at least 0, got '-1'"),
    "require": ("real", "must be one of simulated, emulated, measured, got 'real'"),
    "gate": ("absent.json", "cannot read"),
    "campaign": ("long", "must be one of quick, full, got 'long'"),
}


@pytest.mark.parametrize("where", ["command line", "ini file"])
@pytest.mark.parametrize(("name", "value", "message"), [(n, *rest) for n, rest in BAD_OPTIONS.items()])
def test_bad_option(project: Project, where: str, name: str, value: str, message: str) -> None:
    project.write("def test_it():\n    print('ran')")
    if where == "ini file":
        project.pytester.makeini(f"[pytest]\ngpulab_{name.replace('-', '_')} = {value}\n")
        result = project.run("-s")
    else:
        result = project.run("-s", f"--gpulab-{name}={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in "\n".join(result.errlines)
    assert name.replace("-", "_") in "\n".join(result.errlines).replace("-", "_")
    assert "ran" not in result.outlines


def test_command_line_before_ini_before_default(project: Project) -> None:
    project.pytester.makeini("[pytest]\ngpulab_seed = 3\ngpulab_accelerator = h200\n")
    project.write("def test_it(accelerator):\n    assert accelerator == 'h200'")
    result = project.run("--gpulab-seed=5")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpulab: target sim, accelerator h200, seeds from 5, up to 24 repeats"])


@pytest.mark.parametrize("option", ["--gpulab-report-dir={file}", "--gpulab-report-dir={file}/below"])
def test_unwritable_report_folder(project: Project, option: str) -> None:
    file = project.path / "file"
    file.touch()
    result = project.write(GOOD + "    print('ran')").run("-s", option.format(file=file))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    message = "\n".join(result.errlines)
    assert "--gpulab-report-dir: cannot write into" in message
    assert str(file) in message
    assert "ran" not in result.outlines


@pytest.mark.parametrize("target", ["vllm", "endpoint", "eks"])
def test_one_gpu_is_not_shared_by_workers(pytestconfig: pytest.Config, target: str) -> None:
    class WithWorkers:
        def getoption(self, name: str, default: object = None) -> object:
            return {"numprocesses": 2, "tx": ["2*popen"]}.get(name, default)

    with pytest.raises(pytest.UsageError, match="leave out -n"):
        refuse_workers(target, WithWorkers())  # type: ignore[arg-type]
    refuse_workers("sim", WithWorkers())  # type: ignore[arg-type]


def test_options_reach_the_lab(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_it(lab, measure):
            assert (lab.target.name, lab.first_seed, lab.max_repeats) == ("sim", 100, 12)
            assert measure.__self__ is lab
        """
    )
    pytester.runpytest_inprocess(*QUICK, "--gpulab-seed=100", "--gpulab-max-repeats=12").assert_outcomes(passed=1)


def test_users_override_fixtures_by_name(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef measure(accelerator):\n    return accelerator * 2")
    pytester.makepyfile("def test_it(measure):\n    assert measure == 't4t4'")
    pytester.runpytest_inprocess(*QUICK).assert_outcomes(passed=1)


# --- what a user sees -----------------------------------------------------------------------------------------


def test_table_of_decisions_is_readable_at_80_columns_without_colour(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = project.write(ALL).run()
    lines = result.outlines
    table = lines[lines.index("decisions".center(11).center(80, "=")) :]
    result.stdout.fnmatch_lines(
        [
            "Decision*Verdict*Basis*Deciding gate",
            "broken *open *- *OSError: gone",
            "half *partial *simulated *p50 e2e of 7 s*",
            "later *blocked *- *no capacity",
            "never *open *- *skipped: not today",
            "no *rejected *simulated *p50 e2e of 3 s*",
            "slow *caveated *simulated *misses the SLO: p95 e2e of 3 s*",
            "unknown *open *simulated *p50 e2e of 7 s*",
            "yes *supported *simulated *p50 e2e of 1 s*",
            "Errors: no verdict",
            "  test_exp.py::test_broken (broken)",
            "    OSError: gone",
            "Missing: no verdict",
            "  test_exp.py::test_never (never)",
            "target sim, accelerator t4, seeds from 0, up to 24 repeats",
            "record: *decision-record.json",
        ]
    )
    body = [line for line in table if not line.startswith("record: ")]
    assert max(map(len, body)) <= 80
    assert "\x1b" not in "\n".join(lines)


def test_letters_and_words(project: Project) -> None:
    project.write(ALL)
    project.run().stdout.fnmatch_lines(["test_exp.py .FcpobFs*"])
    project.run("-v").stdout.fnmatch_lines(
        [
            "*test_yes SUPPORTED*",
            "*test_no REJECTED*",
            "*test_slow CAVEATED*",
            "*test_half PARTIAL*",
            "*test_unknown OPEN*",
            "*test_later BLOCKED*",
            "*test_broken FAILED*",
            "*test_never SKIPPED*",
        ]
    )


def test_colours(project: Project) -> None:
    result = project.write(GOOD).run("--color=yes", "-v")
    assert any("\x1b[32msupported" in line for line in result.outlines)


def test_configuration_is_announced_where_something_asks_for_evidence(project: Project) -> None:
    result = project.write(GOOD).run()
    result.stdout.fnmatch_lines(["gpulab: target sim, accelerator t4, seeds from 0, up to 24 repeats"])
    assert sum(line.startswith("gpulab: ") for line in result.outlines) == 1


def test_junit_properties(project: Project) -> None:
    project.write(ALL).run("--junitxml=junit.xml")
    tree = ElementTree.parse(Path(project.path, "junit.xml"))
    found = {
        case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in tree.iter("testcase")
    }
    assert found["test_yes"] == {"verdict": "supported", "decision": "yes", "basis": "simulated"}
    assert found["test_no"] == {"verdict": "rejected", "decision": "no", "basis": "simulated"}
    assert found["test_later"] == {"verdict": "blocked", "decision": "later"}
    assert found["test_unknown"]["verdict"] == "open"
    assert found["test_broken"] == {"decision": "broken"}


def test_html_report(project: Project) -> None:
    project.write(ALL).run("--html=report.html", "--self-contained-html").assert_outcomes(
        passed=2, failed=2, xfailed=2, skipped=2
    )
    page = Path(project.path, "report.html").read_text()
    assert "gpulab-board" in page
    assert "Verdict" in page
    assert "gpulab-rejected" in page


@pytest.mark.parametrize("without", ["html", "xdist", "terminal", "rerunfailures", "junitxml"])
def test_works_without_other_plugins(project: Project, without: str) -> None:
    project.write(ALL).run("-p", f"no:{without}")
    assert {d.id: d.verdict for d in project.record.decisions} == {
        "broken": "open",
        "half": "partial",
        "later": "blocked",
        "never": "open",
        "no": "rejected",
        "slow": "caveated",
        "unknown": "open",
        "yes": "supported",
    }


# --- a project without decisions ------------------------------------------------------------------------------


def test_plain_project_sees_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_passes(): ...

        def test_fails():
            assert 1 == 2

        @pytest.mark.xfail
        def test_xfails():
            assert 0

        @pytest.mark.skip
        def test_skips(): ...
        """
    )
    for options in ([], ["-n", "2"]):
        result = pytester.runpytest_subprocess(*QUICK, "-p", "no:cacheprovider", *options)
        result.assert_outcomes(passed=1, failed=1, xfailed=1, skipped=1)
        said = [line for line in result.outlines if not line.startswith(("plugins:", "rootdir:"))]
        assert not any("gpulab" in line or "decision" in line for line in said)
        assert not Path(pytester.path, "reports").exists()


HEAVY = ("pydantic", "numpy", "rich", "matplotlib", "pytest_gpulab.gates", "pytest_gpulab.record", "xdist")


def _loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('loaded:', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_import_loads_nothing_heavy() -> None:
    assert not _loaded_by("import pytest_gpulab.plugin").intersection(HEAVY)


def test_plain_session_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import pytest\n@pytest.fixture\ndef f(): ...\ndef test_it(f): ...\n")
    code = (
        "import os, pytest; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'; "
        f"assert pytest.main(['-p', 'pytest_gpulab.plugin', '-p', 'no:cacheprovider', {str(tmp_path)!r}]) == 0"
    )
    assert not _loaded_by(code).intersection(HEAVY)


def test_collect_only_writes_nothing(project: Project) -> None:
    project.write(GOOD).run("--collect-only").assert_outcomes()
    assert not Path(project.path, "reports").exists()


def test_an_empty_option_takes_the_ini_files_back(project: Project) -> None:
    """So a gate that the project always has can be left out once."""
    project.pytester.makeini("[pytest]\ngpulab_gate = missing.json\n")
    project.write("def test_it(served):\n    assert served(1).p50 <= 2.0\n")
    assert project.run().ret == pytest.ExitCode.USAGE_ERROR
    assert project.run("--gpulab-gate=").ret == pytest.ExitCode.OK
