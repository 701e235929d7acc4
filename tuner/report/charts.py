"""Every picture, by matplotlib: the bar chart as a PNG or SVG file, and the page's small panels as inline SVG.

In a panel text stays text and colours become CSS variables of the page, so that one drawing serves light and dark.
Names of models and domains stand in the page's HTML, where they wrap. `name` keeps the ids of panels apart.
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from cycler import cycler
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from profiles.records.core import Interval
from profiles.records.errors import require
from tuner.report.data import AcceptanceCurve, Candidate, StepTimeCurve

SUFFIXES = (".png", ".svg")
INK, FAINT, GRID, SURFACE, LOSS, PLAIN = "#1f2937", "#9ca3af", "#e5e7eb", "#ffffff", "#b42318", "#6b7280"
SERIES = ("#1f6fb4", "#d9711c", "#2a9367", "#8a55b5", "#c2407a", "#8c6d1f", "#1c96a8", "#5b6ad0")  # drafts, in order
VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", SURFACE: "surface", LOSS: "loss", PLAIN: "plain"}
VARIABLES |= {colour: f"series-{index}" for index, colour in enumerate(SERIES)}  # colours as the page's style sheet
STYLE = {
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0.0),
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=[INK]),
    "errorbar.capsize": 2.0,
    "lines.linewidth": 1.1,
    "lines.markersize": 5.0,
    "figure.constrained_layout.use": True,
    "font.size": 9.0,
    "legend.frameon": False,
    "svg.hashsalt": "draftpick",  # the same data give the same bytes
    "text.parse_math": False,  # a dollar in a model's name is a dollar
}
PLAIN_LINE: dict[str, Any] = {"color": INK, "linestyle": (0, (5, 3)), "zorder": 1.5}  # over the grid, under the figures
LABEL_BOX = {"facecolor": SURFACE, "linewidth": 0.0, "pad": 1.0}  # the dashed line ends at it
PANEL_INCHES, ROW_INCHES = 3.6, 0.26
FORECAST_ALPHA = 0.42
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTHS = {"ngram": "tokens asked for", "round": "tokens checked in one round"}  # by kind; others: a forward's width
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def hues(names: Sequence[str]) -> dict[str, str]:
    """A colour for each draft's name, and for plain decoding."""
    drafts = dict.fromkeys(name for name in names if name != "plain")
    return {"plain": PLAIN} | {name: SERIES[index % len(SERIES)] for index, name in enumerate(drafts)}


@rc_context(STYLE)
def bar_chart(rows: Sequence[Candidate], path: Path, *, title: str) -> None:
    """Draws tokens per second of every setup into a PNG or SVG file, a panel for each draft.

    Raises InputError: no rows. OSError: the file cannot be written.
    """
    require(bool(rows), f"picture {path}: there is no setup to draw")
    drafts = by_draft(rows)
    num_columns = math.ceil(math.sqrt(len(drafts)))
    num_rows = math.ceil(len(drafts) / num_columns)
    most = max(map(len, drafts.values()))
    figure = Figure(figsize=(4.0 * num_columns, (ROW_INCHES * most + 0.7) * num_rows + 1.0))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    grid, colours = figure.subplots(num_rows, num_columns, squeeze=False).flat, hues(list(drafts))
    for draft, axes in zip(drafts, grid, strict=False):
        axes.set_title(draft, color=colours[draft])
        _draw_rates(axes, drafts[draft], colours[draft], rows)
    for axes in grid[len(drafts) :]:
        axes.set_axis_off()
    _add_legend(figure, rows)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def by_draft(rows: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """The rows of each draft; plain decoding, which is a line in every panel, only where nothing else is there."""
    names = dict.fromkeys(row.draft_name for row in rows if row.draft_name != "plain") or ["plain"]
    return {name: [row for row in rows if row.draft_name == name] for name in names}


def _add_legend(figure: Figure, rows: Sequence[Candidate]) -> None:
    handles: list[Any] = [Patch(color=PLAIN, alpha=FORECAST_ALPHA, linewidth=0.0, label="forecast")]
    if any(row.measured_tok_per_s for row in rows):
        handles.append(Patch(color=PLAIN, label="measured, paired runs"))
    handles.append(Line2D([], [], linewidth=0.9, marker="|", label="95 % interval"))
    if any(row.draft_name == "plain" for row in rows):
        handles.append(Line2D([], [], label="plain decoding", **PLAIN_LINE))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))


