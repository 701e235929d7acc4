"""Calls the command line in this process, so that torch is loaded once, and reads a store with raw SQL."""

import io
import json
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from store.evidence_store import EvidenceStore
from tests.support.fakes import sql
from tuner.cli.app import main

EVIDENCE = ("target_traces", "acceptance_traces", "lookup_traces", "step_times", "samples", "infeasible")
DECIDED = (0, 5)  # a run's exit codes when it chose: a proven win, or plain decoding
WORDS = ("fox", "dog", "river", "stone", "light", "garden", "flower", "evening", "animal", "water")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a command printed and the code it ended with."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document in the last line of stdout."""
        document: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return document

    @property
    def not_measured(self) -> list[dict[str, str]]:
        """The rows of `left_out` without those that were measured and are slower end to end: a matter of timing."""
        return [row for row in self.document["left_out"] if row["reason"] != "end to end"]


def call(store: Path, *words: str | Path, stdin: bytes = b"") -> Said:
    """`tune.py WORDS` with `store` as the store; any exception but SystemExit fails the test."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tune.py", *map(str, words)])
        patch.setenv("DRAFTPICK_STORE", str(store))
        # another program on the machine must not make a second run measure again
        patch.setattr("profiles.timing.clock.Disturbance.disturbed", False)
        patch.setattr("profiles.timing.clock.other_programs", lambda **_: None)  # it looks for 0.4 s
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as ended:
            main()
    return Said(code=int(ended.value.code or 0), stdout=stdout.getvalue(), stderr=stderr.getvalue())


def assert_refused(said: Said, code: int, wanted: str) -> None:
    """One line that starts with `error:` and holds `wanted`, nothing on stdout, and the code."""
    assert said.stderr.startswith("error: ")
    assert wanted in said.stderr, said.stderr
    assert said.stderr.count("\n") == 1
    assert said.stderr.endswith("\n")
    assert said.stdout == ""
    assert said.code == code


def small_run(target: Path, prompts: Path, *more: str) -> list[str]:
    """The words of a run that takes about a second on a tiny model."""
    words = ["run", "--target", str(target), "--prompts", str(prompts), "--lengths", "1-2", "--max-new-tokens", "8"]
    return [*words, *more]


def write_prompts(path: Path, count: int = 30) -> Path:
    """A JSONL file of short prompts, no two alike, in the domains `even` and `odd`."""
    texts = [
        " ".join(WORDS[(number * 7 + place * (1 + number % 5)) % 10] for place in range(5)) for number in range(count)
    ]
    rows = [
        {"prompt": f"{text} {number}", "domain": "odd" if number % 2 else "even"} for number, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def database(store: Path) -> Path:
    """The file with the evidence."""
    return store / "evidence.db"


def evidence(store: Path) -> dict[str, int]:
    """How many rows each evidence table has."""
    return {table: sql(database(store), f"SELECT count(*) FROM {table}")[0][0] for table in EVIDENCE}


def assert_packs(store: Path, folder: Path) -> None:
    """Every row of a store travels: it is packed whole, by a reader, and merged into another store."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvidenceStore, "open", None)
        packed = call(store, "bundle", "pack", "--json", folder / "run.bundle")
    assert packed.code == 0, packed.stderr
    assert packed.document["left_out"] == {}, packed.document["left_out"]
    merged = call(folder / "other", "bundle", "merge", "--json", folder / "run.bundle")
    assert merged.code == 0, merged.stderr
    assert (merged.document["known"], merged.document["unlike"]) == ({}, {})
    assert evidence(folder / "other") == evidence(store)


def content(store: Path) -> list[str]:
    """Every row of every table, as SQL."""
    with closing(sqlite3.connect(database(store))) as connection:
        return list(connection.iterdump())
