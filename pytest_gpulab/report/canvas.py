"""The frame that every plot shares: title, basis tag, key column, and a small accessible SVG.

Matplotlib draws into a `Figure` of its own, never into pyplot's global state, and is imported with the first
plot. The SVG that comes out depends on the data alone: no dates, no random ids, nothing from the machine.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2328"
QUIET = "#59636e"
GRID = "#e4e7eb"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#E69F00", "#222222", "#56B4E9", "#8C6D46")
"""Colours of arms, told apart with any kind of colour vision (Okabe and Ito, darkened for white paper)."""

LOG_FROM = 30
"""An axis is logarithmic when its largest value is more than so many times its smallest."""

_WIDTH_IN = 7.6
_LEFT_IN, _KEY_IN, _TOP_IN, _BOTTOM_IN = 0.66, 2.82, 0.68, 0.5
_ENTRY_IN, _LINE_IN = 0.165, 0.145
_LABEL_CHARACTERS, _DETAIL_CHARACTERS = 34, 38
_FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gpulab",
    "font.family": "DejaVu Sans",  # always there and wide: what fits in it fits in the reader's font
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # a label may say "$0.2"
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
}


def colour(index: int) -> str:
    """The colour of the arm at position `index` of an experiment: the same one in every plot."""
    return PALETTE[index % len(PALETTE)]


@dataclass(frozen=True)
class Entry:
    """One line of the key: what is drawn, and its figures in small print below."""

    label: str
    detail: str = ""
    colour: str = INK
    marker: str = ""
    """A matplotlib marker, or empty for a line."""
    dashed: bool = False
    hollow: bool = False

    @property
    def lines(self) -> list[str]:
        """The label, wrapped to the key's width, at most three lines."""
        return textwrap.wrap(self.label, _LABEL_CHARACTERS, max_lines=3, placeholder=" …")

    @property
    def details(self) -> list[str]:
        """The small print, wrapped to the key's width."""
        return textwrap.wrap(self.detail, _DETAIL_CHARACTERS)

    @property
    def height_in(self) -> float:
        """Inches that the entry takes, with the gap to the next."""
        return _ENTRY_IN * len(self.lines) + _LINE_IN * len(self.details) + 0.09