@rc_context(STYLE)
def rate_bars(name: str, rows: Sequence[Candidate], hue: str, every: Sequence[Candidate]) -> Markup:
    """Tokens per second of one draft's setups, on the scale of `every` row and with its plain decoding as a line."""
    figure, axes = _panel(ROW_INCHES * len(rows) + 0.6)
    _draw_rates(axes, rows, hue, every)
    return _inline(figure, name, "bars: tokens per second of each length, forecast above measured")


def _draw_rates(axes: Any, rows: Sequence[Candidate], hue: str, every: Sequence[Candidate]) -> None:
    for index, row in enumerate(rows):
        drawn = ((row.forecast_tok_per_s, FORECAST_ALPHA), (row.measured_tok_per_s, 1.0))
        bars = [(interval, alpha) for interval, alpha in drawn if interval is not None]
        height = 0.8 / len(bars)
        for number, (interval, alpha) in enumerate(bars):
            at = index + (number - (len(bars) - 1) / 2) * height
            axes.barh(at, interval.estimate, height, xerr=_reach([interval]), color=hue, alpha=alpha, ecolor=INK)
        axes.annotate(
            f"{row.known_speedup:.2f}×",
            (max(interval.high for interval, _ in bars), index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            bbox=LABEL_BOX,
            color=LOSS if row.known_speedup < 1.0 else INK,
            fontweight="bold" if row.measured_tok_per_s else "normal",
        )
    plain = next((row.known_tok_per_s for row in every if row.draft_name == "plain"), None)
    if plain is not None:
        axes.axvline(plain.estimate, **PLAIN_LINE | {"zorder": 2})
    rates = [rate for row in every for rate in (row.forecast_tok_per_s, row.measured_tok_per_s) if rate is not None]
    highest = max(rate.high for rate in rates)
    axes.set(xlim=(0.0, highest * 1.2), ylim=(len(rows) - 0.5, -0.5), xlabel="output tokens per second")
    axes.set_yticks(range(len(rows)), [row.setup_name.removeprefix(row.draft_name).strip() or "k=0" for row in rows])
    axes.xaxis.set_major_locator(_round_numbers(5))
    axes.grid(visible=False, axis="y")


@rc_context(STYLE)
def speedups(name: str, rows: Sequence[tuple[str, Interval, bool, str]]) -> Markup:
    """Forest plot: (label, speed-up, whether measured, hue) from the top down, and a line at 1.

    The scale is logarithmic, so that twice as fast and half as fast stand equally far from the line.
    """
    figure, axes = _panel(len(rows) * 0.5 + 0.55)
    _ratio_scale(axes, "x", [row[1] for row in rows])
    for index, (label, interval, measured, hue) in enumerate(rows):
        face = hue if measured else SURFACE
        axes.errorbar(interval.estimate, index, xerr=_reach([interval]), fmt="s", color=hue, markerfacecolor=face)
        style = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(0.0, index - 0.42, label, bbox=LABEL_BOX, **style)
        axes.text(1.0, index - 0.42, f"{interval.estimate:.2f}", ha="right", fontweight="bold", **style)
    axes.axvline(1.0, **PLAIN_LINE)
    axes.set(ylim=(len(rows) - 0.6, -0.7), yticks=[], xlabel="times as fast as plain decoding")
    return _inline(figure, name, "forest plot: speed-up with its interval by domain, and a line at 1")


@rc_context(STYLE)
def forecast_against_measured(name: str, points: Sequence[tuple[Interval, Interval, str]]) -> Markup:
    """(forecast, measured, hue) speed-ups with a line where they agree; no interval: the race's, drawn hollow."""
    figure, axes = _panel(3.5)
    both = [interval for point in points for interval in point[:2]]
    _ratio_scale(axes, "x", both)
    _ratio_scale(axes, "y", both)
    axes.plot(axes.get_xlim(), axes.get_xlim(), **PLAIN_LINE)
    for forecast, measured, hue in points:
        raced = measured.low == measured.high
        style = {"fmt": "o", "color": hue, "markerfacecolor": SURFACE if raced else hue, "capsize": 0.0}
        upward = None if raced else _reach([measured])
        axes.errorbar(forecast.estimate, measured.estimate, xerr=_reach([forecast]), yerr=upward, **style)
    axes.set(xlabel="forecast speed-up", ylabel="measured speed-up")
    return _inline(figure, name, "scatter: measured against forecast speed-up, and a line where they agree")


@rc_context(STYLE)
def acceptance(name: str, curves: Sequence[AcceptanceCurve], colours: Mapping[str, str]) -> Markup:
    """Share of rounds that accept as far as each position, with intervals; one line per draft."""
    figure, axes = _panel(2.7)
    for index, curve in enumerate(curves):
        aside = 0.5 * ((index + 0.5) / len(curves) - 0.5)  # so that the intervals stand beside each other
        accepted, hue = [position.accepted for position in curve.positions], colours[curve.draft_name]
        axes.errorbar(
            [position.position + aside for position in curve.positions],
            [interval.estimate for interval in accepted],
            yerr=_reach(accepted),
            fmt=f"{MARKERS[SERIES.index(hue)]}-",
            color=hue,
            clip_on=False,
        )
    longest = max((position.position for curve in curves for position in curve.positions), default=1)
    axes.set(xlim=(0.5, longest + 0.5), ylim=(0.0, 1.0), xlabel="position in the round", ylabel="accepted so far")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(visible=False, axis="x")
    return _inline(figure, name, "lines: acceptance by position, one line for each draft")


@rc_context(STYLE)
def step_times(name: str, curve: StepTimeCurve, hue: str) -> Markup:
    """Median step time against width, with the 10 and 90 % quantiles; from 0, so that heights compare."""
    figure, axes = _panel(2.2)
    unit, scale = ("ms", 1e3) if max(point.high_s for point in curve.widths) >= 1e-3 else ("µs", 1e6)
    widths = [point.width for point in curve.widths]
    middles = [point.median_s * scale for point in curve.widths]
    reach = [
        [(point.median_s - point.low_s) * scale for point in curve.widths],
        [(point.high_s - point.median_s) * scale for point in curve.widths],
    ]
    axes.stairs(middles, [widths[0] - 0.5, *(width + 0.5 for width in widths)], baseline=None, color=hue)
    axes.errorbar(widths, middles, yerr=reach, fmt="o", markersize=3.5, color=hue)
    axes.set(xlabel=WIDTHS.get(curve.kind, "width: tokens in one forward"), ylabel=unit)
    axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(_round_numbers(8))
    axes.grid(visible=False, axis="x")
    what = "round" if curve.kind == "round" else "forward"
    return _inline(figure, name, f"steps: time in {unit} of one {what} against its width")


def _panel(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(PANEL_INCHES, height))
    return figure, figure.add_subplot()


def _reach(intervals: Sequence[Interval]) -> list[list[float]]:
    """Intervals as matplotlib takes them: how far they reach below and above their estimates."""
    below = [interval.estimate - interval.low for interval in intervals]
    return [below, [interval.high - interval.estimate for interval in intervals]]


def _round_numbers(most: int) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 5, 10])


