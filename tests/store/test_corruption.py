"""Damaged bundles, databases and policy files, made by chance with a fixed seed: a line that says so, nothing changed.

A bundle's checksum finds every damage. A database and a policy file have none: damage in unused space or in a value
may leave something that is still valid, and then it must be answered; both are counted.
"""

import json
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles.records.errors import DraftpickError, InputError, PolicyError
from store.evidence_store import EvidenceStore
from tests.support.bundles import ELSEWHERE, fill, resealed, save_sample, sealed
from tests.support.cli import assert_refused, call, content, database
from tests.support.fakes import sql
from tuner.bundle import bundle
from tuner.bundle.rows import CHILDREN
from tuner.bundle.rows import TABLES as ROOTS
from tuner.policy import policy as policies

SEED = 77
TABLES = (*ROOTS, *CHILDREN.values())
NUM_BUNDLES, NUM_SEALED, NUM_DATABASES, NUM_POLICIES = 60, 24, 32, 60
STRANGE = (None, True, -1, 0, 7, 1.5, 1e200, 2**50, "", "x", "../x", [], {}, [[]], [1, "a"], "\ud800")
STRANGE_VALUES = (None, -1, 0, 7, 1.5, 1e200, 2**50, "", "x", "../x", "[]", "{}", "[[]]", b"", b"x", b"i\0\0\0\1")
Damage = Callable[[random.Random, bytes], bytes]


def flip_a_bit(rng: random.Random, sound: bytes) -> bytes:
    offset = rng.randrange(len(sound))
    return sound[:offset] + bytes([sound[offset] ^ 1 << rng.randrange(8)]) + sound[offset + 1 :]


def flip_many(rng: random.Random, sound: bytes) -> bytes:
    for _ in range(rng.randint(2, 200)):
        sound = flip_a_bit(rng, sound)
    return sound


def cut_off(rng: random.Random, sound: bytes) -> bytes:
    return sound[: rng.randrange(len(sound))]


def insert(rng: random.Random, sound: bytes) -> bytes:
    offset = rng.randrange(len(sound) + 1)
    return sound[:offset] + rng.randbytes(rng.randint(1, 40)) + sound[offset:]


def cut_out(rng: random.Random, sound: bytes) -> bytes:
    offset = rng.randrange(len(sound))
    return sound[:offset] + sound[offset + rng.randint(1, 40) :]


def overwrite(rng: random.Random, sound: bytes) -> bytes:
    offset, noise = rng.randrange(len(sound)), rng.randbytes(rng.randint(1, 200))
    changed = sound[:offset] + noise + sound[offset + len(noise) :]
    return changed if changed != sound else flip_a_bit(rng, sound)


