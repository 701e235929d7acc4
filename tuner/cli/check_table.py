"""The report of `check` as a table for the terminal: one row per draft, reasons and notes below."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from profiles.fit.report import DraftCheck, FitReport

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SAME_TOKENS = {True: "yes", False: "no", None: "-"}
UNKNOWN = "-"


def check_table(report: FitReport) -> Table:
    """The drafts under a title with the target's needs and the free memory.

    `adds in all` is what a draft needs beside the target: weights, and a cache at the batch and context of the title.
    `accept rate` and `accept length` are of the quick acceptance.
    """
    need, shape = report.need, f"at batch {report.batch_size}, context {report.context_length}"
    title = (
        f"{report.target}, {report.dtype} on {report.device}\n"
        f"{report.max_positions} positions; weights {format_bytes(need.weight_bytes)}, "
        f"cache {format_bytes(need.cache_bytes_per_token)} per token\n"
        f"{format_bytes(need.total_bytes(report.num_tokens))} {shape}; {format_bytes(report.free_bytes)} were free"
    )
    reasons = [f"cannot be used: {draft.problem}" for draft in report.drafts if draft.problem is not None]
    table = Table(
        title=Text(title),
        title_justify="left",
        caption=Text("\n".join([*reasons, *report.notes])),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # the names get the space, on 80 columns too
    )
    table.add_column("draft", overflow="fold")
    table.add_column("same\ntokens", no_wrap=True)
    for name in ("longest\ncontext", "weights", "cache\n/token", "adds\nin all", "accept\nrate", "accept\nlength"):
        table.add_column(name, justify="right", no_wrap=True)
    for draft in report.drafts:
        table.add_row(*_cells(draft, report.num_tokens))
    return table


def _cells(draft: DraftCheck, num_tokens: int) -> tuple[Text, ...]:
    need, acceptance = draft.need, draft.quick_acceptance
    cells = [_SAME_TOKENS[draft.same_tokens], UNKNOWN if draft.max_positions is None else str(draft.max_positions)]
    if need is None:
        cells += [UNKNOWN] * 3
    else:
        cells += map(format_bytes, (need.weight_bytes, need.cache_bytes_per_token, need.total_bytes(num_tokens)))
    figures = (None, None) if acceptance is None else (acceptance.acceptance_rate, acceptance.acceptance_length)
    cells += [UNKNOWN if figure is None else f"{figure:.2f}" for figure in figures]
    style = "" if draft.problem is None else "dim"
    return tuple(Text(cell, style=style) for cell in (draft.name, *cells))


def format_bytes(count: int) -> str:
    """Three digits and a binary unit: `16.2 MiB`."""
    value, unit = float(count), 0
    while value >= 1000.0 and unit < len(_UNITS) - 1:
        value, unit = value / 1024.0, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
