"""Deletes what a store holds about a target, or what is older than a time."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, select

from profiles.records.core import Model
from profiles.records.errors import NotMeasuredError
from profiles.records.text import command
from store import tables
from store.evidence_store import EvidenceStore, targets_named

LINKED = {  # keys of rows that are deleted once nothing refers to them, and the columns that do
    tables.models.c.key: [table.c.target_key for table in tables.ABOUT_TARGETS],
    tables.environments.c.digest: [table.c.environment_digest for table in tables.ABOUT_TARGETS],
    tables.setups.c.id: [tables.samples.c.setup_id, tables.infeasible.c.setup_id],
    tables.workloads.c.id: [tables.units.c.workload_id, tables.infeasible.c.workload_id],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What was deleted, or would be: rows by table, and the targets they are about."""

    rows: dict[str, int]
    targets: tuple[Model, ...]


def forget(
    evidence_store: EvidenceStore, *, target: str | None = None, before: str | None = None, dry_run: bool = False
) -> Forgotten:
    """Delete evidence, runs and policies, and give their space back to the disk.

    Args:
        target: name, digest or run digest; None: of every target.
        before: UTC time; only what was made earlier. None: whatever its age.
        dry_run: only count.

    Raises: NotMeasuredError: the store does not know the target. StoreError: it cannot be written.
    """

    def delete_rows(connection: Connection) -> Forgotten:
        named = targets_named(connection, target)  # by the last part of a path too, which is too vague to delete by
        targets = tuple(row for row in named if target in (None, row.name, row.digest, row.run_digest))
        if target is not None and not targets:
            raise NotMeasuredError(f"the store knows no target {target!r}: `{command('show')}` lists them")
        rows: dict[str, int] = {}
        for table in tables.ABOUT_TARGETS:
            old: ColumnElement[bool] = table.c.target_key.in_([model.run_digest for model in targets])
            if before is not None:
                old &= table.c[tables.time_name(table.name)] < before
            if count := connection.scalar(select(func.count()).select_from(table).where(old)):
                rows[table.name] = count
            if not dry_run:
                connection.execute(delete(table).where(old))
        for key, columns in LINKED.items() if not dry_run else ():
            connection.execute(delete(key.table).where(*(key.not_in(select(column)) for column in columns)))
        return Forgotten(rows=rows, targets=targets)

    database = evidence_store.database
    forgotten = database.read(delete_rows) if dry_run else database.write(delete_rows)
    if forgotten.rows and not dry_run:
        database.vacuum()
    return forgotten
