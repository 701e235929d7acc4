"""How a selector steered a run, as a picture: speed, what it chose and how full the batch was, over one time axis.

Draws rounds and series of figures in the colours of the page; who steered, and why it chose so, it must not know.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from profiles.records.errors import InputError
from tuner.report.charts import dress_axes
from tuner.report.data import Line, Span, Timeline
from tuner.report.pictures import PAGE, RC, WIDTH_INCHES, inline, round_numbers

WIDE_INCHES = 11.0  # on a screen; WIDTH_INCHES fills a phone
NUM_POINTS = 120  # of a smoothed line
LEAST_BAR = 0.004  # of the width: a shorter stretch would not be seen
HEIGHTS = {"legend": 0.3, "rate": 1.7, "length": 0.95, "batch": 0.6, "domain": 0.22}  # inches, from the top down
GAP_INCHES, BOTTOM_INCHES, LEFT_INCHES, RIGHT_INCHES = 0.16, 0.45, 0.52, 0.08
LETTER_INCHES = 0.075


def smoothed(spans: Sequence[Span], num_points: int = NUM_POINTS) -> Line:
    """Tokens per second of the clock in equal stretches of a run, each at its middle; idle time counts as 0 tokens.

    Raises InputError: no rounds, or none of any length.
    """
    if not spans or not sum(span.seconds for span in spans) > 0.0:
        raise InputError("a timeline needs rounds that took time; there are none")
    moments, tokens = [spans[0].start_s], [0.0]
    for span in spans:
        moments += [span.start_s, span.start_s + span.seconds]
        tokens += [tokens[-1], tokens[-1] + span.tokens]
    edges = numpy.linspace(moments[0], moments[-1], num_points + 1)
    rates = numpy.diff(numpy.interp(edges, moments, tokens)) / numpy.diff(edges)
    return tuple(zip(((edges[1:] + edges[:-1]) / 2).tolist(), rates.tolist(), strict=True))


def timeline(name: str, shown: Timeline, hues: Mapping[str, str], width_inches: float = WIDTH_INCHES) -> str:
    """An <svg> element: tokens per second, the length by its draft's hue, the batch and the domain over seconds.

    `hues` are colours of PAGE by draft. A page shows one as wide as a screen or one as wide as a phone, since text does
    not shrink with the window. Raises InputError: no rounds.
    """
    steered = smoothed(shown.spans)
    with rc_context(RC):
        figure, axes = _stacked(width_inches)
        _draw_rates(axes["rate"], steered, shown)
        _draw_lengths(axes["length"], shown, hues)
        _draw_batches(axes["batch"], shown)
        _draw_domains(axes["domain"], shown, width_inches)
        for one in axes.values():
            one.set_xlim(0.0, shown.end_s)
        axes["domain"].xaxis.set_major_locator(round_numbers(5 if width_inches < 6.0 else 10))
        axes["domain"].set_xlabel("seconds", fontsize=9, color=PAGE.ink)
        return inline(figure, name, "over time: tokens per second, chosen length and draft, batch size, domain")


def _stacked(width: float) -> tuple[Figure, dict[str, Any]]:
    """A figure with the axes under each other, on one time axis that only the lowest one labels."""
    height = sum(HEIGHTS.values()) + GAP_INCHES * (len(HEIGHTS) - 1) + BOTTOM_INCHES
    figure, axes, top = Figure(figsize=(width, height)), {}, height
    for name, own in HEIGHTS.items():
        top -= own
        if name != "legend":
            share = (width - LEFT_INCHES - RIGHT_INCHES) / width
            axes[name] = figure.add_axes((LEFT_INCHES / width, top / height, share, own / height), facecolor="none")
            dress_axes(axes[name], "y", PAGE)
            axes[name].tick_params(labelbottom=name == "domain")
        top -= GAP_INCHES
    return figure, axes


def _draw_rates(axes: Any, steered: Line, shown: Timeline) -> None:
    lines = (
        ("steered", steered, {"color": PAGE.ink, "linewidth": 1.8, "zorder": 4}),
        ("best single setup", shown.best_single, {"color": PAGE.faint, "linewidth": 1.8, "zorder": 3}),
        ("plain", shown.plain, {**PAGE.plain_line, "zorder": 2}),
    )
    for label, points, style in lines:
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_locator(round_numbers(4))
    axes.set_ylabel("tokens / s", fontsize=9, color=PAGE.ink)
    style = {"ncols": 3, "fontsize": 8.5, "labelcolor": PAGE.ink, "frameon": False, "borderaxespad": 0.0}
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.04), columnspacing=1.0, handlelength=1.6, **style)


def _draw_lengths(axes: Any, shown: Timeline, hues: Mapping[str, str]) -> None:
    """A bar as high as the length from each switch to the next; plain decoding leaves a line on the ground."""
    longest = max((span.length for span in shown.spans), default=0)
    bars: dict[str, list[Any]] = {}
    for (draft, length), start, end in _stretches(shown, "draft_name", "length"):
        height = 0.06 * (longest + 1) if draft == "plain" else length
        right = max(end, start + LEAST_BAR * shown.end_s)  # a probe of one round is seen
        bars.setdefault(draft, []).append([(start, 0.0), (start, height), (right, height), (right, 0.0)])
    for draft, corners in bars.items():
        axes.add_collection(PolyCollection(corners, facecolors=hues[draft], linewidths=0.0))
    axes.set_ylim(0.0, longest + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("k", fontsize=9, color=PAGE.ink)


def _draw_batches(axes: Any, shown: Timeline) -> None:
    found = [(start, size) for (size,), start, _ in _stretches(shown, "batch_size")]
    starts, sizes = [start for start, _ in found], [size for _, size in found]
    axes.stairs(sizes, [*starts, shown.end_s], baseline=None, color=PAGE.ink, linewidth=1.1)
    axes.set_ylim(0.0, max(sizes) * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.set_ylabel("batch", fontsize=9, color=PAGE.ink)


def _draw_domains(axes: Any, shown: Timeline, width_inches: float) -> None:
    """A strip in two greys by turns, with the name where there is room for it."""
    inches_per_s = (width_inches - LEFT_INCHES - RIGHT_INCHES) / shown.end_s
    for number, ((domain,), start, end) in enumerate(_stretches(shown, "domain")):
        axes.axvspan(start, end, color=PAGE.grid if number % 2 else PAGE.faint, alpha=0.55, linewidth=0.0)
        text = domain or "mixed"
        if len(text) * LETTER_INCHES < (end - start) * inches_per_s:
            style = {"fontsize": 8.5, "color": PAGE.ink, "ha": "center", "va": "center_baseline"}
            axes.text((start + end) / 2, 0.5, text, clip_on=True, **style)
    axes.set(ylim=(0.0, 1.0), yticks=[])
    axes.grid(visible=False)


def _stretches(shown: Timeline, *names: str) -> Iterator[tuple[tuple[Any, ...], float, float]]:
    """(values, start, end) of every stretch in which the named fields keep their values; it lasts up to the next."""
    starts = []
    for values, group in groupby(shown.spans, key=lambda span: tuple(getattr(span, name) for name in names)):
        starts.append((values, next(group).start_s))
    for index, (values, start) in enumerate(starts):
        yield values, start, starts[index + 1][1] if index + 1 < len(starts) else shown.end_s
