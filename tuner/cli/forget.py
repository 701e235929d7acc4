"""`forget`: delete what a store holds about a target, or what is old."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from profiles.records import draft_spec
from profiles.records.errors import InputError
from tuner.cli import options
from tuner.cli.output import print_result

Target = Annotated[str | None, typer.Option(help="Name or digest of the target; the default is all, with --before.")]
Before = Annotated[
    str | None, typer.Option(metavar="DATE|AGE", help="Only what is older: 2026-01-31, or 30d, 12h, 30m, 90s.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")]


def forget(
    target: Target = None,
    before: Before = None,
    dry_run: DryRun = False,
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> None:
    """Delete evidence, runs and policies of a target, or those before a date."""
    from store import location
    from store.evidence_store import EvidenceStore
    from store.forget import forget as delete_rows

    if target is None and before is None:
        raise InputError("nothing to forget: name a --target, a date with --before, or both")
    store_location = location.existing_store(store)
    with EvidenceStore.open(store_location) as evidence_store:
        time = None if before is None else _utc(before)
        forgotten = delete_rows(evidence_store, target=target, before=time, dry_run=dry_run)
    name = location.store_name(store_location)
    action = "would delete" if dry_run else "deleted"
    rows = ", ".join(f"{count} {table.replace('_', ' ')}" for table, count in forgotten.rows.items())
    targets = ", ".join(dict.fromkeys(model.name for model in forgotten.targets))
    age = "" if before is None else f" older than {before}"
    line = f"{action} {rows or 'nothing'} of {targets or 'no target'}{age} in store {name}"
    print_result({**asdict(forgotten), "dry_run": dry_run, "store": name}, line, json_only=json_only)


def _utc(before: str) -> str:
    """A date, time or age as the store writes times. Raises InputError."""
    try:
        date = datetime.fromisoformat(before)
    except ValueError:
        try:
            date = datetime.now(UTC) - timedelta(seconds=draft_spec.parse_age(before))
        except InputError as error:
            raise InputError(f"--before {before!r}: a date like 2026-01-31 or an age like 30d is needed") from error
    return date.replace(tzinfo=date.tzinfo or UTC).astimezone(UTC).isoformat(timespec="microseconds")
