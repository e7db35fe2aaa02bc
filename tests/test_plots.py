"""Plots: what a reader takes from them, read back from the SVG."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pytest_gpulab.gates import Figure
from pytest_gpulab.report.canvas import Canvas, Entry, colour, drawing, number, ticks
from pytest_gpulab.report.plots import (
    Arm,
    CostPoint,
    RatePoint,
    cold_start_stages,
    cost_vs_latency,
    fleet_timeline,
    latency_cdf,
    queue_depth,
    rate_vs_p95,
)
from pytest_gpulab.run import REQUEST_DTYPE, SERVER_DTYPE, Provenance, Run

SVG = "{http://www.w3.org/2000/svg}"


def run(requests: int = 200, *, e2e_s: float = 1.0, lost: int = 0, seconds: int = 60) -> Run:
    """Requests each half a second, answered in about `e2e_s`; the last `lost` of them never."""
    table = np.zeros(requests, REQUEST_DTYPE)
    table["scheduled"] = table["sent"] = 0.5 * np.arange(requests)
    spread = np.linspace(0.8, 1.2, requests)
    table["first_token"] = table["scheduled"] + 0.1 * spread
    table["last_token"] = table["scheduled"] + e2e_s * spread
    table["ok"] = np.arange(requests) < requests - lost
    for column in ("first_token", "last_token"):
        table[column][~table["ok"]] = np.nan
    server = np.zeros(seconds, SERVER_DTYPE)
    server["time"] = np.arange(seconds)
    server["num_requests_running"] = 4
    server["num_requests_waiting"] = np.arange(seconds) % 7
    return Run(table, server, {}, requests / 2, Provenance("sim", "simulated", 0, "0" * 16, "t4"))


def figure(value: float, low: float | None = None, high: float | None = None, unit: str = "s") -> Figure:
    low, high = value if low is None else low, value if high is None else high
    return Figure(label="p95 e2e", value=value, low=low, high=high, n=6, unit=unit)


ARMS = [Arm("direct", run(lost=26), 0), Arm("queued & bounded", run(e2e_s=3.0), 1)]
POINTS = [
    RatePoint(0.5, figure(2.0, 1.9, 2.1), "held"),
    RatePoint(1.0, figure(4.0, 3.5, 5.0), "held"),
    RatePoint(1.5, figure(9.0, 5.0, 20.0), "undecided"),
    RatePoint(2.0, figure(math.inf, 20.0, math.inf), "false"),
]
COSTS = [
    CostPoint("batched", figure(1e-5, unit="USD"), figure(1.4, 1.2, 1.5), 0),
    CostPoint("limited", figure(3e-4, unit="USD"), figure(math.inf, 2.0, math.inf), 1),
]

COLD = (
    (0.0, "replicas 1 wanted 0 ready, nodes 0, nodeclaims 0"),
    (5.0, "NodeClaim a created"),
    (6.0, "replicas 1 wanted 0 ready, nodes 0, nodeclaims 1"),
    (10.0, "Node b created"),
    (10.0, "replicas 1 wanted 0 ready, nodes 1, nodeclaims 1"),
    (15.0, "Pod c scheduled"),
    (35.0, "Pod c started"),
    (50.0, "Pod c ready"),
    (50.0, "replicas 3 wanted 1 ready, nodes 1, nodeclaims 1"),
)
NEVER = COLD[:5]
FLEETS = [
    Arm("cold", replace(run(), timeline=COLD), 0),
    Arm("never up", replace(run(lost=200), timeline=NEVER), 1),
]

PLOTS: dict[str, Callable[..., str]] = {
    "rate": lambda **rest: rate_vs_p95(POINTS, (1.0, 2.0), basis="simulated", **rest),
    "cdf": lambda **rest: latency_cdf(ARMS, basis="simulated", **rest),
    "queue": lambda **rest: queue_depth(ARMS, basis="simulated", **rest),
    "fleet": lambda **rest: fleet_timeline(FLEETS, basis="simulated", **rest),
    "stages": lambda **rest: cold_start_stages(FLEETS, basis="simulated", **rest),
    "cost": lambda **rest: cost_vs_latency(COSTS, basis="simulated", slo_s=2.0, **rest),
}
every_plot = pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def ids(svg: str) -> list[str]:
    return re.findall(r'\bid="([^"]+)"', svg)


# --- every plot -----------------------------------------------------------------------------------------------


@every_plot
def test_says_its_basis_and_describes_itself(draw):
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert "simulated" in texts(svg)
    assert "(simulated)" in root.findtext(f"{SVG}title", "")
    assert re.search("p95|waiting|ready|Ready", root.findtext(f"{SVG}desc", ""))
    assert root.get("role") == "img"
    assert all(name in ids(svg) for name in root.get("aria-labelledby", "").split())


@every_plot
def test_is_the_same_for_equal_data(draw):
    assert draw(key="item") == draw(key="item")


@every_plot
def test_carries_nothing_of_the_machine(draw):
    svg = draw()
    assert "matplotlib" not in svg.lower()
    assert "<metadata" not in svg
    assert not re.search(r"20\d\d-\d\d-\d\d", svg)


def test_ids_on_one_page_do_not_clash():
    page = [draw(key=key) for draw in PLOTS.values() for key in ("one", "two")]
    all_ids = [name for svg in page for name in ids(svg)]
    assert len(all_ids) == len(set(all_ids))
    for svg in page:
        used = {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)}
        assert used <= set(ids(svg))


@every_plot
def test_text_stays_inside_the_drawing(draw):
    svg = draw()
    width, height = (float(part) for part in ElementTree.fromstring(svg).get("viewBox", "").split()[2:])
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        words = "".join(element.itertext())
        x, y = place(element)
        wide = 0.62 * len(words) * float(re.search(r"font-size: ([\d.]+)px", element.get("style", ""))[1])
        turned = "rotate" in element.get("transform", "")
        anchor = re.search(r"text-anchor: (\w+)", element.get("style", ""))
        share = {"middle": 0.5, "end": 1.0}.get(anchor[1] if anchor else "start", 0.0)
        left, right = (x, x) if turned else (x - share * wide, x + (1 - share) * wide)
        assert left >= -3 and right <= width + 3 and (y - wide if turned else y) >= 0 and y <= height, words


def place(element: ElementTree.Element) -> tuple[float, float]:
    """Where a text is anchored, in SVG units."""
    moved = re.search(r"translate\(([\d.]+) ([\d.]+)\)", element.get("transform", ""))
    if moved:
        return float(moved[1]), float(moved[2])
    return float(element.get("x", "nan")), float(element.get("y", "nan"))


def test_matplotlib_comes_with_the_first_plot_and_its_settings_stay():
    program = """
