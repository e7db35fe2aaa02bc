"""``--gpulab-gate``: what counts as lost, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from pytest_gpulab.baseline import Change, exit_status
from pytest_gpulab.markers import Entry
from pytest_gpulab.outcomes import Reported, Setting, compose
from pytest_gpulab.record import Record, SessionInfo, Verdict
from tests.conftest import Project

STUDY = """
@decision("{id}", "It holds")
def test_{id}(served, coin):
    {body}
"""
BODIES = {
    "supported": "assert served(1).p50 <= 2.0",
    "caveated": "assert served(1).p50 <= 2.0; caveat(served(3).p95 <= 2.0, 'slow')",
    "partial": "assert served(1).p50 <= 2.0; assert coin.p50 <= 2.0",
    "rejected": "assert served(3).p50 <= 2.0",
    "open": "assert coin.p50 <= 2.0",
    "blocked": "blocked('no capacity')",
    "error": "raise OSError('gone')",
    "plain skip": "pytest.skip('no')",
}


def studies(**verdicts: str) -> str:
    """One study a keyword, which ends with the verdict named."""
    return "".join(STUDY.format(id=id, body=BODIES[verdict]) for id, verdict in verdicts.items())


@pytest.fixture
def gated(project: Project):  # type: ignore[no-untyped-def]
    """gated(before, after, *options): the session of studies `after` against a record of studies `before`."""

    def run(before: dict[str, str], after: dict[str, str], *options: str, **files: str) -> pytest.RunResult:
        project.write(studies(**before)).run()
        project.file().rename(project.path / "baseline.json")
        project.write(studies(**after) + files.get("more", ""))
        return project.run("--gpulab-gate=baseline.json", *options)

    return run


ENDS = {
    "lost to rejected": ("supported", "rejected", 10, "*lost * d: supported -> rejected, *"),
    "lost to open": ("caveated", "open", 10, "*lost * d: caveated -> open, *"),
    "error": ("supported", "error", 1, "*lost * d: supported -> open"),
    "known rejection": ("rejected", "rejected", 0, "baseline *: no verdict changed"),
    "new rejection": ("open", "rejected", 1, "*redefined d: open -> rejected, *"),
    "another caveat": ("supported", "caveated", 10, "*redefined d: supported -> caveated, *"),
    "improved": ("partial", "supported", 0, "*improved * d: partial -> supported"),
    "unblocked": ("blocked", "caveated", 0, "*improved * d: blocked -> caveated"),
}


@pytest.mark.parametrize(("before", "after", "status", "line"), ENDS.values(), ids=ENDS)
def test_exit_status(gated, before: str, after: str, status: int, line: str) -> None:  # type: ignore[no-untyped-def]
    result = gated({"d": before}, {"d": after})
    assert result.ret == status
    result.stdout.fnmatch_lines([line])


VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def record_of(verdict: Verdict | None) -> Record:
    """A record of one item that ended so; None crashed."""
    outcome = Reported(done=True, error="" if verdict else "OSError: gone")
    outcome.add({"verdict": verdict, "reason": "numbers", "gates": [], "runs": []})
    return compose(
        {"test_d": Entry("test_d", "d", "It holds")},
        {"test_d": outcome},
        {},
        Setting("sim", "t4", "", {}),
        SessionInfo(started="", seconds=0, first_seed=0, max_repeats=24, require="simulated", narrowed=""),
    )


@pytest.mark.parametrize("before", VERDICTS)
@pytest.mark.parametrize("after", [*VERDICTS, None])
def test_exit_status_of_every_change(before: Verdict, after: Verdict | None) -> None:
    red = after in ("rejected", None)
    found = exit_status(int(red), record_of(after), record_of(before), {"test_d"} if red else set())
    good = ("supported", "caveated")
    if after is None:
        assert found == 1
    elif before in good and after not in good:
        assert found == 10
    elif after == "rejected" and before != "rejected":
        assert found == 1  # a red test that is no known rejection
    else:
        assert found == 0


def test_decision_not_run_is_lost(gated) -> None:  # type: ignore[no-untyped-def]
    result = gated({"a": "supported", "b": "supported"}, {"a": "supported"})
    assert result.ret == 10
    result.stdout.fnmatch_lines(["*not run * b: supported -> not run*"])


def test_narrowed_session_has_not_run_the_rest(gated) -> None:  # type: ignore[no-untyped-def]
    assert gated({"a": "supported", "b": "supported"}, {"a": "supported", "b": "supported"}, "-k", "test_a").ret == 10


TWO_CASES = """
SLO = {slo}

@decision("d", "It holds")
@pytest.mark.parametrize("case", {cases})
def test_d(served, case):
    assert served({seconds}).p50 <= SLO
