"""From what happens in a test to the verdict: every row of the table, and the awkward cases of use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Project


def one(body: str, *, mark: str = '@decision("d", "It holds")') -> str:
    """An experiment `test_it` with this body."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return f"{ELSEWHERE}\n{mark}\ndef test_it(request, served, coin):\n{lines}\n"


ELSEWHERE = """
from tests.known import WORKLOAD, arm, known_lab, known_run
def ask_elsewhere(seconds):
    lab = known_lab(lambda profile, seed: known_run(seconds, seed=seed))
    assert lab.measure(WORKLOAD, arm(1)).p50 <= 2.0
"""


VERDICTS = {
    "supported": ("assert served(1).p50 <= 2.0", {"passed": 1}, "supported"),
    "caveated by a false one": (
        'assert served(1).p50 <= 2.0\ncaveat(served(3).p95 <= 2.0, "misses the SLO")',
        {"passed": 1},
        "caveated",
    ),
    "caveated by an undecided one": (
        'assert served(1).p50 <= 2.0\ncaveat(coin.p95 <= 2.0, "may miss")',
        {"passed": 1},
        "caveated",
    ),
    "caveated by one that the target refuses": (
        'assert served(1).p50 <= 2.0\ncaveat(served(500).p95 <= 2.0, "may miss elsewhere")',
        {"passed": 1},
        "caveated",
    ),
    "rejected": ("assert served(3).p50 <= 2.0", {"failed": 1}, "rejected"),
    "open": ("assert coin.p50 <= 2.0", {"xfailed": 1}, "open"),
    "partial": ("assert served(1).p50 <= 2.0\nassert coin.p50 <= 2.0", {"xfailed": 1}, "partial"),
    "partial whatever the order": (
        "assert coin.p50 <= 2.0\nassert served(1).p50 <= 2.0",
        {"xfailed": 1},
        "partial",
    ),
    "rejected after an undecided gate": (
        "assert coin.p50 <= 2.0\nassert served(3).p50 <= 2.0",
        {"failed": 1},
        "rejected",
    ),
    "open by an unmet requirement": (
        'requires(served(3).p50 <= 2.0, "underutilized")\nassert served(1).p50 <= 2.0',
        {"xfailed": 1},
        "open",
    ),
    "partial by an unmet requirement": (
        'assert served(1).p50 <= 2.0\nrequires(served(3).p50 <= 2.0, "underutilized")\nassert served(1).p95 <= 2.0',
        {"xfailed": 1},
        "partial",
    ),
    "partial by a requirement that nothing follows": (
        'assert served(1).p50 <= 2.0\nrequires(served(3).p50 <= 2.0, "underutilized")',
        {"xfailed": 1},
        "partial",
    ),
    "blocked": ('blocked("no capacity")', {"skipped": 1}, "blocked"),
    "blocked by the target": ("assert served(500).p50 <= 2.0", {"skipped": 1}, "blocked"),
    "any_of held": ("assert any_of(served(3).p50 <= 2.0, served(1).p50 <= 2.0)", {"passed": 1}, "supported"),
    "any_of held beside a refused one": (
        "assert any_of(served(500).p50 <= 2.0, served(1).p50 <= 2.0)",
        {"passed": 1},
        "supported",
    ),
    "any_of with only a refused one left": (
        "assert any_of(served(3).p50 <= 2.0, served(500).p50 <= 2.0)",
        {"xfailed": 1},
        "open",
    ),
    "any_of refused": ("assert any_of(served(500).p50 <= 2.0, served(500).p95 <= 2.0)", {"skipped": 1}, "blocked"),
    "any_of false": ("assert any_of(served(3).p50 <= 2.0, served(4).p50 <= 2.0)", {"failed": 1}, "rejected"),
    "a chain": ("assert 0.5 <= served(1).p50 <= 2.0", {"passed": 1}, "supported"),
    "a false chain": ("assert 0.5 <= served(3).p50 <= 2.0", {"failed": 1}, "rejected"),
    "and": ("assert served(1).p50 <= 2.0 and served(3).p50 <= 2.0", {"failed": 1}, "rejected"),
    "a gate over several lines": (
        "assert (\n    served(3).p50\n    <= 2.0\n), 'too slow'",
        {"failed": 1},
        "rejected",
    ),
    "a claim that is a caveat and a gate": (
        'assert served(1).p50 <= 2.0\nfast = coin.p50 <= 2.0\ncaveat(fast, "may be slow")\nassert fast',
        {"xfailed": 1},
        "partial",
    ),
    "a false claim that is a caveat and a gate": (
        'fast = served(3).p50 <= 2.0\ncaveat(fast, "slow")\nassert fast',
        {"failed": 1},
        "rejected",
    ),
    "a claim that is required and a gate": (
        'fast = served(1).p50 <= 2.0\nrequires(fast, "too slow to tell")\nassert fast',
        {"passed": 1},
        "supported",
    ),
    "a gate in a loop": ("for n in (1, 3):\n    assert served(n).p50 <= 2.0", {"failed": 1}, "rejected"),
}


