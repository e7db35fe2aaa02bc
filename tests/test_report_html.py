"""The pytest-html additions: cells, the decision board, the block of an experiment, and a whole report."""

from __future__ import annotations

import html as markup
import json
import math
import re
from types import SimpleNamespace

import pytest

from pytest_gpulab import Fleet, Poisson, Profile, Shape, Workload, caveat, find_knee
from pytest_gpulab.gates import Figure, Gate, Ledger, collecting
from pytest_gpulab.lab import Lab
from pytest_gpulab.record import Decision, Item, Provenance, RunSummary
from pytest_gpulab.report import html
from pytest_gpulab.report.canvas import colour
from pytest_gpulab.targets.sim import Sim

EVIL = "<script>alert('x')</script> & more"


def figure(label: str, value: float, unit: str = "s", low: float | None = None, high: float | None = None) -> Figure:
    low, high = value if low is None else low, value if high is None else high
    return Figure(label=label, value=value, low=low, high=high, n=6, unit=unit)


def gate(**changes: object) -> Gate:
    side = figure("p95 e2e of direct", 1.93)
    fields = {
        "role": "gate", "outcome": "held", "text": "direct.p95 <= 2.0", "reason": "6 of 6 repeats held",
        "left": side, "operator": "<=", "right": side, "runs": ("a",),
        "file": "/home/me/experiments/test_x.py", "line": 12, "last_line": 12,
    }  # fmt: skip
    return Gate.model_validate(fields | changes)


def arm(**changes: object) -> RunSummary:
    fields = {
        "id": "a", "label": "direct", "target": "sim", "basis": "simulated", "server": "t4",
        "workload": {}, "profile": {"model": "llama-3.1-8b", "accelerator": "h200"}, "seeds": (0, 1, 2, 3, 4, 5),
        "figures": (figure("delivery ratio", 0.998, "ratio"), figure("p95 e2e", math.inf, low=2.5)),
    }  # fmt: skip
    return RunSummary.model_validate(fields | changes)


def decision(**changes: object) -> Decision:
    fields = {
        "id": "admission", "statement": "Use bounded admission", "verdict": "supported", "basis": "simulated",
        "reason": "delivery ratio 1 against 0.999", "items": (), "gates": (), "runs": (),
        "provenance": Provenance(
            target="sim", accelerator="t4", seeds=(), definition_hash="", git_commit="", versions={}
        ),
    }  # fmt: skip
    return Decision.model_validate(fields | changes)


def report(**evidence: object) -> SimpleNamespace:
    return SimpleNamespace(gpulab=evidence) if evidence else SimpleNamespace()


# --- cells ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        report(verdict="rejected", decision="d", basis="simulated", reason=EVIL, gates=[], runs=[]),
        report(verdict=None, decision="d", basis=None, reason="", gates=[], runs=[]),
        report(),
        SimpleNamespace(gpulab=None),
    ],
)
def test_every_row_has_a_cell_for_every_header(row):
    header, cells = ["<th>Result</th>", "<th>Test</th>"], ["<td>Passed</td>", "<td>test</td>"]
    html.header_cells(header)
    html.row_cells(row, cells)
    assert len(cells) == len(header)
    for head, cell in zip(header[1:3], cells[1:3], strict=True):
        name = re.search(r'class="sortable" data-column-type="(\w+)"', head)
        assert name is not None and f'class="col-{name[1]}"' in cell
        assert re.search(r"<td.*?>(.*?)</td>", cell), "pytest-html reads the sort key so"
    assert "<script" not in "".join(cells)


def test_a_row_that_was_emptied_stays_empty():
    cells: list[str] = []
    html.row_cells(report(verdict="open"), cells)
    assert cells == []


def test_rows_sort_by_urgency():
    def key(verdict: str | None) -> str:
        cells = ["", ""]
        html.row_cells(report(verdict=verdict), cells)
        found = re.search(r"<td.*?>(.*?)</td>", cells[1])
        assert found is not None
        return found[1]

    verdicts = ["rejected", "open", "partial", "blocked", "caveated", "supported", None]
    assert sorted(verdicts, key=key) == verdicts


def test_the_reason_is_on_the_badge_in_one_line():
    cells = [""]
    html.row_cells(report(verdict="open", reason='a "b" >\n c'), cells)
    assert 'title="a &quot;b&quot; &gt; c"' in "".join(cells)


# --- the board ------------------------------------------------------------------------------------------------


