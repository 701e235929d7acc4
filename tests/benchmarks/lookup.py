"""How long a look-up takes in a store with a million rows of evidence and ten thousand policies.

    python -m tests.benchmarks.lookup [--rows 1000000] [--policies 10000] [--asks 2000]

The store is made with its own tables: 100 targets, each tuned on 100 machines (20 families of cards with five
software versions each), every policy with 12 anchors; the rows of evidence are spread over targets and machines. In
process, `tuner.deploy.lookup.lookup` is asked random questions of every match level on an open store; the first of each
kind is not counted. As a process, `python tune.py lookup` is timed against `python -c "import sqlalchemy"`, turn
about, and the ratio of the medians is reported. Last line: p50_ms, p99_ms, process_ratio, imports_torch.
"""

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import sqlalchemy
from rich.console import Console
from rich.table import Table

from profiles.hardware.device import Machine, drop_unknown
from profiles.hardware.machine import this_machine
from profiles.records.core import PLAIN, Draft, Environment, Model, Setup, Workload, digest_of
from store import tables
from store.evidence_store import EvidenceStore
from tests import ROOT
from tests.benchmarks.common import finish
from tests.support import policies
from tuner.deploy.lookup import Query, lookup
from tuner.policy.policy import Policy, to_json
from tuner.policy.query import MIXED

NUM_TARGETS, NUM_FAMILIES, NUM_VERSIONS, NUM_PROMPTS = 100, 20, 5, 997
DOMAINS, BATCHES = (MIXED, "code", "prose", "copy"), (1, 4, 16)
NGRAM = Draft(kind="ngram", max_match=4, min_match=2)
DRAFT = Draft(kind="model", model=Model(name="draft", dtype="float32", digest="d" * 32, num_params=1))
MADE = "2026-11-22T08:00:00+00:00"
CHUNK = 20_000


def target(number: int) -> Model:
    return Model(name=f"org/target-{number}", dtype="bfloat16", digest=digest_of(number), num_params=7_000_000_000)


def machines() -> list[Environment]:
    """Twenty kinds of cards of four compute capabilities, each with five software versions; the last one is this."""
    cards = [
        Environment(
            device=f"NVIDIA X{100 + number} 80GB HBM3",
            device_count=1,
            memory_bytes=(24 + 8 * number) * 2**30,
            driver="580.65",
            cuda="13.0",
            threads=16,
            torch=f"2.{version}.0+cu130",
            engine="draftpick-torch",
            engine_version="0.3.0+transformers-5.23.0",
            compute_capability=f"{7 + number % 4}.0",
            memory_bandwidth_bytes_s=(900 + 150 * number) * 10**9,
        )
        for number in range(NUM_FAMILIES)
        for version in range(9, 9 + NUM_VERSIONS)
    ]
    here = Environment(**dict.fromkeys(("driver", "cuda")) | dict(this_machine()))  # type: ignore[arg-type]
    return [*cards[:-1], here]


