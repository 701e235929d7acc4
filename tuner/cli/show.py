"""`show`: what a store holds."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tuner.cli import options
from tuner.cli.output import console, print_lines

if TYPE_CHECKING:
    from rich.table import Table

    from store.inventory import Entry

UNIT_SECONDS = {"year": 365 * 86400, "month": 30 * 86400, "day": 86400, "hour": 3600, "minute": 60}


def show(store: options.Store = None) -> None:
    """Show what the store holds, how old it is, which machine it is from, and the latest policy."""
    from store import location
    from store.inventory import inventory
    from tuner.deploy.stored_policies import open_for_reading, read_policy
    from tuner.report import tables

    with open_for_reading(store) as evidence_store:
        entries = inventory(evidence_store)
        text = evidence_store.latest_policy()
        policy = None if text is None else read_policy(evidence_store, text)
    print_lines(f"store {location.store_name(location.store_location(store))}")
    console().print(inventory_table(entries, datetime.now(UTC)))
    if policy is not None:
        console().print(tables.table(policy))


def inventory_table(entries: "Sequence[Entry]", now: datetime) -> "Table":
    """One row per target and machine: how much evidence there is and how old it is. `now` needs its time zone."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, leading=1)
    table.add_column("target, and where it was measured", overflow="fold")
    table.add_column("evidence, and its age", no_wrap=True)
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
            "\n".join(_amounts(entry, now)),
        )
        for failure in entry.failures:
            reason = Text(f"{failure.setup_name} failed: {failure.reason}, {failure.detail}")
            table.add_row(reason, age(failure.seen, now), style="dim")
    return table


def _amounts(entry: "Entry", now: datetime) -> Iterator[str]:
    for table, count in entry.rows.items():
        yield f"{table.replace('_', ' ')}: {count}"
    if entry.disturbed is not None:
        yield f"{entry.disturbed:.1%} of samples disturbed"
    yield f"newest: {age(entry.newest, now)}"
    yield f"oldest: {age(entry.oldest, now)}"


def age(created: str, now: datetime) -> str:
    """How long ago an ISO 8601 time with its zone was, in the largest unit that has passed: `3 hours ago`."""
    seconds = (now - datetime.fromisoformat(created)).total_seconds()
    if seconds < -60.0:
        return "in the future: a clock was wrong"
    for unit, unit_seconds in UNIT_SECONDS.items():
        if seconds >= unit_seconds:
            count = int(seconds // unit_seconds)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
