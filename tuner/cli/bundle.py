"""The verbs of `tune.py bundle`: pack what a store knows into one file, tell what a file holds, merge it.

The rooms below do the work; nothing here loads torch.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from store import location
from store.evidence_store import EvidenceStore
from tuner.cli import options
from tuner.cli.output import print_json, say

if TYPE_CHECKING:
    from store.bundle.bundle import Contents

File = Annotated[Path, typer.Argument(help="The bundle.")]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Name or digest of a target; repeatable; default: all.")
]
Environments = Annotated[
    list[str] | None,
    typer.Option("--environment", help="Device name or digest of a machine; repeatable; default: all."),
]
Policies = Annotated[Path | None, typer.Option(help="A folder that also gets the latest policies, a file each.")]
KeepMine = Annotated[
    bool, typer.Option("--keep-mine", help="Where the store has other evidence, keep that and merge the rest.")
]

app = typer.Typer(rich_markup_mode=None, help="Carry evidence, runs and policies between machines in one file.")


@app.command()
def pack(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    target: Targets = None,
    environment: Environments = None,
    policies: Policies = None,
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> None:
    """Write what the store knows into one file, without paths and with a checksum."""
    from store.bundle import bundle
    from tuner.deploy import policy_files

    with EvidenceStore.open(location.existing_store(store)) as evidence_store:
        contents = bundle.pack(evidence_store, path, targets=target, environments=environment)
        written = (
            ()
            if policies is None
            else policy_files.export_policies(evidence_store, policies, targets=target, environments=environment)
        )
    if json_only:
        print_json({**asdict(contents), "policy_paths": [str(one) for one in written]})
    else:
        say(f"wrote {path}", *_told(contents), *(f"policy: {one}" for one in written))


@app.command()
def inspect(path: File, json_only: options.JsonOnly = False) -> None:
    """Check a bundle and tell what it holds; no store is touched."""
    from store.bundle import bundle

    contents = bundle.inspect(path)
    if json_only:
        print_json(asdict(contents))
    else:
        say(*_told(contents))


@app.command()
def merge(
    path: File, keep_mine: KeepMine = False, store: options.Store = None, json_only: options.JsonOnly = False
) -> None:
    """Add what a bundle holds to the store, all of it or nothing; again it changes nothing."""
    from store.bundle import bundle

    bundle.inspect(path)  # a file that is refused makes no store
    place = location.store_location(store)
    with EvidenceStore.open(place) as evidence_store:
        merged = bundle.merge(evidence_store, path, keep_mine=keep_mine)
    if json_only:
        print_json({**asdict(merged), "store": location.store_name(place)})
        return
    say(f"store {location.store_name(place)}")
    for table in dict.fromkeys([*merged.added, *merged.known, *merged.unlike]):
        said = f"{_spaced(table)}: {merged.added.get(table, 0)} new, {merged.known.get(table, 0)} known"
        left_out = merged.unlike.get(table, 0)
        say(f"{said}, {left_out} unlike the store's and left out" if left_out else said)


def _told(contents: "Contents") -> Iterator[str]:
    yield f"bundle version {contents.version}, schema {contents.schema}, of draftpick {contents.draftpick}"
    yield f"newest row {contents.created}; {contents.packed_bytes} bytes, {contents.unpacked_bytes} unpacked"
    yield f"content SHA-256 {contents.sha256}: as packed"
    yield from (f"{_spaced(table)}: {count}" for table, count in contents.rows.items())
    for target in contents.targets:
        yield f"target {target.name}, {target.weights_type}, digest {target.digest[:8]}"
    for machine in contents.environments:
        software = f"torch {machine.torch}, {machine.engine} {machine.engine_version}"
        yield f"machine {machine.device}, {machine.threads} threads, {software}, digest {machine.digest[:8]}"


def _spaced(table: str) -> str:
    return table.replace("_", " ")