@pytest.mark.parametrize(("body", "outcomes", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_verdict(project: Project, body: str, outcomes: dict[str, int], verdict: str) -> None:
    project.write(one(body)).run().assert_outcomes(**outcomes)
    found = project.decision()
    assert found.verdict == verdict
    assert [item.verdict for item in found.items] == [verdict]
    assert not project.record.errors
    assert not project.record.missing


ERRORS = {
    "no gate": ("pass", "a decision needs a gate"),
    "only a caveat": ('caveat(served(3).p50 <= 2.0, "slow")', "a decision needs a gate"),
    "a plain assertion": ("assert served(1).p50 <= 2.0\nassert 1 == 2", "an assertion failed that is no gate"),
    "a plain assertion on a gate's line": (
        "assert served(1).p50 <= 2.0 and 1 == 2",
        "an assertion failed that is no gate",
    ),
    "a crash": ("assert served(1).p50 <= 2.0\nraise RuntimeError('boom')", "RuntimeError: boom"),
    "a crash of the target": ("assert served(501).p50 <= 2.0", "RuntimeError: server fell over"),
    "pytest.fail": ("pytest.fail('no')", "Failed: no"),
    "a false gate swallowed": (
        "try:\n    assert served(3).p50 <= 2.0\nexcept AssertionError:\n    pass",
        "a false gate did not end the test: `served(3).p50 <= 2.0`",
    ),
    "a false gate swallowed by raises": (
        "with pytest.raises(AssertionError):\n    assert served(3).p50 <= 2.0",
        "a false gate did not end the test",
    ),
    "a false gate swallowed, then another": (
        "for n in (3, 4):\n    try:\n        assert served(n).p50 <= 2.0\n"
        "    except AssertionError:\n        if n == 4: raise",
        "a false gate did not end the test",
    ),
    "a false gate swallowed, then a crash": (
        "try:\n    assert served(3).p50 <= 2.0\nfinally:\n    raise KeyError('x')",
        "a false gate did not end the test",
    ),
    "a false gate swallowed, then blocked": (
        "try:\n    assert served(3).p50 <= 2.0\nexcept AssertionError:\n    blocked('no')",
        "a false gate did not end the test",
    ),
    "a gate in the message of an assertion": (
        "assert len([1]) == 2, 'fast' if served(3).p50 <= 2.0 else 'slow'",
        "TypeError",
    ),
    "a plain assertion where a false gate was swallowed": (
        "def check(x):\n    assert x\ntry:\n    check(served(3).p50 <= 2.0)\nexcept AssertionError:\n    pass\n"
        "check(1 == 2)",
        "a false gate did not end the test",
    ),
    "a false gate that nobody waits for": (
        "try:\n    assert served(3).p50 <= 2.0\nfinally:\n    raise SystemExit(0)",
        "a false gate did not end the test",
    ),
    "a failure that pytest adds": (
        "request.applymarker(pytest.mark.xfail(strict=True, reason='why'))\nassert served(1).p50 <= 2.0",
        "the test failed, though no gate refuted anything: [XPASS(strict)] why",
    ),
    "a gate in a forked process": (
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "assert served(1).p50 <= 2.0\n"
        "with ProcessPoolExecutor(1, multiprocessing.get_context('fork')) as pool:\n"
        "    pool.submit(ask_elsewhere, 3).result()",
        "a gate must be asked in the test's own process",
    ),
    "a claim compared with a truth": ("assert (served(3).p50 <= 2.0) != False", "a claim is never equal"),
    "a gate under or": ("assert served(1).p50 <= 2.0 or True", "TypeError"),
    "pytest.xfail": ("assert served(1).p50 <= 2.0\npytest.xfail('known')", "xfail together with gates"),
}


@pytest.mark.parametrize(("body", "reason"), ERRORS.values(), ids=ERRORS)
def test_error_is_no_verdict(project: Project, body: str, reason: str) -> None:
    project.write(one(body)).run().assert_outcomes(failed=1)
    assert project.decision().verdict == "open"
    assert [item.verdict for item in project.decision().items] == [None]
    (error,) = project.record.errors
    assert (error.nodeid, error.decision) == ("test_exp.py::test_it", "d")
    assert reason in error.reason


LEAK = """

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    yield
    raise RuntimeError("a file was left open")
"""


def test_a_failure_that_a_hook_adds_is_no_verdict(project: Project) -> None:
    with Path(project.path, "conftest.py").open("a") as conftest:
        conftest.write(LEAK)
    project.write(one("assert served(1).p50 <= 2.0")).run().assert_outcomes(failed=1)
    assert project.decision().verdict == "open"
    (error,) = project.record.errors
    assert "a file was left open" in error.reason


def test_evidence_that_cannot_be_summarized_is_an_error_of_its_item_alone(project: Project) -> None:
    project.write(
        """
        @decision("d", "It holds")
        def test_it(served, monkeypatch):
            monkeypatch.setattr("pytest_gpulab.figures.mean_queue_delay", lambda run: 1 / 0)
            assert served(1).p50 <= 2.0

        @decision("e", "It holds too")
        def test_too(served):
            assert served(1).p50 <= 2.0
        """
    ).run().assert_outcomes(failed=1, passed=1)
    (error,) = project.record.errors
    assert (error.nodeid, project.decision("d").verdict) == ("test_exp.py::test_it", "open")
    assert "its evidence cannot be summarized: ZeroDivisionError: division by zero" in error.reason
    assert project.decision("e").verdict == "supported"


def test_a_drawing_that_fails_leaves_a_note_in_the_report(project: Project) -> None:
    project.write(
        """
        @decision("d", "It holds")
        def test_it(served, monkeypatch):
            monkeypatch.setattr("pytest_gpulab.report.plots.latency_cdf", lambda *_, **__: 1 / 0)
            assert served(1).p50 <= 2.0
        """
    ).run("--html=report.html", "--self-contained-html").assert_outcomes(passed=1)
    assert project.decision().verdict == "supported"
    assert "tables and plots could not be made: ZeroDivisionError" in (project.path / "report.html").read_text()


def test_gate_in_a_helper_rejects(project: Project) -> None:
    project.write(
        """
        def check(m):
            assert m.p50 <= 2.0

        @decision("d", "It holds")
        def test_it(served):
            check(served(3))
        """
    ).run().assert_outcomes(failed=1)
    assert project.decision().verdict == "rejected"
    assert project.decision().gates[0].line == 7


def test_gate_in_a_helper_of_another_file_rejects(project: Project) -> None:
    project.write("def check(m):\n    assert m.p50 <= 2.0\n", "checks.py")
    project.write(one("from checks import check\ncheck(served(3))")).run().assert_outcomes(failed=1)
    assert project.decision().verdict == "rejected"
    assert project.decision().gates[0].file == "checks.py"


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("setup", "served(3).p50 <= 2.0"),
        ("setup", "served(1).p50 <= 2.0"),
        ("teardown", "coin.p50 <= 2.0"),
        ("asked for by the test", "served(3).p50 <= 2.0"),
    ],
)
def test_gate_in_a_fixture_is_an_error(project: Project, where: str, how: str) -> None:
    before, after = (how, "True") if where != "teardown" else ("True", how)
    project.write(
        f"""
        @pytest.fixture
        def checked(served, coin):
            assert {before}
            yield
            assert {after}

        @decision("d", "It holds")
        def test_it(served, request{"" if where == "asked for by the test" else ", checked"}):
            if {where == "asked for by the test"}:
                request.getfixturevalue("checked")
            assert served(1).p95 <= 2.0
        """
    )
    assert project.run().ret == 1
    assert project.decision().verdict == "open"
    assert "not in a fixture" in project.record.errors[0].reason


