"""The pictures of the page: small panels as inline SVG, as wide as a phone, which the page sets side by side.

Text stays text, and colours are CSS variables of the page, so that one drawing serves light and dark. Names of models
and domains stand in the page's HTML, where they wrap; what is drawn knows only figures. `name` keeps ids apart.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from profiles.records.core import Interval
from tuner.report.charts import ROW_INCHES, ChartRow, Palette, draw_rows, dress_axes, dress_rate_axes
from tuner.report.data import AcceptanceCurve, StepTimeCurve

WIDTH_INCHES = 3.6
WIDTHS = {"ngram": "tokens asked for", "round": "tokens checked in one round"}  # by kind; others: a forward's width
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
# colours no picture uses otherwise: they become the page's CSS variables
PAGE = Palette(
    ink="#01fe01",
    faint="#01fe02",
    grid="#01fe03",
    surface="#01fe04",
    loss="#01fe05",
    plain="#01fe06",
    series=tuple(f"#01fe1{index}" for index in range(8)),
)
VARIABLES = {getattr(PAGE, name): name for name in ("ink", "faint", "grid", "surface", "loss", "plain")}
VARIABLES |= {colour: f"series-{index}" for index, colour in enumerate(PAGE.series)}
RC = {
    "axes.prop_cycle": cycler(color=[PAGE.ink]),
    "svg.fonttype": "none",
    "svg.hashsalt": "draftpick",
    "text.parse_math": False,
}


def css_variable(colour: str) -> str:
    """How the page's style sheet spells a colour of PAGE."""
    return f"var(--{VARIABLES[colour]})"


def rate_bars(name: str, rows: Sequence[ChartRow], hue: str, every: Sequence[ChartRow]) -> str:
    """Tokens per second of one draft's setups, on the scale of `every` row and with its plain decoding as a line."""
    num_rows = sum(row.size for row in rows) + 0.3
    with rc_context(RC):
        figure, axes = _panel(num_rows * ROW_INCHES + 0.55)
        ticks = draw_rows(axes, rows, 0.15, (hue, PAGE))
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
        dress_rate_axes(axes, every, num_rows, PAGE)
        axes.set_xlim(right=axes.get_xlim()[1] * 1.12)  # a narrow panel needs more space for its numbers
        axes.xaxis.set_major_locator(round_numbers(5))
        axes.set_xlabel("output tokens per second", fontsize=9, color=PAGE.ink)
        return inline(figure, name, "bars: tokens per second of each length, forecast above measured")


def speedups(name: str, rows: Sequence[tuple[str, Interval, bool, str]]) -> str:
    """Forest plot: (label, speed-up, whether measured, hue) from the top down, and a line at 1.

    The scale is logarithmic, so that twice as fast and half as fast stand equally far from the line.
    """
    with rc_context(RC):
        figure, axes = _panel(len(rows) * 0.5 + 0.55, left=0.12)
        _ratio_scale(axes, "x", [row[1] for row in rows] + [Interval(estimate=1.0, low=1.0, high=1.0)])
        for index, (label, interval, measured, hue) in enumerate(rows):
            _draw_point(axes, (interval, index + 0.62), measured, hue)
            style = {"fontsize": 9, "color": PAGE.ink, "transform": axes.get_yaxis_transform(), "va": "center"}
            box = {"boxstyle": "square,pad=0.1", "facecolor": PAGE.surface, "edgecolor": "none"}  # the line ends at it
            axes.text(0.0, index + 0.2, label, ha="left", bbox=box, **style)
            axes.text(1.0, index + 0.2, f"{interval.estimate:.2f}", ha="right", fontweight="bold", **style)
        axes.axvline(1.0, zorder=1, **PAGE.plain_line)
        axes.set_ylim(len(rows), 0.0)
        axes.set_yticks([])
        axes.set_xlabel("times as fast as plain decoding", fontsize=9, color=PAGE.ink)
        dress_axes(axes, "x", PAGE)
        return inline(figure, name, "forest plot: speed-up with its interval by domain, and a line at 1")


def forecast_against_measured(name: str, points: Sequence[tuple[Interval, Interval, str]]) -> str:
    """(forecast, measured, hue) speed-ups with a line where they agree; no interval: the race's, drawn hollow."""
    with rc_context(RC):
        figure, axes = _panel(3.5, left=0.55)
        both = [interval for point in points for interval in point[:2]]
        for side in ("x", "y"):
            _ratio_scale(axes, side, both)
        axes.plot(axes.get_xlim(), axes.get_xlim(), zorder=1, **PAGE.plain_line)
        for forecast, measured, hue in points:
            raced = measured.low == measured.high
            spread = [[forecast.estimate - forecast.low], [forecast.high - forecast.estimate]]
            upward = None if raced else [[measured.estimate - measured.low], [measured.high - measured.estimate]]
            style = {"fmt": "o", "markersize": 5, "color": hue, "elinewidth": 0.9, "zorder": 2 if raced else 3}
            face = PAGE.surface if raced else hue
            axes.errorbar(forecast.estimate, measured.estimate, xerr=spread, yerr=upward, markerfacecolor=face, **style)
        axes.set_xlabel("forecast speed-up", fontsize=9, color=PAGE.ink)
        axes.set_ylabel("measured speed-up", fontsize=9, color=PAGE.ink)
        dress_axes(axes, "both", PAGE)
        return inline(figure, name, "scatter: measured against forecast speed-up, and a line where they agree")


