"""Many processes write one store at once: does one fail, is a unit there twice, is one there in part?

    .ci/postgres python -m tests.benchmarks.writers

Eight processes share a SQLite file, sixteen a PostgreSQL database (left out with a reason where no server is given).
Each opens the store while it is still being made, does a whole tuning run, then saves units that all the others save
too, every process with timings and traces of its own, for some seconds. What is there is then counted with raw SQL.
`measured_for_nothing`: units that another process had saved while this one measured them; the first one answers.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from profiles.records.core import PLAIN, Setup, Workload
from store.cached_engine import CachedEngine
from store.database import Location
from store.evidence_store import EvidenceStore, Scope
from tests.support import servers
from tests.support.fakes import DRAFT_A, GREEDY, FakeEngine, prompts
from tests.support.servers import ask
from tuner.pipeline.pipeline import Options, Watch
from tuner.run import TuningSession, tune

PROCESSES = {"sqlite": 8, "postgresql": 16}
PROMPTS = prompts(40)
LOAD = prompts(5000, "load")
A2 = Setup(draft=DRAFT_A, length=2)
KEYS = {
    "models": "key",
    "environments": "digest",
    "target_traces": "target_key, sampling_digest, prompt_digest",
    "acceptance_traces": "target_key, sampling_digest, prompt_digest, draft_digest",
    "lookup_traces": "target_key, sampling_digest, prompt_digest, draft_digest, max_length",
    "step_times": "sweep, part_digest",
    "samples": "unit, position",
}


def write_together(location: Location, seed: int, seconds: float, barrier: Any, results: Any) -> None:
    """One process: a run, then units that everybody saves; puts how many it measured and reused, and what failed."""
    engine = FakeEngine(seed=seed, keep=0.9)
    said: dict[str, Any] = {"error": None, "runs": 0, "measured": 0, "reused": 0, "unlike": 0}
    barrier.wait()
    try:
        with EvidenceStore.open(location) as evidence_store:
            workload = Workload(context_length=256, max_new_tokens=64, temperature=(seed % 2) * 0.8)
            tune(engine, [(workload, PROMPTS)], TuningSession.of(evidence_store), Options(lengths=(1, 2)), Watch())
            said["runs"] = 1
            ends_at = time.monotonic() + seconds
            for number, prompt in enumerate(LOAD):
                if time.monotonic() > ends_at:
                    break
                remember = CachedEngine(engine, evidence_store)
                trace = remember.trace_target(GREEDY, prompt)
                remember.trace_draft(GREEDY, prompt, trace, DRAFT_A, 2)
                runs = remember.run_together(GREEDY, (prompt,), (PLAIN, A2), f"load {number}")
                scope = Scope(target=engine.target, environment=engine.environment, workload=GREEDY)
                said["unlike"] += evidence_store.find_samples(scope, (prompt,), (PLAIN, A2), f"load {number}") != runs
                said["measured"] += remember.measured_units
                said["reused"] += remember.reused_units
    except Exception as error:  # whatever it is, it counts
        said["error"] = f"{type(error).__name__}: {error}"
    results.put(said)


@contextmanager
def _location(kind: str) -> Iterator[Location]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DRAFTPICK_STORE"] = folder  # a server's policies go here
        if kind == "sqlite":
            yield Path(folder) / "evidence.db"
        else:
            with servers.schema() as url:
                yield url


def measure(kind: str, seconds: float) -> dict[str, Any]:
    """All processes of a kind at once, then what raw SQL says."""
    fork, count = multiprocessing.get_context("fork"), PROCESSES[kind]
    barrier, results = fork.Barrier(count), fork.Queue()
    with _location(kind) as location:
        workers = [
            fork.Process(target=write_together, args=(location, seed, seconds, barrier, results))
            for seed in range(count)
        ]
        for worker in workers:
            worker.start()
        said = [results.get(timeout=300.0) for _ in workers]
        for worker in workers:
            worker.join()
        found = _counts(location)
    errors = [one["error"] for one in said if one["error"] is not None]
    measured = sum(one["measured"] for one in said)
    return {
        "processes": count,
        "errors": len(errors) + sum(worker.exitcode != 0 for worker in workers),
        "first_error": errors[0] if errors else None,
        **found,
        "answers_unlike_the_store": sum(one["unlike"] for one in said),
        "runs": sum(one["runs"] for one in said),
        "units_asked": measured + sum(one["reused"] for one in said),
        "units_measured": measured,
        "measured_for_nothing": measured - found["load_units"],
    }


def _counts(location: Location) -> dict[str, int]:
    """Rows of which there should be one, units in part, and what all processes left."""
    twice = "SELECT count(*) FROM (SELECT 1 FROM {} GROUP BY {} HAVING count(*) > 1) AS twice"
    duplicates = sum(ask(location, twice.format(table, key))[0][0] for table, key in KEYS.items())
    partial = "SELECT count(*) FROM (SELECT 1 FROM {} HAVING count(*) <> {}) AS partial"
    torn = ask(location, partial.format("samples GROUP BY unit", "max(position) + 1"))[0][0]
    torn += ask(location, partial.format("step_times GROUP BY sweep", "3"))[0][0]
    with EvidenceStore.open(location) as evidence_store:
        studies = evidence_store.database.studies_location()
    duplicates += ask(studies, twice.format("studies", "study_name"))[0][0]
    digests = ", ".join(f"'{prompt.digest}'" for prompt in LOAD)
    loaded = [
        ask(location, f"SELECT count(*) FROM {table} WHERE prompt_digest IN ({digests})")[0][0]
        for table in ("target_traces", "acceptance_traces")
    ]
    loaded.append(ask(location, "SELECT count(DISTINCT unit) FROM samples WHERE occasion LIKE 'load %'")[0][0])
    return {
        "duplicates": duplicates,
        "torn": torn,
        "rows": sum(ask(location, f"SELECT count(*) FROM {table}")[0][0] for table in KEYS),
        "runs_finished": ask(location, "SELECT count(*) FROM runs WHERE finished_at IS NOT NULL")[0][0],
        "policies": ask(location, "SELECT count(*) FROM policies")[0][0],
        "load_units": sum(loaded),
    }


def main() -> None:
    """Both kinds, the table, JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of saving, after the run of each process")
    options = parser.parse_args()
    found: dict[str, dict[str, Any] | None] = {"sqlite": measure("sqlite", options.seconds), "postgresql": None}
    if os.environ.get(servers.VARIABLE):
        found["postgresql"] = measure("postgresql", options.seconds)
    else:
        print(f"postgresql: left out, {servers.VARIABLE} is not set; `.ci/postgres COMMAND` starts a server")
    ran = {kind: one for kind, one in found.items() if one is not None}
    table = Table("", *ran)
    for name in next(iter(ran.values())):
        table.add_row(name.replace("_", " "), *(str(one[name]) for one in ran.values()))
    Console().print(table)
    from tests.benchmarks.common import finish  # torch: not in the processes that were forked

    totals = {name: sum(one[name] for one in ran.values()) for name in ("errors", "duplicates")}
    finish({"benchmark": "writers", **totals, **found})


if __name__ == "__main__":
    main()