def zero_a_page(rng: random.Random, sound: bytes) -> bytes:
    offset = rng.randrange(len(sound) // 4096) * 4096
    return sound[:offset] + bytes(4096) + sound[offset + 4096 :]


def swap_pages(rng: random.Random, sound: bytes) -> bytes:
    pages = [sound[offset : offset + 4096] for offset in range(0, len(sound), 4096)]
    one, other = rng.sample(range(len(pages)), 2)
    pages[one], pages[other] = pages[other], pages[one]
    return b"".join(pages)


ANYWHERE: tuple[Damage, ...] = (flip_a_bit, flip_many, cut_off, insert, cut_out, overwrite)
IN_PAGES: tuple[Damage, ...] = (*ANYWHERE, zero_a_page, swap_pages)


def offsets_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, but for the numbers of a long list only the first."""
    if isinstance(value, dict):
        own = [(value, key) for key in value]
    elif isinstance(value, list):
        own = [(value, key) for key in range(min(len(value), 3))]
    else:
        return []
    return own + [deeper for container, key in own for deeper in offsets_in(container[key])]


def change_json(rng: random.Random, value: Any) -> None:
    """Swaps two values, puts a strange one somewhere, leaves one out or adds one."""
    offsets = offsets_in(value)
    (one, key), (other, other_key) = rng.choice(offsets), rng.choice(offsets)
    kind = rng.randrange(4)
    if kind == 0:
        kept = json.loads(json.dumps([one[key], other[other_key]]))
        one[key], other[other_key] = kept[1], kept[0]
    elif kind == 1:
        one[key] = rng.choice(STRANGE)
    elif kind == 2:
        del one[key]
    elif isinstance(one, dict):
        one[rng.choice(["id", "extra", "", "__class__", "a" * 500])] = 1
    else:
        one.insert(0, rng.choice([None, "x", -1, {}, []]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in one file, its policy file, and `all.bundle` of it."""
    folder = tmp_path_factory.mktemp("sound")
    with EvidenceStore.open(database(folder)) as evidence_store:
        fill(evidence_store)
        bundle.pack(evidence_store, folder / "all.bundle")
    sql(database(folder), "PRAGMA wal_checkpoint(TRUNCATE)")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Another machine's store, which a refused merge must leave as it is."""
    folder = tmp_path / "target"
    with EvidenceStore.open(database(folder)) as evidence_store:
        save_sample(evidence_store, 1, ELSEWHERE)
    return folder


def said_by(action: Callable[[], object], kind: type[DraftpickError] = DraftpickError) -> str:
    """The line of the error that must come, or nothing; every other exception fails the test."""
    said = ""
    try:
        action()
    except kind as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 1000
    return said


def test_damaged_bundles(sound: Path, target: Path, tmp_path: Path) -> None:
    """None is taken for sound, whatever was damaged; inspect, merge and the command line say so and the store stays."""
    whole, before, path = (sound / "all.bundle").read_bytes(), content(target), tmp_path / "damaged"
    with EvidenceStore.open(database(target)) as evidence_store:
        for number in range(NUM_BUNDLES):
            path.write_bytes(ANYWHERE[number % len(ANYWHERE)](random.Random(f"{SEED} bundle {number}"), whole))
            assert said_by(lambda: bundle.inspect(path), InputError), number
            assert said_by(lambda: bundle.merge(evidence_store, path), InputError), number
    for words in (("inspect", path), ("merge", path), ("merge", path, "--json")):
        assert_refused(call(target, "bundle", *words), 2, f"bundle {path}: ")
    assert content(target) == before
    assert bundle.inspect(sound / "all.bundle").rows["policies"] == 1


def test_bundles_changed_and_sealed_again(sound: Path, target: Path, tmp_path: Path) -> None:
    """A changed value or page under a right checksum is refused in a line, or allowed, and then merged and packed."""
    whole, before, outcomes = sound / "all.bundle", content(target), Counter[str]()
    path, columns = tmp_path / "changed", [(table, column.name) for table in TABLES for column in table.columns]
    for number in range(NUM_SEALED):
        rng = random.Random(f"{SEED} sealed {number}")
        if number % 2:
            sealed(path, IN_PAGES[number % len(IN_PAGES)](rng, whole.read_bytes()[:-32]))
        else:
            table, column = rng.choice(columns)
            first = f"(SELECT {column} FROM {table.name} LIMIT 1)"
            statement = f"UPDATE OR IGNORE {table.name} SET {column} = ? WHERE {column} = {first}"
            try:
                resealed(whole, path, (statement, (rng.choice(STRANGE_VALUES),)))
            except sqlite3.IntegrityError:  # SQLite itself refuses it, as a key that is no integer
                continue
        if said_by(lambda: bundle.inspect(path), InputError):
            with EvidenceStore.open(database(target)) as evidence_store:
                assert said_by(lambda store=evidence_store: bundle.merge(store, path), InputError), number
            assert content(target) == before, number
            outcomes["refused"] += 1
        else:
            with EvidenceStore.open(tmp_path / f"{number}.db") as evidence_store:
                bundle.merge(evidence_store, path)
                bundle.pack(evidence_store, tmp_path / "packed")
            outcomes["allowed"] += 1
    assert outcomes["refused"] >= NUM_SEALED // 3, outcomes


def test_damaged_databases(sound: Path, tmp_path: Path) -> None:
    """Every reader and `bundle pack` end in one line, or answer from what is still valid; the file stays as it was."""
    whole, outcomes = database(sound).read_bytes(), Counter[str]()
    readers = (("show",), ("lookup", "--json"), ("explain",), ("bundle", "pack", tmp_path / "packed"))
    for number in range(NUM_DATABASES):  # every reader meets every kind of damage, and no two the same file
        damaged = IN_PAGES[number % len(IN_PAGES)](random.Random(f"{SEED} database {number}"), whole)
        words = readers[number // len(IN_PAGES) % len(readers)]
        folder = tmp_path / str(number)
        folder.mkdir()
        database(folder).write_bytes(damaged)
        said = call(folder, *words)
        if said.code:
            assert_refused(said, said.code, "")
            assert said.code in (2, 3), said
        else:
            assert said.stderr == ""
        assert database(folder).read_bytes() == damaged, (number, words)
        outcomes["refused" if said.code else "answered"] += 1
        shutil.rmtree(folder)
    assert outcomes["refused"] >= NUM_DATABASES // 2, outcomes


def test_damaged_policies(sound: Path, tmp_path: Path) -> None:
    """A damaged policy file is refused in a line that names it, or is still a valid policy."""
    [kept] = sound.glob("policy-*.json")
    path, outcomes = tmp_path / "policy.json", Counter[str]()
    for number in range(NUM_POLICIES):
        rng = random.Random(f"{SEED} policy {number}")
        if number % 2:
            document = json.loads(kept.read_text())
            change_json(rng, document)
            path.write_text(json.dumps(document))
        else:
            path.write_bytes(ANYWHERE[number // 2 % len(ANYWHERE)](rng, kept.read_bytes()))
        written, said = path.read_bytes(), said_by(lambda: policies.read(path), PolicyError)
        assert said == "" or str(path) in said
        assert path.read_bytes() == written
        outcomes["refused" if said else "valid"] += 1
    assert outcomes["refused"] >= 50, outcomes
