"""Split from store.inventory."""

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from store.inventory import Entry


def inventory_table(entries: Sequence[Entry], now: datetime) -> Table:
    """One row per entry: whose evidence, from where, how much, how old; `now` needs its time zone."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, leading=1)
    table.add_column("target, and where it was measured", overflow="fold")
    table.add_column("what is known, and how old", no_wrap=True)
    for entry in entries:
        target, machine = entry.target, entry.environment
        place = {True: "\nthis machine", False: "\nanother machine or other software", None: ""}[entry.is_here]
        table.add_row(
            Text.assemble(
                (target.name, "bold"),
                f"\n{target.weights_type}, digest {target.digest[:8]}",
                f"\n{machine.device}, {machine.threads} threads",
                f"\ntorch {machine.torch}",
                f"\n{machine.engine} {machine.engine_version}",
                (place, "green" if entry.is_here else "dim"),
            ),
            "\n".join(_known(entry, now)),
        )
        for failure in entry.failures:
            told = Text(f"{failure.setup_name} failed: {failure.reason}, {failure.detail}")
            table.add_row(told, age(failure.seen, now), style="dim")
    return table


def _known(entry: Entry, now: datetime) -> Iterator[str]:
    for table, count in entry.rows.items():
        yield f"{table.replace('_', ' ')}: {count}"
    if entry.disturbed is not None:
        yield f"{entry.disturbed:.1%} of samples disturbed"
    yield f"newest: {age(entry.newest, now)}"
    yield f"oldest: {age(entry.oldest, now)}"


def age(then: str, now: datetime) -> str:
    """How long ago an ISO 8601 time with its zone was, in the largest unit that has passed: `3 hours ago`."""
    seconds = (now - datetime.fromisoformat(then)).total_seconds()
    if seconds < -60.0:
        return "in the future: a clock was wrong"
    for unit, size in (("year", 365 * 86400), ("month", 30 * 86400), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"
