"""`show`: what a store holds."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tuner.cli import options
from tuner.cli.output import console, print_lines

if TYPE_CHECKING:
    from rich.table import Table

    from store.inventory import Entry


def show(store: options.Store = None) -> None:
    """Show what the store holds, from when, which machine it is from, and the latest policy."""
    from store import location
    from store.inventory import inventory
    from tuner.deploy.stored_policies import open_for_reading, read_policy
    from tuner.report import tables

    with open_for_reading(store) as evidence_store:
        entries = inventory(evidence_store)
        text = evidence_store.latest_policy()
        policy = None if text is None else read_policy(evidence_store, text)
    print_lines(f"store {location.store_name(location.store_location(store))}")
    console().print(inventory_table(entries))
    if policy is not None:
        console().print(tables.table(policy))


def inventory_table(entries: "Sequence[Entry]") -> "Table":
    """One row per target and machine: how much evidence there is, and from when."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, leading=1)
    table.add_column("target, and where it was measured", overflow="fold")
    table.add_column("evidence, and its time (UTC)", no_wrap=True)
    for entry in entries:
        target, machine = entry.target, entry.environment
        table.add_row(
            Text.assemble(
                (target.name, "bold"),
                f"\n{target.weights_type}, digest {target.digest[:8]}",
                f"\n{machine.device}, {machine.threads} threads",
                f"\ntorch {machine.torch}",
                f"\n{machine.engine} {machine.engine_version}",
            ),
            "\n".join(_amounts(entry)),
        )
        for failure in entry.failures:
            reason = Text(f"{failure.setup_name} failed: {failure.reason}, {failure.detail}")
            table.add_row(reason, _time(failure.seen), style="dim")
    return table


def _amounts(entry: "Entry") -> Iterator[str]:
    for table, count in entry.rows.items():
        yield f"{table.replace('_', ' ')}: {count}"
    if entry.disturbed is not None:
        yield f"{entry.disturbed:.1%} of samples disturbed"
    yield f"newest: {_time(entry.newest)}"
    yield f"oldest: {_time(entry.oldest)}"


def _time(stored: str) -> str:
    return stored[:16].replace("T", " ")
