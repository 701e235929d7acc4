"""Says what was decided, in three forms: a table for the terminal, a bar chart, and a JSON document for programs.

It reads policies and rows of figures and changes nothing. How the figures were measured it must not know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from profiles.errors import InputError
from profiles.terms import Interval
from tuner.policy import Answer, Choice, Policy

ONE = Interval(estimate=1.0, low=1.0, high=1.0)
PLAIN_COLOUR = "#6b7280"
COLOURS = ("#1f6fb4", "#d9711c", "#2a9367", "#8a55b5", "#c2407a", "#8c6d1f", "#1c96a8", "#5b6ad0")
INK, FAINT, LOSS = "#1f2937", "#9ca3af", "#b42318"
PLAIN_LINE: dict[str, Any] = {"linestyle": (0, (5, 3)), "linewidth": 1.1, "color": INK}
# the chart's measures, in rows of ROW_INCHES
BAR_HEIGHT, HEADING, GAP, MOST_ROWS = 0.64, 1.0, 0.5, 40.0
ROW_INCHES, COLUMN_INCHES = 0.22, 8.0


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

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "ChartRow":
        """The row that `dataclasses.asdict` turned into `raw`. Raises InputError when it is not one."""
        try:
            forecast, measured = (raw[name] and Interval(**raw[name]) for name in ("forecast", "measured"))
            return cls(**{**raw, "forecast": forecast, "measured": measured})
        except (KeyError, TypeError) as error:
            raise InputError(f"chart row {str(raw)[:60]!r} is not as this draftpick writes it: run again") from error

    @property
    def best_known(self) -> Interval:
        """Measured where there is a measurement, else the forecast."""
        known = self.measured or self.forecast
        assert known is not None  # checked on creation
        return known


def table(policy: Policy) -> Table:
    """The choices, one row per anchor, with the reason under each setup; what all anchors share stands in the title."""
    anchors = {
        "batch": [str(choice.batch_size) for choice in policy.choices],
        "context": [str(choice.context_length) for choice in policy.choices],
        "temperature": [f"{choice.temperature:g}" for choice in policy.choices],
    }
    varied = {name: cells for name, cells in anchors.items() if len(set(cells)) > 1}
    shared = ", ".join(f"{name} {cells[0]}" for name, cells in anchors.items() if name not in varied)
    title = f"{policy.target.name} on {policy.environment.device}, {policy.created[:10]}"
    shown = Table(title=Text(f"{title}\n{shared}" if shared else title), title_justify="left", box=SIMPLE_HEAD)
    for name in varied:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("domain", no_wrap=True)
    shown.add_column("setup, and why", overflow="fold")
    for name in ("speed-up (95 %)", "end to end", "proven"):
        shown.add_column(name, no_wrap=True)
    for index, choice in enumerate(policy.choices):
        anchor = [Text(cells[index]) for cells in varied.values()]
        setup = Text.assemble((choice.setup.name, "bold"), "\n", (choice.reason, "dim"))
        shown.add_row(*anchor, Text(choice.domain), setup, *_cells(choice))
    return shown


def _cells(choice: Choice) -> tuple[str, str, str]:
    if choice.setup.draft is None:
        return "1", "1", "no"
    speedup, end_to_end = _speedup(choice), _end_to_end(choice)
    return (
        f"{speedup.estimate:.2f} ({speedup.low:.2f} to {speedup.high:.2f})",
        "unknown" if end_to_end is None else f"{end_to_end:.2f}",
        "yes" if choice.proven else "no",
    )


def document(policy: Policy, *, cost: Mapping[str, object], store: str, policy_path: str) -> dict[str, Any]:
    """The policy as the one JSON document a program reads: the headline choice's figures, then every anchor's.

    Rates are output tokens per second, decode only; `end_to_end` is the ratio with prefill. A figure that is not known
    is None. `cost` is passed through.
    """
    return {
        "target": asdict(policy.target),
        "environment": {**asdict(policy.environment), "digest": policy.environment.digest},
        **_figures(policy.headline),
        "anchors": [
            {
                "batch_size": choice.batch_size,
                "context_length": choice.context_length,
                "domain": choice.domain,
                "temperature": choice.temperature,
                **_figures(choice),
            }
            for choice in policy.choices
        ],
        "cost": dict(cost),
        "store": store,
        "policy": policy_path,
    }


def answer(found: Answer) -> dict[str, Any]:
    """What a look-up found, for the same document: how, and the figures of its choice."""
    return {"matched": found.matched, "rule": found.rule, **_figures(found.choice)}


def _figures(choice: Choice) -> dict[str, Any]:
    setup, draft = choice.setup, choice.setup.draft
    chosen: dict[str, object] = {"draft": None if draft is None else draft.name, "length": setup.length}
    if draft is not None:
        chosen |= {"kind": draft.kind, "stop_below": setup.stop_below}
    plain_tok_per_s, chosen_tok_per_s = _rates(choice)
    return {
        "choice": chosen,
        "speedup": asdict(_speedup(choice)),
        "end_to_end": _end_to_end(choice),
        "plain_tok_per_s": plain_tok_per_s,
        "chosen_tok_per_s": chosen_tok_per_s,
        "proven": choice.proven,
        "reason": choice.reason,
    }


def _speedup(choice: Choice) -> Interval:
    """Of the chosen setup: beside plain decoding the record may hold the figures of the setup that lost to it."""
    if choice.setup.draft is None:
        return ONE
    for known in (choice.measured, choice.forecast):
        if known is not None and known.setup == choice.setup:
            return known.speedup
    raise InputError(f"the choice {choice.setup.name!r} has neither a measurement nor a forecast of its own")


def _end_to_end(choice: Choice) -> float | None:
    if choice.setup.draft is None:
        return 1.0
    return choice.measured.end_to_end.estimate if choice.measured else None


def _rates(choice: Choice) -> tuple[float | None, float | None]:
    """Tokens per second of plain decoding and of the choice."""
    if choice.measured is not None:
        plain = choice.measured.plain_tok_per_s.estimate
        return plain, choice.measured.tok_per_s.estimate if choice.setup.draft else plain
    if choice.forecast is None:
        return None, None
    plain = choice.forecast.tok_per_s.estimate / choice.forecast.speedup.estimate
    return plain, choice.forecast.tok_per_s.estimate if choice.setup.draft else plain


def bar_chart(rows: Sequence[ChartRow], path: str | Path, *, title: str, subtitle: str = "") -> None:
    """Draws tokens per second per setup, grouped by draft, into a PNG or SVG file; plain decoding is a dashed line.

    Groups stand in the order of their first row, plain decoding first. Raises InputError: no rows, another suffix, or
    a file that cannot be written.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"picture {path}: the suffixes .png and .svg are allowed")
    if not rows:
        raise InputError(f"picture {path}: there is no setup to draw")
    groups: dict[str, list[ChartRow]] = {}
    for row in sorted(rows, key=lambda row: row.group != "plain"):
        groups.setdefault(row.group, []).append(row)
    columns = _columns(groups)
    body = max(sum(map(_height, column.values())) for column in columns) * ROW_INCHES
    width, height = COLUMN_INCHES * len(columns), body + 1.75
    figure = Figure(figsize=(width, height), facecolor="white")
    for index, column in enumerate(columns):
        left = (index * COLUMN_INCHES + 1.1) / width
        axes = figure.add_axes((left, 0.6 / height, (COLUMN_INCHES - 1.4) / width, body / height))
        _draw_groups(axes, column, _hues(groups))
        _dress_axes(axes, rows, body / ROW_INCHES)
    _draw_legend(figure, rows)
    figure.text(0.3 / width, 1.0 - 0.22 / height, title, fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(0.3 / width, 1.0 - 0.56 / height, subtitle, fontsize=9.5, color=INK, va="top")
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None  # no time of drawing in the file
    try:
        figure.savefig(path, dpi=150, metadata=metadata)
    except OSError as error:
        raise InputError(f"picture {path} cannot be written: {error.strerror}") from error


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
    return (
        HEADING + sum(1.0 + BAR_HEIGHT * (row.forecast is not None and row.measured is not None) for row in rows) + GAP
    )


def _hues(groups: Mapping[str, Sequence[ChartRow]]) -> dict[str, str]:
    drafts = [name for name in groups if name != "plain"]
    return {"plain": PLAIN_COLOUR} | {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(drafts)}


def _draw_groups(axes: Any, groups: Mapping[str, Sequence[ChartRow]], hues: Mapping[str, str]) -> None:
    """Bars from the top down: a heading with the draft's name, then its rows; a row has one bar per known figure."""
    ticks, top = [], 0.0
    for group, rows in groups.items():
        hue = hues[group]
        name = "plain decoding" if group == "plain" else group
        axes.text(0.0, top + 0.45, name, fontsize=10, fontweight="bold", color=hue, ha="left", va="center", zorder=5)
        top += HEADING
        for row in rows:
            figures = ((row.forecast, _lighter(hue)), (row.measured, hue))
            bars = [(known, fill) for known, fill in figures if known is not None]
            for index, (known, fill) in enumerate(bars):
                _draw_bar(axes, top + 0.5 + index * BAR_HEIGHT, known, fill)
            middle = top + 0.5 + (len(bars) - 1) * BAR_HEIGHT / 2
            _label(axes, (max(known.high for known, _ in bars), middle), row)
            ticks.append((middle, row.setup_name.removeprefix(group).strip() or "k=0"))
            top += 1.0 + (len(bars) - 1) * BAR_HEIGHT
        top += GAP
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])