import sys
from pytest_gpulab.report import html, plots
assert "matplotlib" not in sys.modules
drawn = plots.rate_vs_p95([], (0.0, float("inf")), basis="simulated")
import matplotlib
assert (matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["font.size"]) == ("path", 10)
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_many_long_runs_stay_small():
    arms = [Arm(f"arm {index}", run(20_000, e2e_s=1.5**index, seconds=3_600), index) for index in range(12)]
    for svg in (latency_cdf(arms, basis="simulated"), queue_depth(arms, basis="simulated")):
        assert len(svg.encode()) < 62_000
        assert "and 4 more: see the table" in texts(svg)


# --- rate against p95 -----------------------------------------------------------------------------------------


def axis_position(svg: str, at: float) -> float:
    """Where the label of value `at` of the x axis stands, in SVG units."""
    axis = [
        (float(element.get("x", "nan")), float(element.get("y", "nan")))
        for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if "".join(element.itertext()).strip() == number(at)
    ]
    return max(axis, key=lambda place: place[1])[0]


def test_knee_band_lies_between_its_rates():
    svg = rate_vs_p95(POINTS, (1.0, 2.0), basis="simulated")
    band = re.search(r'<path d="M ([\d.]+) [\d.]+\nL ([\d.]+) [^"]*"[^>]*fill: #f6d8c3', svg)
    assert band is not None
    assert float(band[1]) == pytest.approx(axis_position(svg, 1), abs=0.5)
    assert float(band[2]) == pytest.approx(axis_position(svg, 2), abs=0.5)


@pytest.mark.parametrize(
    ("knee", "says"),
    [
        ((1.0, 2.0), "knee between 1 and 2 requests/s"),
        ((2.0, math.inf), "stable at 2 requests/s; no unstable rate found"),
        ((0.0, 0.5), "unstable at 0.5 requests/s already; no stable rate found"),
        ((0.0, math.inf), "no rate could be decided"),
    ],
)
def test_knee_is_said_in_words(knee, says):
    assert says in texts(rate_vs_p95(POINTS, knee, basis="simulated"))


def test_rates_are_listed_by_stability_and_infinite_p95_is_marked():
    said = texts(rate_vs_p95(POINTS, (1.0, 2.0), basis="simulated"))
    assert said[said.index("stable") + 1] == "0.5, 1 requests/s"
    assert said[said.index("unstable") + 1] == "2 requests/s"
    assert said[said.index("undecided") + 1] == "1.5 requests/s"
    assert said.count("∞") == 1


# --- latency distribution -------------------------------------------------------------------------------------


def test_every_arm_is_named_with_its_delivered_share():
    said = texts(latency_cdf(ARMS, basis="simulated"))
    assert {"direct", "queued & bounded"} <= set(said)
    assert any("p95 ∞ s, 87 % delivered" in text for text in said)
    assert any("100 % delivered" in text for text in said)


def test_undelivered_requests_keep_the_curve_below_one():
    svg = latency_cdf([Arm("half", run(lost=100), 0)], basis="simulated")
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", _curve(svg, colour(0)))]
    bottom, top = (_row(svg, text) for text in ("0 %", "100 %"))
    assert (bottom - min(heights)) / (bottom - top) == pytest.approx(0.5, abs=0.01)


