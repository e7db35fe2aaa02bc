"""The plots people look for, as functions from data to an inline SVG.

Percentiles and curves are over all offered requests: a request that was never delivered keeps its arm's curve
below 1 instead of leaving it. Every plot says its basis in the corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_gpulab.figures import gpu_seconds, latencies, peak_replicas, percentile, replicas_ready
from pytest_gpulab.gates import Figure
from pytest_gpulab.report.canvas import QUIET, Canvas, Entry, Panel, colour, drawing, number, wants_log
from pytest_gpulab.rule import Outcome
from pytest_gpulab.run import Run
from pytest_gpulab.timeline import Counts, Stage, cold_start, counts

MOST_ARMS = 8
"""More curves than that are not told apart; the arm table has them all."""

_CURVE_POINTS = 2600
"""Points that all curves of one plot share: keeps an SVG below 60 KB."""


@dataclass(frozen=True)
class Arm:
    """One option of an experiment and its first run. `index` is its place among all arms: its colour."""

    label: str
    run: Run
    index: int


@dataclass(frozen=True)
class RatePoint:
    """A rate that a knee search tried (requests/s), its p95 end to end latency (s), and if it was stable."""

    rate: float
    p95: Figure
    stable: Outcome


@dataclass(frozen=True)
class CostPoint:
    """An arm's USD per useful request and its p95 end to end latency (s)."""

    label: str
    usd: Figure
    p95: Figure
    index: int


# --- rate against p95 -----------------------------------------------------------------------------------

_STABILITY: dict[Outcome, tuple[str, str, str]] = {
    "held": ("stable", "#0072B2", "o"),
    "false": ("unstable", "#D55E00", "X"),
    "undecided": ("undecided", QUIET, "D"),
}
_BAND = "#f6d8c3"


def rate_vs_p95(
    points: Sequence[RatePoint],
    knee: tuple[float, float],
    *,
    basis: str,
    key: str = "",
    title: str = "Where the latency knee is",
) -> str:
    """p95 end to end latency over the request rate.

    `knee` is the highest stable and the lowest unstable rate (requests/s); 0 and infinity where there is none.
    """
    points = sorted(points, key=lambda point: point.rate)
    bounds = [bound for point in points for bound in _bounds(point.p95)]
    ceiling = _ceiling(bounds)
    with drawing():
        canvas = Canvas(title, _knee_text(*knee), basis, _stability_key(points, knee))
        panel = canvas.panels[0]
        _span(panel.span_x, [point.rate for point in points], ceiling=0)
        _span(panel.span_y, bounds, ceiling)
        _mark_knee(panel.axes, *knee)
        known = [point for point in points if np.isfinite(point.p95.value)]
        panel.axes.plot([p.rate for p in known], [p.p95.value for p in known], color="#b6bdc5", linewidth=1.2)
        for point in points:
            _, shade, marker = _STABILITY[point.stable]
            _interval(panel.axes, "y", point.rate, point.p95, ceiling, shade)
            _dot(panel.axes, point.rate, min(point.p95.value, ceiling), shade, marker, point.stable == "undecided")
            _mark_infinite(panel.axes, point.rate, ceiling, point.p95)
        panel.finish("offered rate (requests/s)", "p95 end to end (s)")
        text = "; ".join(f"{number(p.rate)} requests/s: {_figure(p.p95)}, {_STABILITY[p.stable][0]}" for p in points)
        return canvas.svg(key, f"{_knee_text(*knee)}. p95 end to end latency by rate: {text}.")


def _knee_text(stable: float, unstable: float) -> str:
    if stable > 0 and unstable < np.inf:
        return f"knee between {number(stable)} and {number(unstable)} requests/s"
    if stable > 0:
        return f"stable at {number(stable)} requests/s; no unstable rate found"
    if unstable < np.inf:
        return f"unstable at {number(unstable)} requests/s already; no stable rate found"
    return "no rate could be decided"


def _stability_key(points: Sequence[RatePoint], knee: tuple[float, float]) -> list[Entry]:
    entries = []
    for outcome, (word, shade, marker) in _STABILITY.items():
        rates = [number(point.rate) for point in points if point.stable == outcome]
        if rates:
            detail = ", ".join(rates) + " requests/s"
            entries.append(Entry(word, detail, shade, marker, hollow=outcome == "undecided"))
    if knee[0] > 0 and knee[1] < np.inf:
        entries.append(Entry("knee", "the shaded rates", _BAND, "s"))
    bars = "bars: interval over the repeats"
    if any(not np.isfinite(point.p95.value) for point in points):
        bars += "; ∞: undelivered requests reach into the p95"
    return [*entries, Entry("", bars, "none")]


