"""`plan`: what drafts would gain on hardware that is not at hand. Reads configs and headers; loads no weights."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from profiles.records import draft_spec
from profiles.records.errors import NotMeasuredError
from tuner.cli import options
from tuner.cli.output import print_result

if TYPE_CHECKING:
    from rich.table import Table


def plan(
    target: options.PlanTarget,
    draft: options.PlanDrafts,
    hardware: options.Hardware,
    engine: options.PlanEngine = "vllm",
    dtype: options.WeightsType = None,
    lengths: options.Lengths = "1-8",
    batch_size: options.BatchSizes = None,
    context: options.PlanContext = 1024,
    acceptance: options.AcceptanceFrom = "published",
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> None:
    """Plan for hardware that is not at hand, from configs alone: speed-ups with intervals, never proven."""
    from tuner.deploy.stored_policies import open_for_reading
    from tuner.plan.plan import PlanQuery, make_plan

    with ExitStack() as stack:
        evidence_store = None
        try:
            evidence_store = stack.enter_context(open_for_reading(store))
        except NotMeasuredError:
            if store is not None:
                raise
        query = PlanQuery(
            target=target,
            drafts=draft,
            hardware=hardware,
            engine=engine,
            dtype=dtype,
            batch_sizes=list(dict.fromkeys(batch_size or [1])),
            context=context,
            lengths=draft_spec.parse_lengths(lengths),
            acceptance=acceptance,
            evidence_store=evidence_store,
        )
        document = make_plan(query)
    print_result(document, *lines(document), json_only=json_only, table=lambda: table(document))


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    target, device, engine = document["target"], document["hardware"], document["engine"]["name"]
    yield f"planned: {target['name']} in {target['format']} on {device['name']}x{device['count']} with {engine}"
    for choice in document["choices"]:
        yield f"batch {choice['batch_size']}, {choice['domain']}: {choice['reason']}"
        end = choice["crossover_batch"]
        yield f"  gains end at batch {end}" if end else f"  gains up to batch {choice['largest_batch_tried']} at least"
        yield from (f"  would narrow it: {row['figure']} (leaves {row['open']:.0%} open)" for row in choice["narrow"])
    yield from (f"rests on {line}" for line in document["rests_on"])
    yield from (f"left out: {row['draft']}: {row['reason']}" for row in document["left_out"])


def table(document: Mapping[str, Any]) -> "Table":
    from tuner.report.tables import figures_table

    caption = "cost: plain steps per round (*: measured); even: the acceptance rate that equals plain decoding"
    names = ("batch", "domain", "speed-up", "tok/s", "tokens\n/round", "cost", "even")
    rows = figures_table("draft, k", names, caption=caption)
    for row in document["setups"]:
        rows.add_row(
            f"{row['draft']} k={row['k']}",
            str(row["batch_size"]),
            row["domain"],
            f"{row['speedup']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            f"{row['tok_per_s']:.4g}",
            f"{row['tokens_per_round']:.2f}",
            f"{row['cost']:.2f}{'*' * (row['basis'] == 'measured')}",
            "-" if row["break_even"] is None else f"{row['break_even']:.2f}",
        )
    return rows
