"""The commands `bundle pack`, `bundle inspect` and `bundle merge`; none loads torch."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import options
from tuner.cli.output import print_result

if TYPE_CHECKING:
    from tuner.bundle.bundle import Contents, Merged

File = Annotated[Path, typer.Argument(help="The bundle.")]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Name or digest of a target; repeatable; default: all.")
]
app = typer.Typer(help="Carry evidence, runs and policies between machines in one file.")


@app.command()
def pack(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    target: Targets = None,
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> None:
    """Write the store's evidence, runs and policies into one file, without paths."""
    from tuner.bundle import bundle
    from tuner.deploy.stored_policies import open_for_reading

    with open_for_reading(store) as evidence_store:
        contents = bundle.pack(evidence_store, path, target)
    print_result(asdict(contents), f"wrote {path}", *_description(contents), json_only=json_only)


@app.command()
def inspect(path: File, json_only: options.JsonOnly = False) -> None:
    """Check a bundle and describe its content; no store is touched."""
    from tuner.bundle import bundle

    contents = bundle.inspect(path)
    print_result(asdict(contents), *_description(contents), json_only=json_only)


@app.command()
def merge(path: File, store: options.Store = None, json_only: options.JsonOnly = False) -> None:
    """Add a bundle's new evidence, runs and policies to the store, whose own evidence stays."""
    from store import location
    from store.evidence_store import EvidenceStore
    from tuner.bundle import bundle

    bundle.inspect(path)  # a refused file makes no store
    store_location = location.store_location(store)
    with EvidenceStore.open(store_location) as evidence_store:
        merged = bundle.merge(evidence_store, path)
    document = asdict(merged)
    document["known"] = document.pop("stored")  # its key in 0.6
    document["store"] = name = location.store_name(store_location)
    print_result(document, f"store {name}", *_counts(merged), json_only=json_only)


def _counts(merged: "Merged") -> Iterator[str]:
    for table in dict.fromkeys([*merged.added, *merged.stored, *merged.unlike]):
        conflicts = merged.unlike.get(table, 0)
        left_out = f", {conflicts} unlike the store's and left out" if conflicts else ""
        yield f"{_spaced(table)}: {merged.added.get(table, 0)} new, {merged.stored.get(table, 0)} known{left_out}"
    yield from (f"left out: {conflict}" for conflict in merged.conflicts)
    if merged.clamped:
        yield f"{merged.clamped} times in the future, of a clock that was wrong, became the time of the merge"


def _description(contents: "Contents") -> Iterator[str]:
    yield f"bundle of schema {contents.schema}, {contents.num_bytes} bytes, newest row {contents.created}"
    yield f"SHA-256 {contents.sha256}"
    yield from (f"{_spaced(table)}: {count}" for table, count in contents.rows.items())
    for target in contents.targets:
        yield f"target {target.name}, {target.weights_type}, digest {target.digest[:8]}"
    yield from (f"draft {draft}" for draft in contents.drafts)
    for machine in contents.environments:
        software = f"torch {machine.torch}, {machine.engine} {machine.engine_version}"
        yield f"machine {machine.device}, {machine.threads} threads, {software}, digest {machine.digest[:8]}"
    for table, count in contents.left_out.items():
        yield f"left out, because of a path or a damaged value: {count} of {_spaced(table)}"


def _spaced(table: str) -> str:
    return table.replace("_", " ")
