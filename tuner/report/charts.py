"""The bar chart: output tokens per second of every setup beside plain decoding, as a PNG or SVG file.

matplotlib is imported when something is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.records.core import Interval
from profiles.records.errors import InputError

SUFFIXES = (".png", ".svg")
# the chart's measures, in rows of ROW_INCHES
BAR_HEIGHT, HEADING, GAP, MOST_ROWS = 0.64, 1.0, 0.5, 40.0
ROW_INCHES, COLUMN_INCHES = 0.22, 8.0
FORECAST_ALPHA = 0.42


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """The colours of a picture by what they are for, as #rrggbb; `series` are the drafts' in their order."""

    ink: str
    faint: str
    grid: str
    surface: str
    loss: str
    plain: str
    series: tuple[str, ...]

    @property
    def plain_line(self) -> dict[str, Any]:
        """How plain decoding is drawn as a line."""
        return {"linestyle": (0, (5, 3)), "linewidth": 1.1, "color": self.ink}

    def hues(self, names: Sequence[str]) -> dict[str, str]:
        """A colour for each draft's name, and for plain decoding."""
        drafts = [name for name in dict.fromkeys(names) if name != "plain"]
        return {"plain": self.plain} | {
            name: self.series[index % len(self.series)] for index, name in enumerate(drafts)
        }


PAPER = Palette(
    ink="#1f2937",
    faint="#9ca3af",
    grid="#e5e7eb",
    surface="#ffffff",
    loss="#b42318",
    plain="#6b7280",
    series=("#1f6fb4", "#d9711c", "#2a9367", "#8a55b5", "#c2407a", "#8c6d1f", "#1c96a8", "#5b6ad0"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChartRow:
    """A setup in the chart, in output tokens per second; `speedup` is the multiplier of its best-known figure.

    `group` is the draft's name (`plain` for plain decoding). Raises InputError when there is nothing to draw.
    """

    setup_name: str
    group: str
    forecast: Interval | None
    measured: Interval | None
    speedup: float

    def __post_init__(self) -> None:
        if self.forecast is None and self.measured is None:
            raise InputError(f"setup {self.setup_name!r} has neither a forecast nor a measurement to draw")

    @property
    def best_known(self) -> Interval:
        """Measured where there is a measurement, else the forecast."""
        interval = self.measured or self.forecast
        assert interval is not None  # checked on creation
        return interval

    @property
    def size(self) -> float:
        """Its height in rows of the chart: a bar per known figure."""
        return 1.0 + BAR_HEIGHT * (self.forecast is not None and self.measured is not None)


def bar_chart(rows: Sequence[ChartRow], path: str | Path, *, title: str, subtitle: str = "") -> None:
    """Draws tokens per second per setup, grouped by draft, into a PNG or SVG file; plain decoding is a dashed line.

    Groups stand in the order of their first row, plain decoding first. Raises InputError: no rows, another suffix, or
    a file that cannot be written.
    """
    from matplotlib import rc_context

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"picture {path}: the suffixes {' and '.join(SUFFIXES)} are allowed")
    if not rows:
        raise InputError(f"picture {path}: there is no setup to draw")
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None  # no time of drawing in the file
    with rc_context({"text.parse_math": False}):  # a dollar in a model's name is a dollar
        figure = _chart(rows, title, subtitle)
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise InputError(f"picture {path} cannot be written: {error.strerror}") from error


def _chart(rows: Sequence[ChartRow], title: str, subtitle: str) -> Any:
    from matplotlib.figure import Figure

    groups: dict[str, list[ChartRow]] = {}
    for row in sorted(rows, key=lambda row: row.group != "plain"):
        groups.setdefault(row.group, []).append(row)
    columns = _columns(groups)
    body = max(sum(map(_height, column.values())) for column in columns) * ROW_INCHES
    width, height = COLUMN_INCHES * len(columns), body + 1.75
    figure = Figure(figsize=(width, height), facecolor=PAPER.surface)
    for index, column in enumerate(columns):
        left = (index * COLUMN_INCHES + 1.1) / width
        axes = figure.add_axes((left, 0.6 / height, (COLUMN_INCHES - 1.4) / width, body / height))
        _draw_groups(axes, column, PAPER.hues(list(groups)))
        dress_rate_axes(axes, rows, body / ROW_INCHES, PAPER)
        axes.set_xlabel("output tokens per second, decode only; higher is better", fontsize=9, color=PAPER.ink)
    _draw_legend(figure, rows)
    figure.text(0.3 / width, 1.0 - 0.22 / height, title, fontsize=15, fontweight="bold", color=PAPER.ink, va="top")
    figure.text(0.3 / width, 1.0 - 0.56 / height, subtitle, fontsize=9.5, color=PAPER.ink, va="top")
    return figure


def _columns(groups: Mapping[str, Sequence[ChartRow]]) -> list[dict[str, Sequence[ChartRow]]]:
    """The groups in one column, or where that is too tall for a screen in two, cut where they come out most even."""
    heights = [_height(rows) for rows in groups.values()]
    if sum(heights) <= MOST_ROWS or len(groups) == 1:
        return [dict(groups)]
    cut = min(range(1, len(heights)), key=lambda at: max(sum(heights[:at]), sum(heights[at:])))
    items = list(groups.items())
    return [dict(items[:cut]), dict(items[cut:])]


def _height(rows: Sequence[ChartRow]) -> float:
    """Of a group with its heading and the gap after it, in rows."""
    return HEADING + sum(row.size for row in rows) + GAP


def _draw_groups(axes: Any, groups: Mapping[str, Sequence[ChartRow]], hues: Mapping[str, str]) -> None:
    """Bars from the top down: a heading with the draft's name, then its rows."""
    ticks: list[tuple[float, str]] = []
    top = 0.0
    for group, rows in groups.items():
        name = "plain decoding" if group == "plain" else group
        style = {"fontsize": 10, "fontweight": "bold", "color": hues[group], "ha": "left", "va": "center", "zorder": 5}
        axes.text(0.0, top + 0.45, name, **style)
        ticks += draw_rows(axes, rows, top + HEADING, (hues[group], PAPER))
        top += _height(rows)
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])


