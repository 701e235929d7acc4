"""A tuning run that is killed at a random moment, what it left, and what the run after it measures again.

This module starts such runs, each in a process forked from it, so that libraries are loaded once. A run
asks the fake engine (or, `torch`, measures the family that ships) and notes in a journal when a unit is begun and
measured. A note is one `write`, which outlives the process. Who kills it asks the file with raw SQL and
trusts nothing that it tests.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from profiles.engines.base import Engine
from profiles.records.core import digest_of
from profiles.records.evidence import TargetTrace
from profiles.records.keys import run_point, unit_digest
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.support.fakes import GREEDY, FakeEngine, prompts
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.run import TuningSession, tune

PROMPTS = (*prompts(40, "code"), *prompts(40, "prose"))
OPTIONS = Options(lengths=(1, 2, 3, 4))
ROWS = {  # the rows of each evidence table, by a key in the first column
    "models": "SELECT * FROM models",
    "environments": "SELECT * FROM environments",
    "target_traces": "SELECT * FROM target_traces",
    "acceptance_traces": "SELECT * FROM acceptance_traces",
    "lookup_traces": "SELECT * FROM lookup_traces",
    "step_times": """
        SELECT digest || component_digest || width AS id, sweeps.digest AS sweep, batch_size, context_length,
            max_length, component_digest, width, component,
            samples_s, median_s, disturbed
        FROM step_times JOIN sweeps ON sweeps.id = sweep_id""",
    "samples": """
        SELECT units.digest || position AS id, units.digest AS unit, purpose, workloads.digest AS workload,
            setups.name AS setup, prompts.digest AS prompt, position, ttft_s, decode_s,
            output_tokens, rounds, shapes, refills, output_digest, disturbed
        FROM samples JOIN units ON units.id = unit_id JOIN workloads ON workloads.id = workload_id
            JOIN setups ON setups.id = setup_id JOIN prompts ON prompts.id = prompt_id""",
}
MADE_ANEW = {"id", "measured_at", "sweep"}  # differ between two runs of the fake engine
FAKE, TORCH = "fake", "torch"

Moment = Literal["any", "measuring", "commit"]
Rows = dict[str, dict[Any, dict[str, Any]]]  # table -> primary key -> row


# --- the run that is killed ---


class Journal:
    """Notes, one line each, that a kill cannot take back."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, event: str, **said: Any) -> None:
        os.write(self._file, (json.dumps({"event": event, **said}) + "\n").encode())


class Noted:
    """Fits `Engine`: notes every unit before and after it is measured, which takes `pause_s` longer."""

    def __init__(self, engine: Engine, journal: Journal, pause_s: float) -> None:
        self._engine, self._journal, self._pause_s = engine, journal, pause_s

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name not in ("trace_target", "trace_draft", "time_steps", "run_together"):
            return found

        def measure(*question: Any) -> Any:
            key = [part for part in question if not isinstance(part, TargetTrace)]  # stored ones may be rounded
            said = {}
            if name == "run_together":
                workload, prompts, setups, purpose = question
                unit = unit_digest(self.target, self.environment, run_point(workload, prompts, setups, purpose))
                said = {"table": "samples", "unit_digest": unit, "rows": len(setups) * len(prompts)}
            self._journal.note("begun", unit=f"{name} {digest_of(repr(key))}", **said)
            time.sleep(self._pause_s)
            evidence = found(*question)
            more = {"table": "step_times", "rows": len(evidence)} if name == "time_steps" else {}
            self._journal.note("measured", **more)
            return evidence

        return measure


def run(store: Path, journal_path: Path, kind: str, pause_s: float) -> None:
    """One run of `tune`; notes `ready` before it opens the store."""
    loads, options = [(GREEDY, PROMPTS)], OPTIONS
    engine: Engine = FakeEngine(keep=0.9)
    if kind == TORCH:
        from profiles.timing import clock
        from tests.benchmarks.common import family

        bench, workload, chosen = family(6, 8)
        clock.Disturbance.disturbed = False  # other programs must not make the second run measure again
        engine, loads, options = bench.engine, [(workload, chosen)], Options(lengths=(1, 2))
    journal = Journal(journal_path)
    journal.note("ready")
    with EvidenceStore.open(store) as evidence_store:
        tune(Noted(engine, journal, pause_s), loads, TuningSession.of(evidence_store), options, Watch())
    journal.note("finished")


def serve() -> None:
    """For every line of words a run in a process of its own: prints its id and, after one more line, how it ended."""
    for line in iter(sys.stdin.readline, ""):
        store, journal, kind, pause_s = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(Path(store), Path(journal), kind, pause_s)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdin.readline()  # until then a process that ended keeps its id, and may be killed in vain
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


# --- what the parent sees ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One killed run: what it was doing, the rows it had committed before, and what came of them."""

    doing: str
    committed: int
    lost: int
    torn: int
    repeated: int