def test_board_has_a_row_per_decision():
    style, board = html.summary([decision(), decision(id="lc-caps", verdict="rejected", basis="measured")])
    assert style.startswith("<style>")
    assert "1 supported, 1 rejected" in board
    rows = re.findall(r"<tr>(.*?)</tr>", board)[1:]
    assert len(rows) == 2
    for text in ("Use bounded admission", "admission", "supported", "simulated", "delivery ratio 1 against 0.999"):
        assert text in rows[0]
    assert ">rejected</span>" in rows[1] and ">measured</span>" in rows[1]


def test_board_escapes_and_names_items_without_a_verdict():
    lost = Item(nodeid="test_x.py::test_a[<b>]", verdict=None, reason="error")
    _, board = html.summary([decision(statement=EVIL, reason=EVIL, id="<i>", basis=None, items=(lost,))])
    assert "<script" not in board and "<i>" not in board
    assert "no verdict: test_x.py::test_a[&lt;b&gt;]" in board


def test_no_decisions_no_board():
    assert "Decisions" not in "".join(html.summary([]))


# --- one experiment -------------------------------------------------------------------------------------------


def test_block_shows_gates_arms_and_problems():
    gates = [gate(), gate(role="caveat", outcome="false", note="misses the SLO", text="a < b")]
    block = html.experiment(
        {"verdict": "caveated", "basis": "simulated", "decision": "cost", "reason": "why"},
        EVIL, gates, [arm(problems=("a late client",))], ["<svg>plot</svg>"], {"a": "#0072B2"},
    )  # fmt: skip
    for text in ("✓ held", "✗ false", "misses the SLO", "a &lt; b", "test_x.py:12", "6 of 6 repeats held"):
        assert text in block
    for text in ("99.8 %", "∞ s", "2.5 to ∞", "direct: a late client", "background:#0072B2", "<svg>plot</svg>"):
        assert text in block
    assert "<script" not in block and "/home/me" not in block


def test_short_times_read_in_milliseconds_and_repeats_say_deterministic():
    same = Figure(label="p50 tpot", value=0.0143, low=0.0143, high=0.0143, n=1, unit="s", deterministic=True)
    block = html.experiment({}, "", [], [arm(figures=(same,))], [], {})
    assert "14.3 ms" in block
    assert "deterministic" in block


# --- extras of real measurements --------------------------------------------------------------------------------

WITH_HTML = SimpleNamespace(getoption=lambda *_: "report.html")
PROFILE = Profile(model="qwen2.5-0.5b", accelerator="t4", engine_args={"max_model_len": 9216})
SHAPE = Shape(prompt_tokens=512, output_tokens=32)


@pytest.fixture
def ledger() -> Ledger:
    """A simulated experiment with a knee search, two arms, a gate on cost and a caveat that names the SLO."""
    lab = Lab(Sim(), max_repeats=6)
    ledger = Ledger("experiments/test_x.py::test_cost")
    with collecting(ledger):
        find_knee(
            lambda rate: lab.measure(Workload(arrivals=Poisson(rate=rate), shape=SHAPE, requests=150), PROFILE),
            low=4, high=80, stable=lambda m: m.queue_delay <= 0.5, resolution=0.5,
        )  # fmt: skip
        traffic = Workload(arrivals=Poisson(rate=8), shape=SHAPE, requests=150)
        batched = lab.measure(traffic, PROFILE, label="batched")
        limited = lab.measure(traffic, PROFILE.with_engine_args(max_num_seqs=4), label="limited")
        assert batched.cost_per_useful_request(e2e_s=5) <= 1.5 * limited.cost_per_useful_request(e2e_s=5)
        caveat(batched.p95 <= 2.0, "p95 misses the SLO")
        lab.measure(traffic, PROFILE, label="never asked for")
    return ledger


def test_extras_of_an_experiment(ledger):
    (extra,) = html.extras(ledger, WITH_HTML, {"verdict": "supported", "basis": "simulated"}, "A statement")
    content = extra["content"]
    assert extra["format_type"] == "html"
    for title in ("A statement", "Where the latency knee is", "Latency of all offered", "Queue on the server"):
        assert title in content
    assert "Cost against latency" in content and "SLO 2 s" in content
    assert content.count("<svg") == 4
    assert content.count("simulated</text>") == 4
    ids = re.findall(r'\bid="([^"]+)"', content)
    assert len(ids) == len(set(ids))