def test_blocked_in_a_fixture_blocks(project: Project) -> None:
    project.write(
        """
        @pytest.fixture
        def machine():
            blocked("no p6-b200 capacity")

        @decision("d", "It holds")
        def test_it(served, machine):
            assert served(1).p95 <= 2.0
        """
    )
    result = project.run("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*blocked: no p6-b200 capacity*"])
    assert project.decision().verdict == "blocked"
    assert project.decision().reason == "no p6-b200 capacity"


def test_refused_reservation_says_why_and_names_no_run(project: Project) -> None:
    body = 'assert served(1).p50 <= 2.0\ncaveat(served(500).p95 <= 2.0, "may miss elsewhere")'
    project.write(one(body)).run("--html=report.html", "--self-contained-html").assert_outcomes(passed=1)
    found = project.decision()
    assert found.reason == "may miss elsewhere: p95 e2e of 500 s <= 2 s: no such machine"
    assert [run.label for run in found.runs] == ["1 s"]
    assert {run for gate in found.gates for run in gate.runs} == {run.id for run in found.runs}


def test_crash_in_a_fixture_is_an_error(project: Project) -> None:
    project.write(
        """
        @pytest.fixture
        def broken():
            yield
            raise OSError("still in use")

        @decision("d", "It holds")
        def test_it(served, broken):
            assert served(1).p95 <= 2.0
        """
    ).run().assert_outcomes(passed=1, errors=1)
    assert project.decision().verdict == "open"
    assert project.record.errors[0].reason == "teardown failed: OSError: still in use"