class Starter:
    """The process that runs are forked from; use it in a `with` block."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crashes"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *words: object) -> int:
        """The id of the process, which is its own until `wait`."""
        return self._ask(json.dumps(words))

    def wait(self) -> int:
        """How the process ended."""
        return self._ask("")

    def _ask(self, line: str) -> int:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


@dataclass(slots=True, kw_only=True)
class Victim:
    """A store and the runs that were killed over it."""

    folder: Path
    kind: str = FAKE
    starter: Starter
    begun: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)  # digests of units after which a run began another
    notes: list[dict[str, Any]] = field(default_factory=list)
    num_runs: int = 0

    @property
    def store(self) -> Path:
        return self.folder / "evidence.db"

    def start(self, pause_s: float = 0.0) -> int:
        """The next run, when it is about to open the store."""
        self.num_runs += 1
        self.folder.mkdir(exist_ok=True)
        pid = self.starter.start(str(self.store), str(self._journal), self.kind, pause_s)
        deadline = time.monotonic() + 120.0
        while not self._last():
            assert time.monotonic() < deadline, "the run does not start"
            time.sleep(0.001)
        return pid

    def kill(self, rng: random.Random, within_s: float, moment: Moment, pause_s: float = 0.0) -> Kill | int:
        """Kills the next run at a random time, which is up to `within_s` later than the start or the first new unit.

        In a commit: when the next unit after that time was just measured. A number when the run ended before: how
        many units it measured again.
        """
        pid = self.start(pause_s)
        if moment != "any":
            self._wait_for(("begun", "finished"), 60.0)
        time.sleep(rng.uniform(0.0, within_s))
        before = rows_of(self.store)
        if moment == "commit":
            self._wait_for(("measured", "finished"), 0.5)
            time.sleep(rng.uniform(0.0, 0.004))
        os.kill(pid, signal.SIGKILL)
        code = self.starter.wait()
        noted, repeated = self.read_notes()
        if code == 0:
            return repeated
        assert code == -signal.SIGKILL
        after = rows_of(self.store)
        doing = {"ready": "opening or recalling", "begun": "measuring", "measured": "saving or deciding"}
        return Kill(
            doing=doing[noted],
            committed=sum(map(len, before.values())),
            lost=lost(before, after) + self._lost_units(),
            torn=torn(self.store, after, self.notes) if after else 0,
            repeated=repeated,
        )

    def finish(self) -> int:
        """Lets the next run end; units that it measured again."""
        self.start()
        assert self.starter.wait() == 0
        return self.read_notes()[1]

    def read_notes(self) -> tuple[str, int]:
        """The last event of the run that ended, and how many units it began that an earlier one had begun."""
        notes = [json.loads(line) for line in self._journal.read_text().splitlines()]
        begun = [note for note in notes if note["event"] == "begun"]
        units = {note["unit"] for note in begun}
        repeated = len(units & self.begun)
        self.begun |= units
        self.saved |= {note["unit_digest"] for note in begun[:-1] if "unit_digest" in note}
        self.notes += notes
        return notes[-1]["event"], repeated

    @property
    def _journal(self) -> Path:
        return self.folder / f"journal-{self.num_runs}"

    def _last(self) -> str:
        notes = self._journal.read_text().splitlines()[-1:] if self._journal.exists() else []
        return json.loads(notes[0])["event"] if notes and notes[0].endswith("}") else ""

    def _wait_for(self, events: tuple[str, ...], most_s: float) -> None:
        deadline = time.monotonic() + most_s
        while self._last() not in events and time.monotonic() < deadline:
            time.sleep(0.0002)

    def _lost_units(self) -> int:
        """Units that a run had saved before it began another, and that are not there."""
        with closing(sqlite3.connect(self.store)) as connection:
            there = {digest for (digest,) in connection.execute("SELECT digest FROM units")} if self.saved else set()
        return len(self.saved - there)


def rows_of(store: Path) -> Rows:
    """Every row of the evidence tables, by raw SQL; nothing where there is no table yet."""
    if not store.exists():
        return {}
    found: Rows = {}
    with closing(sqlite3.connect(store, timeout=60.0)) as connection:
        connection.row_factory = sqlite3.Row
        known = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for table, query in ROWS.items():
            if table in known:
                rows = [dict(row) for row in connection.execute(query)]
                found[table] = {next(iter(row.values())): row for row in rows}
    return found


def lost(before: Rows, after: Rows) -> int:
    """Rows that were there and are gone, or say something else."""
    return sum(after.get(table, {}).get(key) != row for table, rows in before.items() for key, row in rows.items())


def torn(store: Path, rows: Rows, notes: list[dict[str, Any]]) -> int:
    """Units of which only a part is there, and complaints of the database itself."""
    wanted = {note["unit_digest"]: note["rows"] for note in notes if "unit_digest" in note}
    units = Counter(row["unit"] for row in rows.get("samples", {}).values())
    sizes = {note["rows"] for note in notes if note.get("table") == "step_times" and note["event"] == "measured"}
    components = {(row["sweep"], row["component_digest"]) for row in rows.get("step_times", {}).values()}
    sweeps = Counter(sweep for sweep, _ in components)
    with closing(sqlite3.connect(store)) as connection:
        complaints = [line for (line,) in connection.execute("PRAGMA integrity_check") if line != "ok"]
        complaints += list(connection.execute("PRAGMA foreign_key_check"))
    partial = [unit for unit, size in units.items() if size != wanted[unit]]
    partial += [sweep for sweep, size in sweeps.items() if size not in sizes]
    return len(partial) + len(complaints)


def evidence_of(store: Path) -> Mapping[str, list[str]]:
    """What two runs of the fake engine must agree on."""
    return {
        table: sorted(str({name: row[name] for name in row if name not in MADE_ANEW}) for row in rows.values())
        for table, rows in rows_of(store).items()
    }


def whole_evidence(store: Path) -> Mapping[str, list[str]]:
    """What a run that nobody kills saves in a new store."""
    with EvidenceStore.open(store) as evidence_store:
        tune(FakeEngine(keep=0.9), [(GREEDY, PROMPTS)], TuningSession.of(evidence_store), OPTIONS, Watch())
    return evidence_of(store)


if __name__ == "__main__":
    serve()