class Panel:
    """One pair of axes. Grid and labels are drawn here, because matplotlib's own ticks take 30 ms a panel."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._figure = axes.get_figure(root=True)
        axes.set_axis_off()

    def span_x(self, low: float, high: float, *, log: bool = False) -> None:
        """Set the x axis to [low, high]."""
        if log:
            self.axes.set_xscale("log")
        self.axes.set_xlim(low, high)

    def span_y(self, low: float, high: float, *, log: bool = False) -> None:
        """Set the y axis to [low, high]."""
        if log:
            self.axes.set_yscale("log")
        self.axes.set_ylim(low, high)

    def finish(
        self,
        x_label: str,
        y_label: str,
        *,
        y_format: Callable[[float], str] | None = None,
        rows: int = 6,
        last: bool = True,
    ) -> None:
        """Draw grid and labels for the spans set before, about `rows` labels on the y axis.

        Only the `last` panel labels the x axis.
        """
        from matplotlib.collections import LineCollection

        x_low, x_high = self.axes.get_xlim()
        y_low, y_high = self.axes.get_ylim()
        columns = ticks(x_low, x_high, log=self.axes.get_xscale() == "log", most=6)
        lines = ticks(y_low, y_high, log=self.axes.get_yscale() == "log", most=rows)
        grid = [((x, y_low), (x, y_high)) for x in columns] + [((x_low, y), (x_high, y)) for y in lines]
        frame = [((x_low, y_low), (x_high, y_low)), ((x_low, y_low), (x_low, y_high))]
        add = self.axes.add_collection
        add(LineCollection(grid, colors=GRID, linewidths=0.7, zorder=0.5), autolim=False)
        add(LineCollection(frame, colors="#8c959f", linewidths=0.8, zorder=2.5, clip_on=False), autolim=False)
        self._label_rows(lines, y_label, y_format or number)
        if last:
            self._label_columns(columns, x_label)

    def _label_rows(self, rows: Sequence[float], label: str, text: Callable[[float], str]) -> None:
        left = self.axes.get_xlim()[0]
        beside = self._shifted(self.axes.transData, -4, 0)
        style: dict[str, Any] = {"va": "center", "color": QUIET}
        for row in rows:
            self.axes.text(left, row, text(row), transform=beside, ha="right", size=7.5, **style)
        aside = self._shifted(self.axes.transAxes, -36, 0)
        self.axes.text(0, 0.5, label, transform=aside, ha="center", rotation=90, **style)

    def _label_columns(self, columns: Sequence[float], label: str) -> None:
        bottom = self.axes.get_ylim()[0]
        below = self._shifted(self.axes.transData, 0, -5)
        style: dict[str, Any] = {"ha": "center", "va": "top", "color": QUIET}
        for column in columns:
            self.axes.text(column, bottom, number(column), transform=below, size=7.5, **style)
        self.axes.text(0.5, 0, label, transform=self._shifted(self.axes.transAxes, 0, -18), **style)

    def _shifted(self, transform: Any, x_points: float, y_points: float) -> Any:
        from matplotlib.transforms import offset_copy

        return offset_copy(transform, self._figure, x_points, y_points, units="points")


class Canvas:
    """A figure of one or more panels above each other, with its title on top and its key at the right."""

    def __init__(self, title: str, subtitle: str, basis: str, key: Sequence[Entry], panels: int = 1) -> None:
        from matplotlib.figure import Figure

        self.title, self.subtitle, self.basis = title, subtitle, basis
        key_in = sum(entry.height_in for entry in key)
        self.height_in = _TOP_IN + _BOTTOM_IN + max(2.15 if panels == 1 else 1.25 * panels + 0.1, key_in)
        self.figure: Figure = Figure(figsize=(_WIDTH_IN, self.height_in))
        self.panels = [self._add_panel(number, panels) for number in range(panels)]
        self._write_head()
        self._write_key(key)

    def _add_panel(self, number: int, panels: int) -> Panel:
        """Panel `number` from the top."""
        gap_in = 0.16
        height_in = (self.height_in - _TOP_IN - _BOTTOM_IN - gap_in * (panels - 1)) / panels
        bottom_in = _BOTTOM_IN + (panels - 1 - number) * (height_in + gap_in)
        width_in = _WIDTH_IN - _LEFT_IN - _KEY_IN
        box_in = (_LEFT_IN, bottom_in, width_in, height_in)
        size_in = (_WIDTH_IN, self.height_in) * 2
        left, bottom, width, height = (part / whole for part, whole in zip(box_in, size_in, strict=True))
        return Panel(self.figure.add_axes((left, bottom, width, height)))

    def _at(self, x_in: float, from_top_in: float) -> tuple[float, float]:
        return x_in / _WIDTH_IN, 1 - from_top_in / self.height_in

    def _write_head(self) -> None:
        self.figure.text(*self._at(0.08, 0.2), self.title, size=10, weight="bold", va="center")
        self.figure.text(*self._at(0.08, 0.41), self.subtitle, size=8, color=QUIET, va="center")
        frame = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": QUIET, "linewidth": 0.8}
        self.figure.text(
            *self._at(_WIDTH_IN - 0.12, 0.2), self.basis, size=8, color=QUIET, ha="right", va="center", bbox=frame
        )

    def _write_key(self, key: Iterable[Entry]) -> None:
        from matplotlib.lines import Line2D

        x_in, top_in = _WIDTH_IN - _KEY_IN + 0.2, _TOP_IN + 0.06
        for entry in key:
            (x0, y), (x1, _) = self._at(x_in, top_in), self._at(x_in + 0.22, top_in)
            sample = Line2D([x0, x1], [y, y], color=entry.colour, transform=self.figure.transFigure)
            if entry.marker:
                sample.set(xdata=[(x0 + x1) / 2], ydata=[y], marker=entry.marker, markersize=6, linestyle="")
                sample.set_markerfacecolor("white" if entry.hollow else entry.colour)
            elif entry.dashed:
                sample.set_linestyle((0, (3, 2)))
            self.figure.add_artist(sample)
            line_in = top_in
            for text in entry.lines:
                self.figure.text(*self._at(x_in + 0.3, line_in), text, size=8, va="center")
                line_in += _ENTRY_IN
            for text in entry.details:
                self.figure.text(*self._at(x_in + 0.3, line_in), text, size=7, color=QUIET, va="center")
                line_in += _LINE_IN
            top_in += entry.height_in

    def svg(self, key: str, description: str) -> str:
        """The finished drawing as an ``<svg>`` element.

        `key` tells apart equal plots on one page; `description` is what a screen reader says.
        """
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        title = f"{self.title} ({self.basis})"
        return _inline(buffer.getvalue(), key, title, description)


@contextmanager
def drawing() -> Iterator[None]:
    """The plots' style holds inside; matplotlib's own settings are back afterwards."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def wants_log(values: Iterable[float]) -> bool:
    """Whether the positive finite `values` span more than LOG_FROM times."""
    positive = [value for value in values if 0 < value < math.inf]
    return bool(positive) and max(positive) > LOG_FROM * min(positive)


