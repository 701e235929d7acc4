"""Shows a check of target and drafts as a table for the terminal: one row per draft, reasons and notes underneath.

It reads the report and finds out nothing itself.
"""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from profiles.fit.report import DraftCheck, PairReport

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SAME_TOKENS = {True: "yes", False: "no", None: "-"}
UNKNOWN = "-"


def check_table(report: PairReport) -> Table:
    """The drafts under a title that says what the target takes and what is free; reasons and notes stand below.

    `adds in all` is what a draft needs beside the target, weights and caches at the batch and context of the title;
    `kept` is the acceptance rate.
    """
    need, shape = report.need, f"at batch {report.batch_size}, context {report.context_length}"
    title = (
        f"{report.target}, {report.dtype} on {report.device}\n"
        f"{report.max_positions} positions; weights {spelled_bytes(need.weight_bytes)}, "
        f"cache {spelled_bytes(need.cache_bytes_per_token)} per token\n"
        f"{spelled_bytes(need.total_bytes(report.num_tokens))} {shape}; {spelled_bytes(report.free_bytes)} were free"
    )
    reasons = [f"cannot be used: {draft.problem}" for draft in report.drafts if draft.problem is not None]
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text("\n".join([*reasons, *report.notes])),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # the names get the room, on 80 columns too
    )
    table.add_column("draft", overflow="fold")
    table.add_column("same\ntokens", no_wrap=True)
    for name in ("longest\ncontext", "weights", "cache\n/token", "adds\nin all", "kept", "accept\nlength"):
        table.add_column(name, justify="right", no_wrap=True)
    for draft in report.drafts:
        table.add_row(*_cells(draft, report.num_tokens))
    return table


def _cells(draft: DraftCheck, num_tokens: int) -> tuple[Text, ...]:
    need, glance = draft.need, draft.glance
    cells = [_SAME_TOKENS[draft.same_tokens], UNKNOWN if draft.max_positions is None else str(draft.max_positions)]
    if need is None:
        cells += [UNKNOWN] * 3
    else:
        cells += map(spelled_bytes, (need.weight_bytes, need.cache_bytes_per_token, need.total_bytes(num_tokens)))
    figures = (None, None) if glance is None else (glance.acceptance_rate, glance.acceptance_length)
    cells += [UNKNOWN if figure is None else f"{figure:.2f}" for figure in figures]
    style = "" if draft.problem is None else "dim"
    return tuple(Text(cell, style=style) for cell in (draft.name, *cells))


def spelled_bytes(count: int) -> str:
    """Three digits and a binary unit: `16.2 MiB`."""
    value, unit = float(count), 0
    while value >= 1000.0 and unit < len(_UNITS) - 1:
        value, unit = value / 1024.0, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