def draw_rows(axes: Any, rows: Sequence[ChartRow], top: float, colours: tuple[str, Palette]) -> list[tuple[float, str]]:
    """The bars of one draft from `top` down, in (its hue, the palette); the places and names of its ticks."""
    hue, palette = colours
    ticks = []
    for row in rows:
        figures = ((row.forecast, FORECAST_ALPHA), (row.measured, 1.0))
        bars = [(interval, alpha) for interval, alpha in figures if interval is not None]
        for index, (interval, alpha) in enumerate(bars):
            at = top + 0.5 + index * BAR_HEIGHT
            axes.barh(at, interval.estimate, height=BAR_HEIGHT, color=hue, alpha=alpha, linewidth=0.0, zorder=2)
            spread = [[interval.estimate - interval.low], [interval.high - interval.estimate]]
            style = {"ecolor": palette.ink, "elinewidth": 0.9, "capsize": 2.0, "capthick": 0.9, "zorder": 4}
            axes.errorbar(interval.estimate, at, xerr=spread, fmt="none", **style)
        middle = top + 0.5 + (len(bars) - 1) * BAR_HEIGHT / 2
        _label(axes, (max(interval.high for interval, _ in bars), middle), row, palette)
        ticks.append((middle, row.setup_name.removeprefix(row.group).strip() or "k=0"))
        top += row.size
    return ticks


def _label(axes: Any, at: tuple[float, float], row: ChartRow, palette: Palette) -> None:
    colour = palette.loss if row.speedup < 1.0 else palette.ink
    weight = "normal" if row.measured is None else "bold"
    text = f"{row.speedup:.2f}×"
    box = {
        "boxstyle": "square,pad=0.1",
        "facecolor": palette.surface,
        "edgecolor": "none",
    }  # the dashed line ends at it
    offset = {"xytext": (5, 0), "textcoords": "offset points"}
    style = {"fontsize": 8, "color": colour, "fontweight": weight, "ha": "left", "va": "center_baseline", "zorder": 5}
    axes.annotate(text, at, bbox=box, **offset, **style)


def _plain_rate(rows: Sequence[ChartRow]) -> float | None:
    return next((row.best_known.estimate for row in rows if row.group == "plain"), None)


def dress_rate_axes(axes: Any, rows: Sequence[ChartRow], num_rows: float, palette: Palette) -> None:
    """Limits that fit `rows` (all of the chart's), the dashed line at plain decoding, grid and spines."""
    reach = max(interval.high for row in rows for interval in (row.forecast, row.measured) if interval is not None)
    axes.set_xlim(0.0, reach * 1.1)
    axes.set_ylim(num_rows, 0.0)
    plain = _plain_rate(rows)
    if plain is not None:
        axes.axvline(plain, zorder=3, **palette.plain_line)
    dress_axes(axes, "x", palette)


def dress_axes(axes: Any, grid: str, palette: Palette) -> None:
    """Quiet ticks, a grid along `grid` (`x`, `y` or `both`) and only the bottom spine."""
    axes.tick_params(length=0, labelsize=8.5, labelcolor=palette.ink)
    axes.grid(axis=grid, color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.faint)


def _draw_legend(figure: Any, rows: Sequence[ChartRow]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if any(row.forecast for row in rows):
        handles.append(Patch(facecolor=PAPER.plain, alpha=FORECAST_ALPHA, label="forecast"))
    if any(row.measured for row in rows):
        handles.append(Patch(facecolor=PAPER.plain, label="measured, paired runs"))
    handles.append(Line2D([], [], color=PAPER.ink, linewidth=0.9, marker="|", markersize=6, label="95 % interval"))
    if _plain_rate(rows) is not None:
        handles.append(Line2D([], [], label="plain decoding", **PAPER.plain_line))
    width, height = figure.get_size_inches()
    style = {"ncols": len(handles), "fontsize": 8.5, "labelcolor": PAPER.ink, "frameon": False, "borderaxespad": 0.0}
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.0 - 0.3 / width, 1.0 - 0.84 / height), **style)