def acceptance(name: str, curves: Sequence[AcceptanceCurve], hues: Mapping[str, str]) -> str:
    """Share of rounds that kept as far as each position, with intervals; one line per draft."""
    longest = max((position.position for curve in curves for position in curve.positions), default=1)
    with rc_context(RC):
        figure, axes = _panel(2.7, left=0.72)
        for index, curve in enumerate(curves):
            aside = 0.5 * ((index + 0.5) / len(curves) - 0.5)  # so that the intervals stand beside each other
            places = [position.position + aside for position in curve.positions]
            accepted = [position.accepted for position in curve.positions]
            spread = [
                [point.estimate - point.low for point in accepted],
                [point.high - point.estimate for point in accepted],
            ]
            hue = hues[curve.draft_name]
            style = {"fmt": f"{MARKERS[PAGE.series.index(hue)]}-", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.9}
            axes.errorbar(
                places, [point.estimate for point in accepted], yerr=spread, color=hue, clip_on=False, **style
            )
        axes.set(xlim=(0.5, longest + 0.5), ylim=(0.0, 1.0))
        axes.set_xticks(
            range(1, longest + 1) if longest <= 12 else MaxNLocator(8, integer=True).tick_values(1, longest)
        )
        axes.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("position in the round", fontsize=9, color=PAGE.ink)
        axes.set_ylabel("rounds that kept so far", fontsize=9, color=PAGE.ink)
        dress_axes(axes, "y", PAGE)
        return inline(figure, name, "lines: acceptance by position, one line for each draft")


def step_time_curve(name: str, part: StepTimeCurve, hue: str) -> str:
    """Median step time against width, with the 10 and 90 % quantiles; from 0, so that heights compare."""
    most = max(stair.high_s for stair in part.widths)
    unit, scale = ("ms", 1e3) if most >= 1e-3 else ("µs", 1e6)
    widths = [stair.width for stair in part.widths]
    middles = [stair.median_s * scale for stair in part.widths]
    spread = [
        [(stair.median_s - stair.low_s) * scale for stair in part.widths],
        [(stair.high_s - stair.median_s) * scale for stair in part.widths],
    ]
    with rc_context(RC):
        figure, axes = _panel(2.2, left=0.6)
        axes.stairs(middles, [widths[0] - 0.5, *(width + 0.5 for width in widths)], baseline=None, color=hue)
        axes.errorbar(widths, middles, yerr=spread, fmt="o", markersize=3.5, elinewidth=0.9, capsize=2.0, color=hue)
        axes.set(xlim=(widths[0] - 0.7, widths[-1] + 0.7), ylim=(0.0, most * scale * 1.12))
        axes.set_xticks(widths if len(widths) <= 12 else widths[:: -(-len(widths) // 8)])
        axes.yaxis.set_major_locator(round_numbers(5))
        axes.set_xlabel(WIDTHS.get(part.kind, "width: tokens in one forward"), fontsize=9, color=PAGE.ink)
        axes.set_ylabel(unit, fontsize=9, color=PAGE.ink)
        dress_axes(axes, "y", PAGE)
        what = "round" if part.kind == "round" else "forward"
        return inline(figure, name, f"steps: time in {unit} of one {what} against its width")


def _panel(height: float, left: float = 0.42) -> tuple[Figure, Any]:
    """A figure and its axes, in inches; `left` is the space for the ticks and the name of the y axis."""
    figure = Figure(figsize=(WIDTH_INCHES, height))
    width = WIDTH_INCHES - left - 0.12
    position = (left / WIDTH_INCHES, 0.45 / height, width / WIDTH_INCHES, (height - 0.55) / height)
    return figure, figure.add_axes(position, facecolor="none")


def round_numbers(most: int) -> Any:
    return MaxNLocator(most, steps=[1, 2, 5, 10])


def _ratio_scale(axes: Any, side: str, interval: Sequence[Interval]) -> None:
    """A logarithmic axis that shows every interval, with ticks at round numbers, one of them 1 where that is seen."""
    low, high = min(point.low for point in interval) / 1.06, max(point.high for point in interval) * 1.06
    ticks = {round(float(tick), 6) for tick in (*round_numbers(6).tick_values(low, high), 1.0) if low < tick < high}
    axis = {"x": axes.xaxis, "y": axes.yaxis}[side]
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    axis.set_ticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axis.set_ticks([], minor=True)


def _draw_point(axes: Any, at: tuple[Interval, float], measured: bool, hue: str) -> None:
    interval, height = at
    spread = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
    face = hue if measured else PAGE.surface
    style = {"fmt": "s", "markersize": 6, "elinewidth": 1.6, "capsize": 3.0, "zorder": 3}
    axes.errorbar(interval.estimate, height, xerr=spread, color=hue, markerfacecolor=face, **style)


def inline(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element for a page: as wide as its place, its ids its own, its colours the page's."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # the browser has it
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314  matplotlib has just written it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):  # addresses; rules that would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set("href" if key == f"{XLINK}href" else key, _localised(value, key, name))
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _localised(value: str, key: str, name: str) -> str:
    """An attribute's value with ids that carry `name`, CSS variables for colours, and no more digits than are seen."""
    if key == "id":
        return f"{name}-{value}"
    value = re.sub(r"^#(?=[A-Za-z_])", f"#{name}-", value) if key.endswith("href") else value
    value = value.replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    if key in ("d", "x", "y", "transform", "width", "height"):
        value = re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match.group()):.2f}", value)
    return value