def test_other_skip_is_missing(project: Project) -> None:
    project.write(one("pytest.skip('not today')")).run().assert_outcomes(skipped=1)
    assert project.decision().verdict == "open"
    assert project.record.missing[0].reason == "skipped: not today"
    project.write(one("pass", mark='@pytest.mark.skip(reason="never")\n@decision("d", "It holds")'))
    project.run().assert_outcomes(skipped=1)
    assert project.record.missing[0].reason == "skipped: never"


@pytest.mark.parametrize("option", ["--assert=plain", "--runxfail", "--tb=native"])
def test_verdicts_do_not_depend_on_how_pytest_shows_them(project: Project, option: str) -> None:
    project.write(
        one("assert coin.p50 <= 2.0", mark='@decision("open", "It is open")')
        + one("assert served(3).p50 <= 2.0", mark='@decision("no", "It is no")').replace("test_it", "test_no")
    )

    # This process rewrites assertions of inner sessions too; plain ones need a process of their own.
    run = project.spawn if option == "--assert=plain" else project.run
    run(option).assert_outcomes(xfailed=1, failed=1)
    assert project.decision("open").verdict == "open"
    assert project.decision("no").verdict == "rejected"


def test_undecided_says_why(project: Project) -> None:
    result = project.write(one("assert coin.p50 <= 2.0")).run("-rx", "-v")
    result.stdout.fnmatch_lines(["*test_it OPEN*", "OPEN*test_it - p50 e2e*undecided after 24*"])


def test_failure_shows_the_numbers(project: Project) -> None:
    result = project.write(one("assert served(3).p50 <= 2.0")).run()
    said = [line for line in result.outlines if line.startswith("E ")]
    assert sum("p50 e2e of 3 s 3 s against 2 s: 6 of 6 repeats refuted it" in line for line in said) == 1


def test_failure_shows_each_operand_as_what_it_is(project: Project) -> None:
    """The gate that failed with its numbers, and nothing of it in the place of others."""
    result = project.write(one("assert served(1).p50 <= 5.0 and served(3).p50 <= 2.0")).run()
    assert sum("6 of 6 repeats refuted it" in line for line in result.outlines if line.startswith("E  ")) == 1
    body = one("assert any_of(served(3).p50 <= 2.0, served(4).p50 <= 2.0)")
    result = project.write(body).run()
    told = "\n".join(line for line in result.outlines if line.startswith("E  "))
    assert "any_of(any_of(" not in told
    assert "3 s 3 s against 2 s: 6 of 6 repeats refuted it" in told


def test_failure_shows_the_numbers_without_rewriting(project: Project) -> None:
    result = project.write(one("assert served(3).p50 <= 2.0")).spawn("--assert=plain")
    result.stdout.fnmatch_lines(["E *AssertionError", "E *p50 e2e of 3 s 3 s against 2 s: 6 of 6 repeats refuted it"])


def test_weaker_evidence_than_required_leaves_the_question_open(project: Project) -> None:
    body = one("assert served(1).p50 <= 2.0", mark='@decision("yes", "Yes")') + one(
        "assert served(3).p50 <= 2.0", mark='@decision("no", "No")'
    ).replace("test_it", "test_no")
    half = one("assert served(1).p50 <= 2.0\nassert coin.p50 <= 2.0", mark='@decision("half", "Half")')
    body += half.replace("test_it", "test_half")
    project.write(body).run("--gpulab-require=measured").assert_outcomes(xfailed=3)
    for id, otherwise in (("yes", "supported"), ("no", "rejected"), ("half", "partial")):
        assert project.decision(id).verdict == "open"
        assert project.decision(id).basis == "simulated"
        assert f"simulated evidence, measured is required; it would be {otherwise}" in project.decision(id).reason
    conftest = (project.path / "conftest.py").read_text().replace('BASIS = "simulated"', 'BASIS = "measured"')
    (project.path / "conftest.py").write_text(conftest)
    project.run("--gpulab-require=measured").assert_outcomes(passed=1, failed=1, xfailed=1)
    assert project.decision("yes").verdict == "supported"
    assert project.decision("half").verdict == "partial"