"""
STEADY_AND_BURST = {"slo": 2.0, "cases": ["steady", "burst"], "seconds": "1"}


@pytest.fixture
def against(project: Project):  # type: ignore[no-untyped-def]
    """against(before, after, *options): the session of experiments `after` against the record of `before`."""

    def run(before: str, after: str, *options: str) -> pytest.RunResult:
        project.write(before).run()
        project.file().rename(project.path / "baseline.json")
        return project.write(after).run("--gpulab-gate=baseline.json", *options)

    return run


@pytest.mark.parametrize("left_out", ["deselected", "removed"])
def test_decision_without_its_failing_item_is_lost(against, left_out: str) -> None:  # type: ignore[no-untyped-def]
    """One of two items fails now: leaving it out must not turn the gate green."""
    broken = {**STEADY_AND_BURST, "seconds": "3 if case == 'burst' else 1"}
    changed, options = (
        (broken, ["-k", "steady"]) if left_out == "deselected" else ({**broken, "cases": ["steady"]}, [])
    )
    result = against(TWO_CASES.format(**STEADY_AND_BURST), TWO_CASES.format(**changed), *options)
    assert result.ret == 10
    result.stdout.fnmatch_lines(
        [
            "*not run * d: supported -> supported, without test_exp.py::test_d[[]burst]",
            "run the whole catalog; if it was changed on purpose, commit its new record as baseline.json",
        ]
    )


GATE = """
LIMIT = {limit}

@decision("d", "It holds")
def test_d(served):
    one, three = served(1), served(3)
    assert {gate}