def policy(model: Model, machine: Environment) -> Policy:
    """Twelve anchors, two setups."""
    choices = []
    for batch_size, domain in itertools.product(BATCHES, DOMAINS):
        setup = Setup(draft=DRAFT if domain == "code" else NGRAM, length=8 // batch_size or 1)
        choices.append(
            policies.choice(
                PLAIN if batch_size == BATCHES[-1] else setup,
                batch_size=batch_size,
                context_length=4096,
                domain=domain,
                evidence=tuple(digest_of([batch_size, domain, number]) for number in range(30)),
                alternatives=tuple(policies.forecast(Setup(draft=draft, length=2)) for draft in (NGRAM, DRAFT)),
            )
        )
    return Policy(created=MADE, target=model, environment=machine, choices=tuple(choices))


def insert_units(connection: sqlalchemy.Connection, count: int, everywhere: Sequence[Environment]) -> None:
    """Units of timed runs of one sample each, in chunks."""
    setup = Setup(draft=NGRAM, length=4)
    workload = Workload(context_length=4096, max_new_tokens=64)
    prompts = [{"digest": f"{number:032x}", "domain": "code", "num_tokens": 100} for number in range(NUM_PROMPTS)]
    connection.execute(sqlalchemy.insert(tables.setups), [tables.setup_row(setup)])
    connection.execute(sqlalchemy.insert(tables.workloads), [tables.workload_row(workload)])
    connection.execute(sqlalchemy.insert(tables.prompts), prompts)
    for start in range(0, count, CHUNK):
        numbers = range(start, min(count, start + CHUNK))
        units = [
            {
                "id": number + 1,
                "target_key": target(number % NUM_TARGETS).run_digest,
                "environment_digest": everywhere[number % len(everywhere)].digest,
                "measured_at": MADE,
                "workload_id": 1,
                "digest": f"{number:032x}",
                "purpose": "proof 0",
            }
            for number in numbers
        ]
        samples = [
            {
                "unit_id": number + 1,
                "position": 0,
                "setup_id": 1,
                "prompt_id": number % NUM_PROMPTS + 1,
                "ttft_s": 0.1,
                "decode_s": 1.0,
                "output_tokens": 64,
                "rounds": [[4, 2, 20], [4, 4, 5]],
                "shapes": [[5, 4, 1, 25]],
                "refills": 0,
                "output_digest": "c" * 32,
                "disturbed": False,
            }
            for number in numbers
        ]
        connection.execute(sqlalchemy.insert(tables.units), units)
        connection.execute(sqlalchemy.insert(tables.samples), samples)


def make(path: Path, num_rows: int, num_policies: int) -> list[Environment]:
    """Fills a store; goes past the store's one unit per transaction, which would take hours."""
    everywhere = machines()
    EvidenceStore.open(path).close()
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        models = [target(number) for number in range(NUM_TARGETS)]
        connection.execute(sqlalchemy.insert(tables.models), [tables.model_row(model) for model in models])
        rows = [tables.environment_row(machine) for machine in everywhere]
        connection.execute(sqlalchemy.insert(tables.environments), rows)
        pairs = [(model, machine) for model in models for machine in everywhere]
        for number in range(num_policies):
            model, machine = pairs[number % len(pairs)]
            text = to_json(policy(model, machine))
            row = {
                "id": number + 1,
                "target_key": model.run_digest,
                "environment_digest": machine.digest,
                "created_at": MADE,
                "generation": 1 + number // len(pairs),
                "policy": text,
            }
            connection.execute(sqlalchemy.insert(tables.policies), [row])
            connection.execute(sqlalchemy.insert(tables.choices), tables.choice_rows(number + 1, text))
        insert_units(connection, num_rows, everywhere)
    engine.dispose()
    return everywhere


def asked(everywhere: Sequence[Environment], rng: random.Random) -> tuple[Query, Machine]:
    """A question about any target from a machine that is known, upgraded, of a known family, or only like one."""
    there = rng.choice(everywhere[:-1])
    kind = rng.choice(("exact", "version", "family", "capability"))
    here = {
        "exact": there,
        "version": replace(there, torch="2.99.0"),
        "family": replace(there, device=there.device.replace("80GB HBM3", "PCIe")),
        "capability": replace(there, device="NVIDIA NEW1"),
    }[kind]
    query = Query(
        target=f"org/target-{rng.randrange(NUM_TARGETS)}",
        batch_size=rng.choice((1, 2, 4, 9, 16, 64)),
        context_length=rng.choice((None, 512, 4096)),
        domain=rng.choice((None, "code", "other")),
    )
    return query, drop_unknown(asdict(here))


def in_process(path: Path, everywhere: Sequence[Environment], num_asks: int) -> dict[str, list[float]]:
    """Milliseconds of every ask, by the level that was found."""
    rng = random.Random(0)
    found: dict[str, list[float]] = defaultdict(list)
    with EvidenceStore.open_read_only(path) as evidence_store:
        for number in range(num_asks + 50):
            query, here = asked(everywhere, rng)
            started = time.perf_counter()
            level = lookup(evidence_store, query, here).level
            if number >= 50:
                found[level].append(1e3 * (time.perf_counter() - started))
    return found


def as_process(folder: Path, turns: int) -> tuple[float, list[tuple[float, float]], bool]:
    """Ratio of medians, the seconds of every turn (look-up, import of sqlalchemy), and whether torch was loaded."""
    environment = {**os.environ, "DRAFTPICK_STORE": str(folder)}
    ours = [sys.executable, str(ROOT / "tune.py"), "lookup", "--target", "org/target-7"]
    theirs = [sys.executable, "-c", "import sqlalchemy"]

    def seconds(command: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
        return time.perf_counter() - started

    for command in (ours, theirs):
        seconds(command)  # fills the caches of the disk
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(turns)]
    ratio = statistics.median(our for our, _ in pairs) / statistics.median(their for _, their in pairs)
    code = (
        "import sys\nfrom tuner.cli import app\nsys.argv = ['tune.py', 'lookup', '--target', 'org/target-7']\n"
        "try:\n    app.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit(77 if 'torch' in sys.modules else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=environment, cwd=ROOT)
    assert ended.returncode in (0, 77), ended.stderr.decode()
    return ratio, pairs, ended.returncode == 77


def main() -> None:
    parser = argparse.ArgumentParser(description="Look-ups in a large store.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--policies", type=int, default=10_000)
    parser.add_argument("--asks", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evidence.db"
        everywhere = make(path, options.rows, options.policies)
        size_mib = path.stat().st_size / 2**20
        found = in_process(path, everywhere, options.asks)
        ratio, pairs, imports_torch = as_process(Path(folder), options.turns)
    table = Table("match", "asks", "p50 ms", "p99 ms")
    times = sorted(one for own in found.values() for one in own)

    def quantile(own: list[float], share: float) -> float:
        return sorted(own)[min(len(own) - 1, int(share * len(own)))]

    for level, own in [*sorted(found.items()), ("all", times)]:
        table.add_row(level, str(len(own)), f"{quantile(own, 0.5):.2f}", f"{quantile(own, 0.99):.2f}")
    console = Console()
    console.print(table)
    our_s, their_s = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
    console.print(f"process: {1e3 * our_s:.0f} ms; import sqlalchemy: {1e3 * their_s:.0f} ms; store {size_mib:.0f} MiB")
    finish(
        {
            "p50_ms": round(quantile(times, 0.5), 3),
            "p99_ms": round(quantile(times, 0.99), 3),
            "process_ratio": round(ratio, 3),
            "imports_torch": imports_torch,
            "asks": len(times),
            "rows": options.rows,
            "policies": options.policies,
        }
    )


if __name__ == "__main__":
    main()