def test_table_and_plots_give_an_arm_one_colour(ledger):
    (extra,) = html.extras(ledger, WITH_HTML)
    swatch = re.search(r'background:(#\w+)"></span>limited<', extra["content"])
    assert swatch is not None and swatch[1] in {colour(index) for index in range(8)}
    assert swatch[1].lower() in extra["content"].split("Cost against latency", 1)[1]


def test_extras_are_the_same_again_and_run_nothing(ledger):
    pulled = [measurement.pulled for measurement in ledger.measurements]
    assert html.extras(ledger, WITH_HTML) == html.extras(ledger, WITH_HTML)
    assert [measurement.pulled for measurement in ledger.measurements] == pulled


def test_fleets_add_their_timeline_and_cold_start():
    lab, ledger = Lab(Sim(), max_repeats=6), Ledger("experiments/test_x.py::test_fleet")
    traffic = Workload(arrivals=Poisson(rate=1), shape=SHAPE, duration_s=500)
    with collecting(ledger):
        cold = lab.measure(traffic, PROFILE.on(Fleet(autoscaling=None)), label="from zero")
        warm = lab.measure(traffic, PROFILE.on(Fleet(autoscaling=None, warm=1)), label="warm")
        assert warm.replicas_ready(1) < cold.replicas_ready(1)
    (extra,) = html.extras(ledger, WITH_HTML)
    for text in ("Replicas, nodes and requests over time", "Where a cold start's time goes", "GPU s billed"):
        assert text in extra["content"]
    assert extra["content"].count("<svg") == 4


def test_no_extras_without_a_report_or_evidence(ledger):
    assert html.extras(ledger, SimpleNamespace(getoption=lambda *_: None)) == []
    assert html.extras(Ledger("test_x.py::test_unit"), WITH_HTML) == []


# --- a whole report -------------------------------------------------------------------------------------------

CONFTEST = """
import pytest
from pytest_gpulab.gates import Ledger
from pytest_gpulab.report import html
from tests.test_report_html import decision, gate, EVIL

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if call.when == "call" and "decided" in item.name:
        ledger = Ledger(item.nodeid, gates=[gate(text=EVIL)])
        report.gpulab = {"verdict": "supported", "decision": "admission", "basis": "simulated", "reason": EVIL}
        report.extras = html.extras(ledger, item.config, report.gpulab, EVIL)

def pytest_html_results_table_header(cells): html.header_cells(cells)
def pytest_html_results_table_row(report, cells): html.row_cells(report, cells)
def pytest_html_results_summary(prefix, summary, postfix): prefix.extend(html.summary([decision(statement=EVIL)]))
"""
TESTS = """
import pytest
def test_decided(): pass
def test_plain(): pass
def test_skipped(): pytest.skip("no")
def test_failed(): assert False
@pytest.fixture
def broken(): raise RuntimeError("setup")
def test_error(broken): pass
"""


@pytest.mark.parametrize("mode", [("--self-contained-html",), ()])
def test_report_of_passed_skipped_failed_and_broken_tests(pytester, mode):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_all=TESTS)
    done = pytester.runpytest_inprocess("-p", "no:gpulab", "--html=report.html", *mode)
    done.assert_outcomes(passed=2, skipped=1, failed=1, errors=1)
    page = (pytester.path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert page.index("gpulab-board") < page.index('id="results-table"')
    blob = re.search(r'data-jsonblob="([^"]*)"', page)
    assert blob is not None
    rows = [test for tests in json.loads(markup.unescape(blob[1]))["tests"].values() for test in tests]
    assert len(rows) == 5
    assert {len(row["resultsTableRow"]) for row in rows} == {6}
    assert [row["verdict"].count("gpulab-badge") for row in rows] == [1, 0, 0, 0, 0]
    assert [len(row["extras"]) for row in rows] == [1, 0, 0, 0, 0]


def test_an_arm_with_a_fleet_adds_its_columns():
    ready = Figure(label="first replica ready", value=441.0, low=430.0, high=450.0, n=6, unit="s")
    fleet = arm(figures=(ready,), profile={**arm().profile, "fleet": {"warm": 0}})
    block = html.experiment({}, "", [], [fleet, arm()], [], {})
    assert "1st ready" in block and "441 s<small>430 to 450</small>" in block
    assert "1st ready" not in html.experiment({}, "", [], [arm()], [], {})