def _ratio_scale(axes: Any, side: str, intervals: Sequence[Interval]) -> None:
    """A logarithmic axis that shows 1 and every interval, with ticks at round numbers.

    It ends at a tenth: the low end of an interval over few prompts may be 0 or less.
    """
    low = max(0.1, min(1.0, *(interval.low for interval in intervals)) / 1.06)
    high = max(1.0, *(interval.high for interval in intervals)) * 1.06
    ticks = sorted({round(tick, 6) for tick in (*_round_numbers(6).tick_values(low, high), 1.0) if low < tick < high})
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    axis = getattr(axes, f"{side}axis")
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _inline(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an <svg> element for a page: as wide as its place, its ids its own, its colours the page's."""
    buffer = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # the browser has it
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314  matplotlib has just written it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):  # addresses; rules that would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        attributes = {key.removeprefix(XLINK): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib |= {key: _localised(value, key, name) for key, value in attributes.items()}
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  ElementTree has escaped its text


def _localised(value: str, key: str, name: str) -> str:
    """An attribute's value with ids that carry `name`, CSS variables for colours, and no more digits than are seen."""
    if key == "id":
        return f"{name}-{value}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "href":
        value = value.replace("#", f"#{name}-", 1)
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    if key in ("d", "x", "y", "transform", "width", "height"):
        value = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", value)
    return value