def test_first_verdict_stands_under_reruns(project: Project) -> None:
    project.write(
        """
        seen = []

        @decision("flaky", "It holds at the second try")
        def test_flaky(served):
            seen.append(1)
            assert served(4 - len(seen)).p50 <= 2.5

        @decision("infra", "It holds once the crash is over")
        def test_infra(served):
            seen.append(2)
            if seen.count(2) == 1:
                raise OSError("lost the connection")
            assert served(1).p50 <= 2.0
        """
    )
    result = project.run("--reruns", "2")
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*the first verdict stands: rejected*"])
    assert project.decision("flaky").verdict == "rejected"
    assert project.decision("infra").verdict == "supported"
    assert not project.record.errors


def test_evidence_without_a_decision(project: Project) -> None:
    project.write(
        '''
        def test_shows_something(served):
            """TTFT stays low.

            More words.
            """
            assert served(1).p50 <= 2.0

        def test_measures_and_decides_nothing(served):
            served(1)

        def test_plain():
            pass

        def test_undecided(coin):
            assert coin.p50 <= 2.0
        '''
    ).run().assert_outcomes(passed=3, xfailed=1)
    assert not project.record.decisions
    assert [(e.nodeid, e.statement, e.verdict) for e in project.record.evidence] == [
        ("test_exp.py::test_shows_something", "TTFT stays low.", "supported"),
        ("test_exp.py::test_undecided", "", "open"),
    ]


def test_items_of_one_decision_combine(project: Project) -> None:
    project.write(
        """
        @decision("d", "It holds")
        @pytest.mark.parametrize("n", [1, 3], ids=["quick", "slow"])
        def test_it(served, n):
            assert served(n).p50 <= 2.0

        @decision("e", "It holds")
        @pytest.mark.parametrize("n", [1, 7])
        def test_e(served, n):
            assert served(n).p50 <= 2.0

        @decision("f", "It holds")
        class TestF:
            def test_a(self, served):
                assert served(1).p50 <= 2.0
            def test_b(self):
                blocked("no")
        """
    ).run()
    assert project.decision("d").verdict == "rejected"
    assert project.decision("d").reason.startswith("test_it[slow]: ")
    assert project.decision("e").verdict == "partial"
    assert project.decision("f").verdict == "blocked"


def test_unittest_and_subtests_cannot_hide_a_false_gate(project: Project) -> None:
    project.write(
        """
        @decision("d", "It holds")
        def test_it(served, subtests):
            with subtests.test("hidden"):
                assert served(3).p50 <= 2.0
        """
    ).run()
    assert project.decision().verdict == "open"
    assert "did not end the test" in project.record.errors[0].reason


def test_measurement_of_a_shared_fixture_belongs_to_every_item(project: Project) -> None:
    project.write(
        """
        from tests.known import WORKLOAD, arm

        @pytest.fixture(scope="module")
        def base(measure):
            return measure(WORKLOAD, arm(1), label="base")

        @decision("d", "It holds")
        def test_it(base):
            assert base.p50 <= 2.0

        @decision("e", "It holds too")
        def test_too(base):
            assert base.p95 <= 2.0
        """
    ).run().assert_outcomes(passed=2)
    for id in ("d", "e"):
        assert [run.label for run in project.decision(id).runs] == ["base"]
        assert project.decision(id).basis == "simulated"


def test_claim_of_a_shared_fixture_is_a_gate_of_every_item(project: Project) -> None:
    project.write(
        """
        from tests.known import WORKLOAD, arm

        @pytest.fixture(scope="module")
        def fast(measure):
            return measure(WORKLOAD, arm(1), label="base").p50 <= 2.0

        @decision("d", "It holds")
        def test_it(fast):
            assert fast

        @decision("e", "It holds too")
        def test_too(fast):
            assert fast
        """
    ).run().assert_outcomes(passed=2)
    for id in ("d", "e"):
        assert [gate.outcome for gate in project.decision(id).gates] == ["held"]
        assert [len(run.seeds) for run in project.decision(id).runs] == [6]


