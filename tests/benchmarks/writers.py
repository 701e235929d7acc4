"""Many processes write one store at once, on a slow disk: does one fail, is a unit there twice, or in part?

    .ci/postgres python -m tests.benchmarks.writers [--fsync-delay 0.3] [--seconds 8]

Eight processes share a SQLite file, sixteen a PostgreSQL database (left out with a reason where no server is given).
Each opens the store while it is still being made, does a whole tuning run, then saves units that all the others save
too, every process with timings and traces of its own, for some seconds. What is there is then counted with raw SQL.
Every fsync takes `--fsync-delay` seconds longer, as on a busy disk or a network volume: a library is compiled for that
and loaded before the C library; without a C compiler this is left out, and said. `worst_wait_s`: the longest time that
a process waited for one unit. `measured_for_nothing`: units that another process had saved while this one measured
them; the first one answers.
"""

import argparse
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
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
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.run import TuningSession, tune

DELAY = "DRAFTPICK_FSYNC_DELAY"
SLOW_FSYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>

static int slow(const char *name, int descriptor) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *delay = getenv("DRAFTPICK_FSYNC_DELAY");
    usleep((useconds_t)(1e6 * (delay ? atof(delay) : 0.0)));
    return real(descriptor);
}

int fsync(int descriptor) { return slow("fsync", descriptor); }
int fdatasync(int descriptor) { return slow("fdatasync", descriptor); }
"""
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
    "prompts": "digest",
    "setups": "digest",
    "workloads": "digest",
    "sweeps": "digest",
    "step_times": "sweep_id, component_digest, width",
    "units": "digest",
    "samples": "unit_id, position",
}


def write_together(location: Location, seed: int, seconds: float, barrier: Any, results: Any) -> None:
    """One process: a run, then units that everybody saves; puts how many it measured and reused, and what failed."""
    engine = FakeEngine(seed=seed, keep=0.9)
    said: dict[str, Any] = {"error": None, "runs": 0, "measured": 0, "reused": 0, "unlike": 0, "worst_wait_s": 0.0}
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
                times = [time.monotonic()]
                trace = remember.trace_target(GREEDY, prompt)
                times.append(time.monotonic())
                remember.trace_draft(GREEDY, prompt, trace, DRAFT_A, 2)
                times.append(time.monotonic())
                runs = remember.run_together(GREEDY, (prompt,), (PLAIN, A2), f"load {number}")
                times.append(time.monotonic())
                said["worst_wait_s"] = max(said["worst_wait_s"], *(b - a for a, b in itertools.pairwise(times)))
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
        said = [results.get(timeout=600.0) for _ in workers]
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
        "worst_wait_s": round(max(one["worst_wait_s"] for one in said), 2),
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
    torn = ask(location, partial.format("samples GROUP BY unit_id", "max(position) + 1"))[0][0]
    components = "(SELECT DISTINCT sweep_id, component_digest FROM step_times) AS components"
    torn += ask(location, partial.format(f"{components} GROUP BY sweep_id", "3"))[0][0]
    with EvidenceStore.open(location) as evidence_store:
        studies = evidence_store.database.studies_location()
    duplicates += ask(studies, twice.format("studies", "study_name"))[0][0]
    digests = ", ".join(f"'{prompt.digest}'" for prompt in LOAD)
    loaded = [
        ask(location, f"SELECT count(*) FROM {table} WHERE prompt_digest IN ({digests})")[0][0]
        for table in ("target_traces", "acceptance_traces")
    ]
    loaded.append(ask(location, "SELECT count(*) FROM units WHERE purpose LIKE 'load %'")[0][0])
    return {
        "duplicates": duplicates,
        "torn": torn,
        "rows": sum(ask(location, f"SELECT count(*) FROM {table}")[0][0] for table in KEYS),
        "runs_finished": ask(location, "SELECT count(*) FROM runs WHERE finished_at IS NOT NULL")[0][0],
        "policies": ask(location, "SELECT count(*) FROM policies")[0][0],
        "load_units": sum(loaded),
    }


def slow_down(delay_s: float) -> None:
    """Starts this script again with a library that delays every fsync, unless that was done or cannot be."""
    if delay_s <= 0.0 or DELAY in os.environ:
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        print("fsync is not delayed: there is no C compiler (cc) on the PATH")
        return
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "slow.c", folder / "slow.so"
    source.write_text(SLOW_FSYNC)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), DELAY: str(delay_s)}
    command = [sys.executable, "-m", "tests.benchmarks.writers", *sys.argv[1:]]
    ended = subprocess.run(command, check=False, env=environment)
    shutil.rmtree(folder)
    sys.exit(ended.returncode)


def main() -> None:
    """Both kinds, the table, JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of saving, after the run of each process")
    parser.add_argument("--fsync-delay", type=float, default=0.3, help="seconds that each fsync takes longer")
    options = parser.parse_args()
    slow_down(options.fsync_delay)
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
    totals["worst_wait_s"] = max(one["worst_wait_s"] for one in ran.values())
    totals["fsync_delay_s"] = float(os.environ.get(DELAY, "0"))
    finish({"benchmark": "writers", **totals, **found})


if __name__ == "__main__":
    main()