"""


def test_threshold_behind_a_name_is_loosened(against) -> None:  # type: ignore[no-untyped-def]
    result = against(GATE.format(limit=2, gate="one.p50 <= LIMIT"), GATE.format(limit=2000, gate="one.p50 <= LIMIT"))
    assert result.ret == 10
    result.stdout.fnmatch_lines(["*redefined d: *, `one.p50 <= LIMIT` asks something else than there"])


def test_redefined_rejection_is_reported_and_no_loss(against) -> None:  # type: ignore[no-untyped-def]
    result = against(GATE.format(limit=2, gate="three.p50 <= LIMIT"), GATE.format(limit=4, gate="three.p50 <= LIMIT"))
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*redefined d: rejected -> supported, *"])


BOTH = "one.p50 <= LIMIT and three.p50 <= 2 * LIMIT"
OTHER_OUTCOMES = {
    "a false gate ends its item": (BOTH, 1, 3, 10, "lost"),
    "and no longer does": (BOTH, 3, 1, 0, "improved"),
    "a caveat": ('one.p50 <= LIMIT; caveat(three.p50 <= 2 * LIMIT, "slow")', 1, 1.5, 0, "changed"),
}


@pytest.mark.parametrize(("gate", "before", "after", "status", "kind"), OTHER_OUTCOMES.values(), ids=OTHER_OUTCOMES)
def test_another_outcome_is_no_other_question(
    project: Project, gate: str, before: float, after: float, status: int, kind: str
) -> None:
    """The target gets slower or faster: what was asked stays, although more or fewer gates were reached."""
    project.write(GATE.format(limit=2, gate=gate))
    conftest = project.path / "conftest.py"
    text = conftest.read_text()
    conftest.write_text(text.replace("float(seconds)", f"{before} * float(seconds)"))
    project.run()
    project.file().rename(project.path / "baseline.json")
    conftest.write_text(text.replace("float(seconds)", f"{after} * float(seconds)"))
    result = project.run("--gpulab-gate=baseline.json")
    assert result.ret == status
    result.stdout.re_match_lines([rf"  {kind} +d: \w+ -> \w+$"])


def test_older_record_does_not_say_what_its_gates_asked(project: Project) -> None:
    project.write(GATE.format(limit=2, gate="one.p50 <= LIMIT")).run()
    record = json.loads(project.file().read_text())
    for gate in (*record["decisions"][0]["gates"], *record["decisions"][0]["items"][0]["gates"]):
        del gate["definition_hash"]
    (project.path / "baseline.json").write_text(json.dumps(record))
    assert project.run("--gpulab-gate=baseline.json").ret == 0


def test_nothing_of_the_catalog_was_run(gated) -> None:  # type: ignore[no-untyped-def]
    result = gated({"a": "supported"}, {}, more="def test_plain(): ...\n")
    assert result.ret == 10
    result.stdout.fnmatch_lines(["*not run * a: supported -> not run*"])


def test_skipped_decision_is_lost(gated) -> None:  # type: ignore[no-untyped-def]
    assert gated({"a": "supported"}, {"a": "plain skip"}).ret == 10


def test_new_decision_is_reported(gated) -> None:  # type: ignore[no-untyped-def]
    result = gated({"a": "supported"}, {"a": "supported", "b": "open"})
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*new * b: absent -> open*"])


def test_any_error_is_1_even_beside_a_loss(gated) -> None:  # type: ignore[no-untyped-def]
    assert gated({"a": "supported", "b": "open"}, {"a": "rejected", "b": "error"}).ret == 1


def test_a_red_plain_test_is_not_quiet(gated) -> None:  # type: ignore[no-untyped-def]
    assert gated({"a": "rejected"}, {"a": "rejected"}, more="def test_plain():\n    assert 0\n").ret == 1


def test_stopping_at_a_known_rejection_leaves_the_rest_not_run(gated) -> None:  # type: ignore[no-untyped-def]
    assert gated({"a": "rejected", "b": "supported"}, {"a": "rejected", "b": "supported"}, "-x").ret == 10


def test_known_rejection_of_evidence_is_quiet(project: Project) -> None:
    project.write("def test_it(served):\n    assert served(3).p50 <= 2.0\n").run()
    project.file().rename(project.path / "baseline.json")
    assert project.run("--gpulab-gate=baseline.json").ret == 0
    project.write("def test_other(served):\n    assert served(3).p50 <= 2.0\n")
    assert project.run("--gpulab-gate=baseline.json").ret == 1


def test_file_that_cannot_be_collected_is_an_error(gated) -> None:  # type: ignore[no-untyped-def]
    result = gated({"a": "open"}, {"a": "open"}, more="import absent_module\n")
    assert result.ret == 1


def test_without_a_gate_the_exit_status_is_pytests_own(project: Project) -> None:
    assert project.write(studies(a="supported", b="open", c="blocked")).run().ret == 0
    assert project.write(studies(a="supported", b="rejected")).run().ret == 1


BAD_BASELINES = {
    "not json": ("{", "is no decision record of this version"),
    "another document": ("{}", "is no decision record of this version: target: Field required"),
    "a later version": ('{"schema_version": 2}', "schema_version"),
}


@pytest.mark.parametrize(("text", "message"), BAD_BASELINES.values(), ids=BAD_BASELINES)
def test_bad_baseline_is_refused_before_anything_runs(project: Project, text: str, message: str) -> None:
    Path(project.path, "baseline.json").write_text(text)
    result = project.write(studies(a="supported")).run("--gpulab-gate=baseline.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "baseline.json" in "\n".join(result.errlines)
    assert message in "\n".join(result.errlines)
    assert not project.file().exists()


def test_baseline_of_another_setup_is_refused(project: Project) -> None:
    project.write(studies(a="supported")).run()
    project.file().rename(project.path / "baseline.json")
    result = project.run("--gpulab-gate=baseline.json", "--gpulab-accelerator=h200")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is a record of accelerator 't4', this session's is 'h200'" in "\n".join(result.errlines)
    record = json.loads((project.path / "baseline.json").read_text())
    (project.path / "baseline.json").write_text(json.dumps({**record, "target": "vllm"}))
    result = project.run("--gpulab-gate=baseline.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is a record of target 'vllm', this session's is 'sim'" in "\n".join(result.errlines)
    (project.path / "baseline.json").write_text(json.dumps({**record, "target": "cluster"}))
    result = project.run("--gpulab-gate=baseline.json", "--gpulab-target=cluster", "--gpulab-load-from=cluster")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is a record of load-from 'client', this session's is 'cluster'" in "\n".join(result.errlines)


def test_baseline_of_a_narrowed_session_is_refused(project: Project) -> None:
    """A decision that the narrowed session did not run could be lost unseen."""
    project.write(studies(a="supported", b="supported")).run("-k", "test_a")
    result = project.run("--gpulab-gate=reports/decision-record.partial.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*did not run the whole catalog (-k test_a)*"])


@pytest.mark.parametrize("ended", ["-x", "Ctrl-C"])
def test_baseline_of_a_session_that_was_cut_short_is_refused(project: Project, ended: str) -> None:
    text = studies(a="rejected", b="supported")
    if ended == "Ctrl-C":
        text += "\n\ndef test_z():\n    raise KeyboardInterrupt\n\n\ndef test_zz():\n    pass\n"
    project.write(text)
    project.run("-x") if ended == "-x" else project.spawn()  # an inner KeyboardInterrupt would end this session too
    assert not (project.path / "reports" / "decision-record.json").exists()
    result = project.run("--gpulab-gate=reports/decision-record.partial.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*did not run the whole catalog (*"])


def test_baseline_folder_is_refused(project: Project) -> None:
    result = project.write(studies(a="supported")).run("--gpulab-gate=.")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "cannot read" in "\n".join(result.errlines)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("supported", "open", "lost"),
        ("caveated", None, "not run"),
        ("open", None, "not run"),
        (None, "supported", "new"),
        ("caveated", "supported", "improved"),
        ("supported", "caveated", "changed"),
        ("rejected", "open", "changed"),
    ],
)
def test_kinds_of_change(before, after, kind: str) -> None:  # type: ignore[no-untyped-def]
    assert Change("d", before, after).kind == kind
