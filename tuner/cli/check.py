"""`check`: whether drafts fit a target, in seconds."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from profiles import builtin
from profiles.records import draft_spec
from profiles.records.errors import InputError
from tuner.cli import options
from tuner.cli.messages import prompt_notes
from tuner.cli.output import console, print_notes, print_result

if TYPE_CHECKING:
    from rich.table import Table

    from profiles.fit.check import DraftCheck, FitReport

UNKNOWN = "-"


def check(
    target: options.Target = builtin.TARGET,
    draft: options.Drafts = None,
    batch_size: options.QueryBatchSize = 1,
    context: options.QueryContext = None,
    prompts: options.Prompts = None,
    dtype: options.DType = None,
    device: options.Device = None,
    json_only: options.JsonOnly = False,
) -> int:
    """Check in seconds whether drafts fit a target: tokens, positions, memory and a first look at acceptance."""
    specs = drafts_for(target, draft)
    with console(stderr=True).status("loading"):
        from profiles.fit import check as fit
        from profiles.prompts import reader

        requests = reader.read_all(prompts or [])
        report = fit.check(
            target, specs, requests, batch_size=batch_size, context_length=context, dtype=dtype, device=device
        )
    print_notes(*(prompt_notes(Counter(request.domain for request in requests)) if requests else ()))
    print_result(report.to_json(), json_only=json_only, table=lambda: check_table(report))
    return InputError.exit_code if any(draft.problem is not None for draft in report.drafts) else 0


def drafts_for(
    target: str, drafts: list[str] | None, lookup_draft: str = "ngram", builtin_drafts: tuple[str, ...] = builtin.DRAFTS
) -> list[draft_spec.DraftSpec]:
    """The drafts that were given; by default prompt look-up, and for the builtin target the builtin drafts."""
    default = [*(builtin_drafts if target == builtin.TARGET else ()), lookup_draft]
    return [draft_spec.parse_draft(text) for text in drafts or default]


def check_table(report: "FitReport") -> "Table":
    """One row per draft; the target's needs and the free memory above, reasons and notes below.

    `total added` is what a draft needs beside the target: weights, and caches at the batch and context of the title.
    """
    from rich.filesize import decimal

    from tuner.report.tables import figures_table

    need, shape = report.need, f"at batch {report.batch_size}, context {report.context_length}"
    title = (
        f"{report.target}, {report.dtype} on {report.device}\n"
        f"{report.max_positions} positions; weights {decimal(need.weight_bytes)}, "
        f"cache {decimal(need.cache_bytes_per_token)} per token\n"
        f"{decimal(need.total_bytes(report.num_tokens))} {shape}; {decimal(report.free_bytes)} free"
    )
    reasons = [f"cannot be used: {draft.problem}" for draft in report.drafts if draft.problem is not None]
    names = ("same\ntokens", "longest\ncontext", "weights", "cache\n/token", "total\nadded", "accept\nrate")
    notes = "\n".join([*reasons, *report.notes])
    table = figures_table("draft", (*names, "accept\nlength"), title=title, caption=notes)
    for draft in report.drafts:
        table.add_row(draft.name, *_cells(draft, report.num_tokens), style="dim" if draft.problem else "")
    return table


def _cells(draft: "DraftCheck", num_tokens: int) -> Iterator[str]:
    from rich.filesize import decimal

    yield {True: "yes", False: "no", None: UNKNOWN}[draft.same_tokens]
    yield UNKNOWN if draft.max_positions is None else str(draft.max_positions)
    need, quick = draft.need, draft.quick_acceptance
    sizes = (need.weight_bytes, need.cache_bytes_per_token, need.total_bytes(num_tokens)) if need else (None,) * 3
    yield from (UNKNOWN if size is None else decimal(size) for size in sizes)
    figures = (quick.acceptance_rate, quick.acceptance_length) if quick else (None, None)
    yield from (UNKNOWN if figure is None else f"{figure:.2f}" for figure in figures)