def _mark_knee(axes: Any, stable: float, unstable: float) -> None:
    """Shade the bracket, or draw the one side of it that was found."""
    if stable > 0 and unstable < np.inf:
        axes.axvspan(stable, unstable, color=_BAND, linewidth=0, zorder=0, gid="knee")
        return
    for rate in (stable, unstable):
        if 0 < rate < np.inf:
            axes.axvline(rate, color=_BAND, linewidth=3, zorder=0)


# --- latency distribution -------------------------------------------------------------------------------


def latency_cdf(
    arms: Sequence[Arm], *, basis: str, key: str = "", title: str = "Latency of all offered requests"
) -> str:
    """Share of offered requests answered within a time, per arm: end to end solid, first token dashed."""
    shown = arms[:MOST_ARMS]
    curves = [(arm, np.sort(latencies(arm.run, "e2e")), np.sort(latencies(arm.run, "ttft"))) for arm in shown]
    entries = [Entry(arm.label, _latency_text(e2e), colour(arm.index)) for arm, e2e, _ in curves]
    with drawing():
        canvas = Canvas(
            title, "first repeat; solid: end to end, dashed: first token", basis, _with_rest(entries, arms)
        )
        panel = canvas.panels[0]
        right = _span_time(
            panel, np.concatenate([seconds for _, *pair in curves for seconds in pair] or [np.ones(1)])
        )
        most = max(20, _CURVE_POINTS // (4 * max(1, len(curves))))
        for arm, e2e, ttft in curves:
            _cdf(panel.axes, ttft, right, most, color=colour(arm.index), linestyle=(0, (3, 2)), linewidth=1.1)
            _cdf(panel.axes, e2e, right, most, color=colour(arm.index))
        panel.span_y(0, 1.03)
        panel.finish("time since the request was due (s)", "share of offered requests", y_format=_share)
        text = "; ".join(f"{arm.label}: {_latency_text(e2e)}" for arm, e2e, _ in curves)
        return canvas.svg(key, f"Cumulative latency. {text}.")


def _latency_text(e2e: NDArray[Any]) -> str:
    if not e2e.size:
        return "no request offered"
    p50, p95 = percentile(e2e, 50), percentile(e2e, 95)
    return f"p50 {number(p50)}, p95 {number(p95)} s, {_share(float(np.isfinite(e2e).mean()))} delivered"


def _share(value: float) -> str:
    """Per cent, never rounded up to 100."""
    percent = 100 * value
    if abs(percent - round(percent)) < 1e-9:
        return f"{percent:.0f} %"
    return f"{min(percent, 99.99):.2f} %" if percent > 99 else f"{percent:.1f} %"


def _span_time(panel: Panel, seconds: NDArray[Any]) -> float:
    """Set the time axis so that the slowest answer is on it, and return its end (s)."""
    finite = seconds[np.isfinite(seconds) & (seconds > 0)]
    if not finite.size:
        finite = np.ones(1)
    low, typical = np.quantile(finite, (0.01, 0.99))
    high = float(finite.max())
    log = wants_log((low, typical))
    right = high * (1.25 if log else 1.06)
    panel.span_x(float(np.quantile(finite, 0.002)) / 1.25 if log else 0.0, right, log=log)
    return right


def _cdf(axes: Any, seconds: NDArray[Any], right: float, most: int, **style: Any) -> None:
    """One curve of at most `most` steps. What was never delivered is the gap between its end and 100 %."""
    delivered = seconds[np.isfinite(seconds)]
    if not delivered.size:
        axes.plot([0, right], [0, 0], **style)
        return
    ranks = np.unique(np.linspace(0, delivered.size - 1, most).round().astype(int))
    heights = (ranks + 1) / seconds.size
    x = np.concatenate(([delivered[0]], delivered[ranks], [right]))
    y = np.concatenate(([0.0], heights, [heights[-1]]))
    axes.plot(x, y, drawstyle="steps-post", **style)


# --- queue depth ----------------------------------------------------------------------------------------


def queue_depth(
    arms: Sequence[Arm], *, basis: str, key: str = "", title: str = "Queue on the server over time"
) -> str:
    """Requests waiting and running in the engine over time, per arm, from the server's own metrics."""
    with_metrics = [arm for arm in arms if arm.run.server.size]
    shown = with_metrics[:MOST_ARMS]
    entries = [Entry(arm.label, _depth_text(arm.run), colour(arm.index)) for arm in shown]
    if len(with_metrics) < len(arms):
        entries.append(Entry("", f"{len(arms) - len(with_metrics)} without server metrics", "none"))
    with drawing():
        canvas = Canvas(
            title, "first repeat; waiting above, running below", basis, _with_rest(entries, with_metrics), panels=2
        )
        most = max(20, _CURVE_POINTS // (4 * max(1, len(shown))))
        end_s = max((float(arm.run.server["time"][-1]) for arm in shown), default=1.0)
        for panel, name in zip(canvas.panels, ("waiting", "running"), strict=True):
            top = 1.0
            for place, arm in enumerate(shown):
                time, depth = _decimate(arm.run.server["time"], arm.run.server[f"num_requests_{name}"], most)
                width = _width(place, len(shown))
                panel.axes.plot(time, depth, drawstyle="steps-post", color=colour(arm.index), linewidth=width)
                top = max(top, float(depth.max()))
            panel.span_x(0, end_s or 1.0)
            panel.span_y(0, 1.08 * top)
            panel.finish("time since the run's start (s)", f"requests {name}", rows=4, last=name == "running")
        text = "; ".join(f"{arm.label}: {_depth_text(arm.run)}" for arm in shown)
        return canvas.svg(key, f"Requests waiting and running over time. {text}.")


def _width(place: int, arms: int) -> float:
    """Line widths that leave equal curves visible below each other."""
    return 1.2 + 2.0 * (1 - (place + 1) / arms)


def _depth_text(run: Run) -> str:
    return (
        f"at most {run.server['num_requests_waiting'].max()} waiting, "
        f"{run.server['num_requests_running'].max()} running"
    )


def _decimate(time: NDArray[Any], depth: NDArray[Any], most: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """At most `most` samples that keep the lowest and highest of every stretch, so no peak is lost."""
    if time.size <= most:
        return time, depth
    keep = {0, time.size - 1}
    for stretch in np.array_split(np.arange(time.size), max(1, (most - 2) // 2)):
        keep |= {int(stretch[depth[stretch].argmin()]), int(stretch[depth[stretch].argmax()])}
    index = np.array(sorted(keep))
    return time[index], depth[index]


# --- fleets ---------------------------------------------------------------------------------------------


def fleet_timeline(
    arms: Sequence[Arm], *, basis: str, key: str = "", title: str = "Replicas, nodes and requests over time"
) -> str:
    """Replicas Ready (dashed: wanted), GPU nodes, and requests in the servers over time, per arm with a timeline."""
    shown = arms[:MOST_ARMS]
    entries = [Entry(arm.label, _fleet_text(arm.run), colour(arm.index)) for arm in shown]
    with drawing():
        canvas = Canvas(title, "first repeat; dashed: replicas wanted", basis, _with_rest(entries, arms), panels=3)
        end_s = max((arm.run.duration_s for arm in shown), default=1.0)
        most = max(20, _CURVE_POINTS // (4 * max(1, len(shown))))
        tops = [_draw_fleet(canvas.panels, arm, _width(place, len(shown)), most) for place, arm in enumerate(shown)]
        labels = ("replicas", "GPU nodes", "requests")
        for panel, label, *heights in zip(canvas.panels, labels, *tops, strict=True):
            panel.span_x(0, end_s)
            panel.span_y(0, 1.12 * max(1.0, *heights))
            panel.finish("time since the run's start (s)", label, rows=3, last=label == labels[-1])
        text = "; ".join(f"{arm.label}: {_fleet_text(arm.run)}" for arm in shown)
        return canvas.svg(key, f"Replicas, nodes and requests over time. {text}.")


def _draw_fleet(panels: Sequence[Panel], arm: Arm, width: float, most: int) -> tuple[float, float, float]:
    """One arm's lines in the three panels, of at most `most` samples; the highest value in each."""
    replicas, nodes, requests = (panel.axes for panel in panels)
    style: dict[str, Any] = {"drawstyle": "steps-post", "color": colour(arm.index)}
    steps = _within(counts(arm.run.timeline), arm.run.duration_s)
    moments = [step.at for step in steps]
    replicas.plot(moments, [step.wanted for step in steps], linestyle=(0, (2, 2)), linewidth=0.9, **style)
    replicas.plot(moments, [step.ready for step in steps], linewidth=width, **style)
    nodes.plot(moments, [step.nodes for step in steps], linewidth=width, **style)
    active = arm.run.server["num_requests_running"] + arm.run.server["num_requests_waiting"]
    requests.plot(*_decimate(arm.run.server["time"], active, most), linewidth=width, **style)
    return (
        float(max((max(step.wanted, step.ready) for step in steps), default=0)),
        float(max((step.nodes for step in steps), default=0)),
        float(active.max(initial=0)),
    )


def _fleet_text(run: Run) -> str:
    first, most = replicas_ready(run, 1), peak_replicas(run)
    ready = "none ready" if np.isinf(first) else f"first ready at {number(first)} s, at most {most:.0f}"
    return f"{ready}; {number(gpu_seconds(run))} GPU s billed"


def _within(steps: Sequence[Counts], end_s: float) -> list[Counts]:
    """The steps between a run's start and its end; the first begins there, the last lasts until then."""
    before = [step for step in steps if step.at <= 0][-1:]
    during = [step for step in steps if 0 < step.at < end_s]
    found = [step._replace(at=0.0) for step in before] + during
    return [*found, found[-1]._replace(at=end_s)] if found else []


_STAGE_WORDS: dict[Stage, tuple[str, str]] = {
    "nodeclaim": ("NodeClaim created", "#9aa5b1"),
    "node": ("node there", "#56B4E9"),
    "scheduled": ("GPU allocatable, pod scheduled", "#0072B2"),
    "container": ("image pulled, container started", "#E69F00"),
    "ready": ("model loaded, pod Ready", "#009E73"),
}


def cold_start_stages(
    arms: Sequence[Arm], *, basis: str, key: str = "", title: str = "Where a cold start's time goes"
) -> str:
    """One bar an arm: the seconds each stage of its first cold start took, up to the first Ready replica."""
    shown = arms[:MOST_ARMS]
    bars = [(arm.label, _stage_ends(arm.run)) for arm in shown]
    entries = [Entry(words, "", shade, "s") for words, shade in _STAGE_WORDS.values()]
    with drawing():
        canvas = Canvas(
            title, "first repeat; stage by stage until the first replica is Ready", basis, _with_rest(entries, arms)
        )
        panel = canvas.panels[0]
        panel.span_x(0, 1.04 * max(1.0, *(end for _, ends in bars for end in ends.values())))
        panel.span_y(0, len(bars) + 0.1)
        for row, (label, ends) in enumerate(reversed(bars)):
            for (stage, end), start in zip(ends.items(), (0.0, *ends.values()), strict=False):
                shade = _STAGE_WORDS[stage][1]
                panel.axes.barh(row + 0.3, end - start, 0.4, start, color=shade, zorder=2)
            panel.axes.text(0, row + 0.56, f" {label}: {_ready_text(ends)}", size=7.5, va="bottom")
        panel.finish("time since the deployment (s)", "", y_format=lambda value: "", rows=1)
        return canvas.svg(key, f"Cold start by stage. {'; '.join(_stages_text(*bar) for bar in bars)}.")


def _stage_ends(run: Run) -> dict[Stage, float]:
    """Seconds from the deployment to the end of each stage. Warm replicas were deployed before the run's start."""
    deployed = min([0.0, *(at for at, _ in run.timeline)])
    return {stage: at - deployed for stage, at in cold_start(run.timeline).items()}


def _ready_text(ends: dict[Stage, float]) -> str:
    return f"Ready after {number(ends['ready'])} s" if "ready" in ends else "never Ready"


def _stages_text(label: str, ends: dict[Stage, float]) -> str:
    return f"{label}: " + ", ".join(f"{_STAGE_WORDS[stage][0]} after {number(end)} s" for stage, end in ends.items())


# --- cost against latency -------------------------------------------------------------------------------

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")


def cost_vs_latency(
    points: Sequence[CostPoint],
    *,
    basis: str,
    slo_s: float | None = None,
    key: str = "",
    title: str = "Cost against latency",
) -> str:
    """USD per 1,000 useful requests over p95 end to end latency; `slo_s` is the p95 that was promised (s)."""
    shown = points[:MOST_ARMS]
    entries = [
        Entry(
            p.label, f"USD {number(1000 * p.usd.value)} per 1,000, p95 {_figure(p.p95)}", colour(p.index), _shape(p)
        )
        for p in shown
    ]
    slo = [] if slo_s is None else [slo_s]
    latency = [*(bound for point in shown for bound in _bounds(point.p95)), *slo]
    usd = [1000 * bound for point in shown for bound in _bounds(point.usd)]
    right, top = _ceiling(latency), _ceiling(usd)
    with drawing():
        canvas = Canvas(title, "lower left is better", basis, _with_rest(entries, points))
        panel = canvas.panels[0]
        _span(panel.span_x, latency, right)
        _span(panel.span_y, usd, top)
        for point in shown:
            cost = _times(point.usd, 1000)
            x, y = min(point.p95.value, right), min(cost.value, top)
            _interval(panel.axes, "x", y, point.p95, right, colour(point.index))
            _interval(panel.axes, "y", x, cost, top, colour(point.index))
            _dot(panel.axes, x, y, colour(point.index), _shape(point), False)
            _mark_infinite(panel.axes, x, y, point.p95, cost)
        if slo_s is not None:
            _mark_slo(panel.axes, slo_s)
        panel.finish("p95 end to end (s)", "USD per 1,000 useful requests")
        text = "; ".join(f"{entry.label}: {entry.detail}" for entry in entries)
        promise = "" if slo_s is None else f" SLO: p95 at most {number(slo_s)} s."
        return canvas.svg(key, f"Cost against latency. {text}.{promise}")


def _shape(point: CostPoint) -> str:
    return _MARKERS[point.index % len(_MARKERS)]


def _times(figure: Figure, factor: float) -> Figure:
    scaled = {name: getattr(figure, name) * factor for name in ("value", "low", "high")}
    return figure.model_copy(update=scaled)


def _mark_slo(axes: Any, slo_s: float) -> None:
    axes.axvline(slo_s, color="#57606a", linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
    axes.axvspan(slo_s, axes.get_xlim()[1], color="#f4f5f7", linewidth=0, zorder=0)
    axes.annotate(
        f"SLO {number(slo_s)} s", (slo_s, 1), (3, -3), xycoords=("data", "axes fraction"),
        textcoords="offset points", va="top", size=7.5, color="#57606a",
    )  # fmt: skip


# --- shared ---------------------------------------------------------------------------------------------


def _with_rest(entries: list[Entry], arms: Sequence[object]) -> list[Entry]:
    """The key, saying how many arms are not drawn."""
    rest = len(arms) - MOST_ARMS
    return [*entries, Entry("", f"and {rest} more: see the table", "none")] if rest > 0 else entries


def _figure(figure: Figure) -> str:
    """Value, unit, and its interval where there is one."""
    text = f"{number(figure.value)} {figure.unit}"
    spread = figure.low != figure.value or figure.high != figure.value
    return text + (f" [{number(figure.low)}, {number(figure.high)}]" if spread else "")


def _bounds(figure: Figure) -> list[float]:
    return [figure.low, figure.value, figure.high]


def _ceiling(values: Sequence[float]) -> float:
    """Where infinite values are drawn: above all finite ones."""
    finite = [value for value in values if np.isfinite(value)]
    return 1.35 * max(finite, default=1.0)


def _span(set_span: Any, values: Sequence[float], ceiling: float) -> None:
    """Set an axis around `values`, from 0 on a linear axis; infinite values lie at `ceiling`."""
    finite = [value for value in values if 0 < value < np.inf] or [1.0]
    high = max(finite) if all(np.isfinite(values)) else ceiling
    if wants_log(finite):
        set_span(min(finite) / 1.4, high * 1.5, log=True)
    else:
        set_span(0, high * 1.12)


def _interval(axes: Any, along: str, other: float, figure: Figure, ceiling: float, shade: str) -> None:
    """A bar from the low to the high bound, cut at `ceiling`; none where both are equal."""
    low, high = min(figure.low, ceiling), min(figure.high, ceiling)
    if low == high:
        return
    across, span = [other, other], [low, high]
    x, y = (span, across) if along == "x" else (across, span)
    cap = "|" if along == "x" else "_"
    axes.plot(x, y, color=shade, linewidth=1.1, alpha=0.75, marker=cap, markersize=6)


def _dot(axes: Any, x: float, y: float, shade: str, marker: str, hollow: bool) -> None:
    face = "white" if hollow else shade
    axes.plot([x], [y], color=shade, marker=marker, markersize=6.5, markerfacecolor=face, linestyle="", zorder=3)


def _mark_infinite(axes: Any, x: float, y: float, *figures: Figure) -> None:
    """Write ∞ above a dot that stands for an infinite value: undelivered requests reach into the percentile."""
    if any(not np.isfinite(figure.value) for figure in figures):
        axes.annotate("∞", (x, y), (0, 5), textcoords="offset points", ha="center")