def _curve(svg: str, shade: str) -> str:
    """Path data of the longest line drawn in `shade`."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {shade.lower()}', svg)
    return max(paths, key=len)


def _row(svg: str, text: str) -> float:
    """Height of the grid line labelled `text`: labels are centred on theirs, 2.7 units above the baseline."""
    for element in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        if "".join(element.itertext()).strip() == text:
            return float(element.get("y", "nan")) - 2.85
    raise AssertionError(f"{text} is not in the plot")


def test_an_arm_keeps_its_colour_in_every_plot():
    arm = [Arm("only", run(), 2)]
    point = [CostPoint("only", figure(1e-5, unit="USD"), figure(1.4), 2)]
    for svg in (
        latency_cdf(arm, basis="simulated"),
        queue_depth(arm, basis="simulated"),
        cost_vs_latency(point, basis="simulated"),
    ):
        assert colour(2).lower() in svg
        assert colour(0).lower() not in svg


@pytest.mark.parametrize("arms", [[], [Arm("nothing", run(1, lost=1, seconds=0), 0)], [Arm("one", run(1), 0)]])
def test_little_data_draws_too(arms):
    for draw in (latency_cdf, queue_depth):
        assert draw(arms, basis="measured").startswith("<svg")


# --- queue and cost -------------------------------------------------------------------------------------------


def test_queue_keeps_the_peak_of_a_long_run():
    long = run(seconds=20_000)
    long.server["num_requests_waiting"][:] = 0
    long.server["num_requests_waiting"][12_345] = 99
    svg = queue_depth([Arm("long", long, 0)], basis="emulated")
    assert "at most 99 waiting, 4 running" in texts(svg)
    drawn = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", _curve(svg, colour(0)))]
    assert max(drawn) - min(drawn) == pytest.approx(99 / 100 * (_row(svg, "0") - _row(svg, "100")), rel=0.02)


def test_cost_shows_the_slo_and_usd_per_thousand():
    said = texts(cost_vs_latency(COSTS, basis="simulated", slo_s=2.0))
    assert "SLO 2 s" in said
    assert any(text.startswith("USD 0.01 per 1,000, p95 1.4 s") for text in said)
    assert said.count("∞") == 1


def test_missing_server_metrics_are_said():
    svg = queue_depth([*ARMS, Arm("endpoint", run(seconds=0), 2)], basis="measured")
    assert "1 without server metrics" in texts(svg)


# --- the canvas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123, "0.00123"),
        (1.2, "1.2"),
        (1230.4, "1,230"),
        (math.inf, "∞"),
        (math.nan, "–"),
        (99.96, "100"),
    ],
)
def test_numbers_read_as_people_write_them(value, text):
    assert number(value) == text


def test_ticks_are_round_and_inside():
    assert ticks(0, 2.24, log=False, most=6) == [0, 0.5, 1.0, 1.5, 2.0]
    assert ticks(0.02, 5, log=True, most=6) == pytest.approx([0.03, 0.1, 0.3, 1, 3])


def test_long_labels_wrap_and_markup_is_escaped():
    with drawing():
        svg = Canvas("t", "s", "simulated", [Entry("<script>alert(1)</script> " + "word " * 40)]).svg("k", "<d>")
    assert "<script" not in svg
    lines = [text for text in texts(svg) if "word" in text or "script" in text]
    assert len(lines) == 3 and lines[-1].endswith("…")


def test_a_price_in_a_label_is_no_formula():
    price = "spot at $0.2, 50% of $0.4"
    with drawing():
        svg = Canvas(price, "s", "simulated", [Entry(price)]).svg("k", "d")
    assert texts(svg).count(price) == 2


def test_a_fleets_timeline_tells_when_it_was_ready_and_what_it_cost():
    found = " ".join(texts(fleet_timeline(FLEETS, basis="simulated")))
    assert "first ready at 50 s, at most 1; 100 GPU s billed" in found
    assert "none ready" in found
    for label in ("replicas", "GPU nodes", "requests"):
        assert label in found


def test_cold_start_bars_are_as_long_as_the_stages():
    svg = cold_start_stages(FLEETS, basis="simulated")
    found = " ".join(texts(svg))
    assert "cold: Ready after 50 s" in found
    assert "never up: never Ready" in found
    widths = {
        shade: max(float(x) for x in re.findall(r"[ML] ([\d.]+) ", path))
        - min(float(x) for x in re.findall(r"[ML] ([\d.]+) ", path))
        for path, shade in re.findall(r'd="(M [^"]*?)z[^"]*"[^>]*style="fill: (#[0-9a-f]+)', svg)
        if shade in ("#e69f00", "#009e73")
    }
    assert widths["#e69f00"] / widths["#009e73"] == pytest.approx(20 / 15, rel=0.02), "image 20 s, model 15 s"


def test_warm_replicas_show_the_cold_start_before_the_run():
    """Their stages ended before the run began; the bar counts from the deployment."""
    shifted = tuple((at - 60.0, text) for at, text in COLD)
    svg = cold_start_stages([Arm("warm", replace(run(), timeline=shifted), 0)], basis="simulated")
    assert "warm: Ready after 50 s" in " ".join(texts(svg))