def _draw_bar(axes: Any, at: float, known: Interval, fill: str) -> None:
    axes.barh(at, known.estimate, height=BAR_HEIGHT, color=fill, edgecolor="white", linewidth=0.6, zorder=2)
    spread = [[known.estimate - known.low], [known.high - known.estimate]]
    style = {"ecolor": INK, "elinewidth": 0.9, "capsize": 2.0, "capthick": 0.9, "zorder": 4}
    axes.errorbar(known.estimate, at, xerr=spread, fmt="none", **style)


def _label(axes: Any, at: tuple[float, float], row: ChartRow) -> None:
    colour = LOSS if row.speedup < 1.0 else INK
    weight = "normal" if row.measured is None else "bold"
    text = f"{row.speedup:.2f}×"
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # keeps the dashed line out of it
    offset = {"xytext": (5, 0), "textcoords": "offset points"}
    style = {"fontsize": 8, "color": colour, "fontweight": weight, "ha": "left", "va": "center_baseline", "zorder": 5}
    axes.annotate(text, at, bbox=box, **offset, **style)


def _plain_rate(rows: Sequence[ChartRow]) -> float | None:
    return next((row.best_known.estimate for row in rows if row.group == "plain"), None)


def _dress_axes(axes: Any, rows: Sequence[ChartRow], num_rows: float) -> None:
    """Limits that columns share, the dashed line at plain decoding, grid and spines."""
    reach = max(known.high for row in rows for known in (row.forecast, row.measured) if known is not None)
    axes.set_xlim(0.0, reach * 1.1)
    axes.set_ylim(num_rows, 0.0)
    plain = _plain_rate(rows)
    if plain is not None:
        axes.axvline(plain, zorder=3, **PLAIN_LINE)
    axes.set_xlabel("output tokens per second, decode only; higher is better", fontsize=9, color=INK)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _draw_legend(figure: Any, rows: Sequence[ChartRow]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if any(row.forecast for row in rows):
        handles.append(Patch(facecolor=_lighter(PLAIN_COLOUR), label="forecast"))
    if any(row.measured for row in rows):
        handles.append(Patch(facecolor=PLAIN_COLOUR, label="measured, paired runs"))
    handles.append(Line2D([], [], color=INK, linewidth=0.9, marker="|", markersize=6, label="95 % interval"))
    if _plain_rate(rows) is not None:
        handles.append(Line2D([], [], label="plain decoding", **PLAIN_LINE))
    width, height = figure.get_size_inches()
    style = {"ncols": len(handles), "fontsize": 8.5, "labelcolor": INK, "frameon": False, "borderaxespad": 0.0}
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.0 - 0.3 / width, 1.0 - 0.84 / height), **style)


def _lighter(colour: str) -> str:
    """The colour mixed with white, as a forecast is shown."""
    parts = [int(colour[index : index + 2], 16) for index in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * 0.58):02x}" for part in parts)