def ticks(low: float, high: float, *, log: bool, most: int) -> list[float]:
    """Round numbers between `low` and `high`, about `most` of them: 1, 2 or 5 (log: 1 and 3) times powers of ten."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 3) if len(decades) <= 4 else (1,)
        values = [step * 10.0**decade for decade in decades for step in steps]
    else:
        rough = (high - low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        values = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [value for value in values if low <= value <= high]


def number(value: float) -> str:
    """`value` with three significant digits as people write it: 0.00123, 1.2, 1,230; ∞ when infinite."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.2e}"


_SPARE_DIGITS = re.compile(r"(\.\d)\d+")
_GEOMETRY = re.compile(r'\b(?:d|x|y|width|height|transform|points|viewBox)="[^"]*"')
_ID = re.compile(r'\s*\bid="([^"]*)"')
_REFERENCE = re.compile(r'url\(#([^)]+)\)|href="#([^"]+)"')


def _inline(svg: str, key: str, title: str, description: str) -> str:
    """Matplotlib's SVG document as a small element for a page: own ids, one decimal, a title."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r" font-family: 'DejaVu Sans'[^;]*;| transform=\"rotate\(-0 [^)]*\)\"", "", body)
    body = _GEOMETRY.sub(lambda match: _SPARE_DIGITS.sub(r"\1", match.group()), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    prefix = "g" + hashlib.sha256((key + title + body).encode()).hexdigest()[:10]
    body = _own_ids(body, prefix)
    _, _, rest = body.partition(">")
    view = re.search(r'viewBox="([^"]*)"', body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'class="gpulab-plot" viewBox="{view.group(1) if view else ""}" role="img" '
        f'aria-labelledby="{prefix}-t {prefix}-d" style="font-family: {_FONTS}">\n'
        f'<title id="{prefix}-t">{escape(title)}</title>\n<desc id="{prefix}-d">{escape(description)}</desc>'
        f"{rest}"
    ).strip()


def _own_ids(body: str, prefix: str) -> str:
    """Drop ids that nothing refers to and number the others, so that no two plots on a page share one."""
    used = {first or second for first, second in _REFERENCE.findall(body)}
    names: dict[str, str] = {}
    for name in _ID.findall(body):
        if name in used:
            names.setdefault(name, f"{prefix}-{len(names)}")
    body = _ID.sub(lambda m: f' id="{names[m.group(1)]}"' if m.group(1) in names else "", body)

    def refer(match: re.Match[str]) -> str:
        return f"url(#{names[match[1]]})" if match[1] else f'href="#{names[match[2]]}"'

    return _REFERENCE.sub(refer, body)
