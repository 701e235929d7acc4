"""Throughput of plain decoding and of the best setup at growing batches, forecast and measured, and where plain wins.

    python -m tests.benchmarks.batch

At every batch the setups are forecast from traces, step times and the calibration; of every draft the best forecast
and the longest are then really run, back to back with plain decoding, over queues that keep the batch full. The error
is forecast speed-up over measured, minus one, at lengths that the calibration did not run. Rates are of the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from profiles.hardware.fingerprint import pick_device
from profiles.records.core import PLAIN, Prompt, Setup
from profiles.stats import median
from tests.benchmarks.common import arguments, finish, load_family
from tests.benchmarks.engines import measure_load
from tuner.forecast.evidence import calibration_lengths
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import spread_over_domains

LENGTHS = (1, 2, 3, 4, 6, 8)
DRAFTS = ("ngram", "builtin:draft-general", "builtin:draft-prose", "ngram+builtin:draft-general")
QUEUES = {"num_queues": 8, "batches_per_queue": 4}


def graded(forecaster: Forecaster, setups: Sequence[Setup], prompts: Sequence[Prompt]) -> list[Setup]:
    """Of every draft the best forecast and the longest, at lengths that were not used to calibrate."""
    used = calibration_lengths(LENGTHS)
    fresh = [setup for setup in setups if setup != PLAIN and setup.length not in used]
    best: dict[object, Setup] = {}
    for setup in sorted(fresh, key=lambda one: -forecaster.forecast(one, prompts).speedup.estimate):
        best.setdefault(setup.draft, setup)
    longest = [setup for setup in fresh if setup.length == max(LENGTHS)]
    return list(dict.fromkeys([*best.values(), *longest]))


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
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=100.0, help="of real queues at each batch size")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-sizes", help="default: 1,4,16, and 64 on a GPU")
    parser.add_argument("--device")
    options = parser.parse_args()
    sizes = options.batch_sizes or ("1,4,16,64" if pick_device(options.device).startswith("cuda") else "1,4,16")
    question = {"batch_sizes": tuple(map(int, sizes.split(","))), "max_new_tokens": options.max_new_tokens}
    bench, loads = load_family(DRAFTS, device=options.device, lengths=LENGTHS, **question)
    rows_by_batch: dict[int, list[dict[str, Any]]] = {}
    print(f"batch  {'setup':44} forecast measured {'95 %':>13}    plain    tok/s   error")
    for workload, prompts in loads:
        chosen = spread_over_domains(prompts, options.prompts)
        rows = measure_load(bench, workload, chosen, lengths=LENGTHS, select=graded, seconds=options.seconds, **QUEUES)
        rows.sort(key=lambda row: -row["speedup"])
        rows_by_batch[workload.batch_size] = rows
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