TWO_TARGETS = """
from tests.known import WORKLOAD, arm, known_lab, known_run

@pytest.fixture(scope="session")
def simulator():
    return known_lab(lambda profile, seed: known_run(1.0, seed=seed, basis="simulated"), basis="simulated")

@pytest.fixture(scope="module")
def told(simulator):
    return simulator.measure(WORKLOAD, arm(1), label="predicted")

@decision("d", "It was predicted")
def test_it(measure, told):
    assert measure(WORKLOAD, arm(1), label="measured").p50 <= 1.1 * told.p50

@decision("e", "It will hold")
def test_too(measure, told):
    assert measure(WORKLOAD, arm(1), label="measured").p95 <= 2.0
    assert told.p50 <= 1.1
"""


def test_a_simulated_arm_beside_a_measured_one_makes_the_evidence_simulated(project: Project) -> None:
    """Equal workloads and profiles, on two targets: two arms, of which the weaker one counts."""
    conftest = (project.path / "conftest.py").read_text().replace('BASIS = "simulated"', 'BASIS = "measured"')
    (project.path / "conftest.py").write_text(conftest)
    project.write(TWO_TARGETS).run().assert_outcomes(passed=2)
    for id in ("d", "e"):
        assert project.decision(id).basis == "simulated"
        assert [(run.label, run.basis) for run in project.decision(id).runs] == [
            ("measured", "measured"),
            ("predicted", "simulated"),
        ]
    project.run("--gpulab-require=measured").assert_outcomes(xfailed=2)
    assert {decision.verdict for decision in project.record.decisions} == {"open"}


def test_knee_of_a_shared_fixture_shows_its_repeats_in_every_item(project: Project) -> None:
    project.write(
        """
        from pytest_gpulab import find_knee
        from tests.known import WORKLOAD, arm

        @pytest.fixture(scope="module")
        def knee(measure):
            return find_knee(
                lambda n: measure(WORKLOAD, arm(round(n))),
                low=1,
                high=4,
                stable=lambda m: m.p50 <= 2.5,
                resolution=0.9,
            )

        @decision("d", "It holds")
        def test_it(knee):
            assert knee >= 1

        @decision("e", "It holds too")
        def test_too(knee):
            assert knee <= 4
        """
    ).run().assert_outcomes(passed=2)
    first, second = ([(run.id, run.seeds) for run in project.decision(id).runs] for id in ("d", "e"))
    assert first == second
    assert {len(seeds) for _, seeds in first} == {6}


IN_THREADS = {
    "pool": "with ThreadPoolExecutor() as pool:\n    list(pool.map(check, [served(1), coin]))",
    "thread that dies alone": "thread = Thread(target=check, args=[served(1)])\nthread.start()\nthread.join()",
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", IN_THREADS.values(), ids=IN_THREADS)
def test_gate_in_a_thread_without_the_tests_context_is_an_error(project: Project, how: str) -> None:
    project.write(THREADED + one(f"assert served(1).p50 <= 2.0\n{how}")).run().assert_outcomes(failed=1)
    assert project.decision().verdict == "open"
    (error,) = project.record.errors
    assert "test_exp.py:11: a gate must know its test" in error.reason
    assert "contextvars.copy_context().run" in error.reason


def test_gates_in_threads_with_the_tests_context_count(project: Project) -> None:
    how = (
        "with ThreadPoolExecutor() as pool:\n"
        "    futures = [pool.submit(copy_context().run, check, m) for m in (served(1), coin)]\n"
        "    assert len([future.result() for future in futures]) == 2"
    )
    project.write(THREADED + one(how)).run().assert_outcomes(xfailed=1)
    assert sorted(gate.outcome for gate in project.decision().gates) == ["held", "undecided"]


@pytest.mark.parametrize(("slow", "verdict"), [((1, 3), "rejected"), ((3, 3), "open")])
def test_false_gate_in_a_task_group_rejects_when_it_alone_ended_it(
    project: Project, slow: tuple[int, int], verdict: str
) -> None:
    body = (
        f"async def ask():\n    async with TaskGroup() as group:\n        for n in {slow}:\n"
        "            group.create_task(check_soon(served(n)))\nrun(ask())"
    )
    project.write(THREADED + one(body)).run().assert_outcomes(failed=1)
    assert project.decision().verdict == verdict


THREADED = """
from asyncio import TaskGroup, run
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Thread
def check(m):
    assert m.p50 <= 2.0
async def check_soon(m):
    check(m)
"""
