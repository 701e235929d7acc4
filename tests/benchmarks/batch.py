"""Throughput of plain decoding and of the best setup at growing batches, forecast and measured, and where plain wins.

    python -m tests.benchmarks.batch

At every batch the setups are forecast from traces, step times and the calibration; of every draft the best forecast
and the longest are then really run, back to back with plain decoding, over queues that keep the batch full. The error
is forecast speed-up over measured, minus one, at lengths that the calibration did not run. Rates are of the batch.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from profiles import builtin
from profiles.engines import workloads
from profiles.engines.bench import Bench, Question
from profiles.engines.torch import load
from profiles.records import draft_spec
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.stats import median
from tests.benchmarks.common import finish
from tuner.forecast.evidence import calibration_lengths, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import queues, spread_over_domains
from tuner.search.objective import candidates
from tuner.search.pairs import Pair, run_pairs
from tuner.search.proof import Design, measure

LENGTHS = (1, 2, 3, 4, 6, 8)
DRAFTS = ("ngram", "builtin:draft-general", "builtin:draft-prose", "ngram+builtin:draft-general")
MAX_QUEUES, BATCHES_PER_QUEUE = 8, 4
MIN_QUEUES = 2


def graded(forecaster: Forecaster, setups: Sequence[Setup], prompts: Sequence[Prompt]) -> list[Setup]:
    """Of every draft the best forecast and the longest, at lengths that were not used to calibrate."""
    used = calibration_lengths(LENGTHS)
    fresh = [setup for setup in setups if setup != PLAIN and setup.length not in used]
    best: dict[object, Setup] = {}
    for setup in sorted(fresh, key=lambda one: -forecaster.forecast(one, prompts).speedup.estimate):
        best.setdefault(setup.draft, setup)
    longest = [setup for setup in fresh if setup.length == max(LENGTHS)]
    return list(dict.fromkeys([*best.values(), *longest]))


def measure_point(bench: Bench, workload: Workload, prompts: Sequence[Prompt], seconds: float) -> list[dict[str, Any]]:
    """One batch size: every graded setup against plain decoding, the fastest first."""
    evidence = gather(bench.engine, workload, prompts, LENGTHS)
    forecaster = Forecaster(evidence, workload, bench.engine.target.run_digest)
    chosen = graded(forecaster, candidates(evidence.drafts, LENGTHS), prompts)
    pairs: dict[Setup, list[Pair]] = {setup: [] for setup in chosen}
    until, size = time.monotonic() + seconds, 1
    planned = queues(
        prompts,
        workload.batch_size,
        max_alone=len(prompts),
        num_queues=MAX_QUEUES,
        batches_per_queue=BATCHES_PER_QUEUE,
    )
    for number, queue in enumerate(planned):
        if number >= MIN_QUEUES and time.monotonic() > until:
            break
        size = len(queue)
        for setup in chosen:
            pairs[setup] += run_pairs(bench.engine, workload, queue, setup, f"bench {number}")
    by_digest = {prompt.digest: prompt for prompt in prompts}
    rows = []
    for setup in chosen:
        ran = dict.fromkeys(plain.prompt_digest for plain, _ in pairs[setup])
        forecast = forecaster.forecast(setup, [by_digest[digest] for digest in ran])
        measured, _ = measure(Design(setup=setup, greedy=True, queue_size=size), pairs[setup])
        rows.append(
            {
                "batch_size": workload.batch_size,
                "setup": setup.name,
                "forecast": round(forecast.speedup.estimate, 4),
                "speedup": round(measured.speedup.estimate, 4),
                "interval": [round(measured.speedup.low, 4), round(measured.speedup.high, 4)],
                "plain_tok_per_s": round(workload.batch_size * measured.plain_tok_per_s.estimate, 1),
                "tok_per_s": round(workload.batch_size * measured.tok_per_s.estimate, 1),
                "error": round(forecast.speedup.estimate / measured.speedup.estimate - 1.0, 4),
                "runs": len(pairs[setup]),
                "partings": measured.num_divergences,
            }
        )
    return sorted(rows, key=lambda row: -row["speedup"])


def crossover(rows_by_batch: Mapping[int, list[dict[str, Any]]]) -> int | None:
    """The smallest batch from which on no setup's interval is above 1; None: one is at the largest."""
    found = None
    for size in sorted(rows_by_batch, reverse=True):
        if any(row["interval"][0] > 1.0 for row in rows_by_batch[size]):
            break
        found = size
    return found


def main() -> None:
    """A row per batch and setup, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100.0, help="of real queues at each batch size")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-sizes", help="default: 1,4,16, and 64 on a GPU")
    parser.add_argument("--device")
    options = parser.parse_args()
    bench = load.load(builtin.TARGET, [draft_spec.parse_draft(text) for text in DRAFTS], None, options.device)
    on_gpu = bench.engine.environment.cuda is not None
    sizes = [int(size) for size in (options.batch_sizes or ("1,4,16,64" if on_gpu else "1,4,16")).split(",")]
    question = Question(lengths=LENGTHS, batch_sizes=tuple(sizes), max_new_tokens=options.max_new_tokens)
    loads, _ = workloads.workloads(bench, question, [builtin.ALL_PROMPTS])
    rows_by_batch: dict[int, list[dict[str, Any]]] = {}
    print(f"batch  {'setup':44} forecast measured {'95 %':>13}    plain    tok/s   error")
    for workload, prompts in loads:
        chosen = spread_over_domains(prompts, options.prompts)
        rows = rows_by_batch[workload.batch_size] = measure_point(bench, workload, chosen, options.seconds)
        for row in rows:
            low, high = row["interval"]
            print(
                f"{row['batch_size']:5}  {row['setup']:44} {row['forecast']:8.3f} {row['speedup']:8.3f} "
                f"{low:6.3f}-{high:6.3f} {row['plain_tok_per_s']:8.1f} {row['tok_per_s']:8.1f} {row['error']:+7.3f}",
                flush=True,
            )
    errors = [abs(row["error"]) for rows in rows_by_batch.values() for row in rows]
    finish(
        {
            "benchmark": "batch",
            "device": bench.engine.environment.device,
            "anchors": [row for rows in rows_by_batch.values() for row in rows],
            "median_abs_error": round(median(errors), 4),
            "max_abs_error": round(max(errors), 4),
            "crossover_batch": crossover(rows_by_batch),
        }
    )


if __name__ == "__main__":
    main()
