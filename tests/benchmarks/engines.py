"""The family's pair on several engines, forecast and measured: `python -m tests.benchmarks.engines [ENGINE ...]`.

On torch, llama.cpp and vLLM, at batch 1 and 8: evidence is gathered as `tune.py run` gathers it, every length of
the draft is forecast, and then every length is really run beside plain decoding, queue by queue. `choice` is what the
measured figures would choose: the fastest whose interval is above 1 and whose gain is not a tie, else plain decoding.
Lengths that the overhead was calibrated with are shown and not graded. vLLM runs in the lane's Python
(`python -m tests.lanes.vllm_env`), or in the one that $DRAFTPICK_VLLM_PYTHON names; without it, it is left out.
llama.cpp has one thread.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy

from profiles import builtin
from profiles.engines import factory, workloads
from profiles.engines.bench import Bench, Question
from profiles.engines.torch import load
from profiles.records import draft_spec
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.errors import DraftpickError
from tests.benchmarks.common import arguments, finish
from tests.lanes.places import RUNNING
from tuner.forecast.evidence import calibration_lengths, gather
from tuner.forecast.forecaster import QUEUE_BATCHES, Forecaster
from tuner.forecast.queues import queues, spread_over_domains
from tuner.search.objective import MIN_SPEEDUP, candidates
from tuner.search.pairs import Pair, run_pairs
from tuner.search.proof import Design, measure

ENGINES = ("torch", "llamacpp", "vllm")
LENGTHS = (1, 2, 3, 4, 5, 6)
BATCH_SIZES = (1, 8)
MIN_QUEUES = 2  # that are run where seconds are bounded
NUM_QUEUES = 3  # in a batch, each as long as the forecasts' queues
TARGET, DRAFT = builtin.TARGET, "builtin:draft-general"


def bench_of(engine: str) -> Bench:
    """The pair on an engine. Raises DraftpickError: it is not installed."""
    specs = [draft_spec.parse_draft(DRAFT)]
    if engine == "torch":
        return load.load(TARGET, specs, "float32", "cpu")
    python = os.environ.get("DRAFTPICK_VLLM_PYTHON") or (str(RUNNING.python) if RUNNING.is_whole else None)
    spec = factory.EngineSpec(
        engine=engine,
        command=python if engine == "vllm" else None,
        threads=1 if engine == "llamacpp" else None,  # whose threads spin: the client that loads it needs a core too
        max_requests=max(BATCH_SIZES),
        max_length=max(LENGTHS),
        device="cpu",
    )
    return factory.open_bench(spec, factory.ModelSpec(target=TARGET, drafts=tuple(specs), dtype="float32"))


def loads_of(bench: Bench, num_prompts: int, max_new_tokens: int) -> list[tuple[Workload, tuple[Prompt, ...]]]:
    """The workloads of both batch sizes, with the first prompts of every domain; end tokens are ignored."""
    question = Question(lengths=LENGTHS, batch_sizes=BATCH_SIZES, max_new_tokens=max_new_tokens)
    loads, _ = workloads.workloads(bench, question, [builtin.ALL_PROMPTS])
    return [
        (replace(workload, end_token_ids=()), spread_over_domains(prompts, num_prompts)) for workload, prompts in loads
    ]


def every_length(_: Forecaster, setups: Sequence[Setup], __: Sequence[Prompt]) -> list[Setup]:
    return [setup for setup in setups if setup.draft is not None]


def measure_load(
    bench: Bench,
    workload: Workload,
    prompts: Sequence[Prompt],
    *,
    lengths: tuple[int, ...] = LENGTHS,
    select: Callable[[Forecaster, Sequence[Setup], Sequence[Prompt]], list[Setup]] = every_length,
    num_queues: int = NUM_QUEUES,
    batches_per_queue: int = QUEUE_BATCHES,
    seconds: float = math.inf,
) -> list[dict[str, Any]]:
    """A row for each of the selected setups: its forecast, and runs beside plain decoding, queue by queue."""
    evidence = gather(bench.engine, workload, prompts, lengths)
    forecaster = Forecaster(evidence, workload, bench.engine.target.run_digest)
    planned = queues(
        prompts,
        workload.batch_size,
        max_alone=len(prompts),
        num_queues=num_queues,
        batches_per_queue=batches_per_queue,
    )
    setups = select(forecaster, candidates(evidence.drafts, lengths), prompts)
    pairs: dict[Setup, list[Pair]] = {setup: [] for setup in setups}
    until = time.monotonic() + seconds
    for number, queue in enumerate(planned):
        if number >= MIN_QUEUES and time.monotonic() > until:
            break
        for setup in setups:
            pairs[setup] += run_pairs(bench.engine, workload, queue, setup, f"bench {number}")
    rows = []
    for setup, ran in pairs.items():
        digests = {plain.prompt_digest for plain, _ in ran}
        forecast = forecaster.forecast(setup, [prompt for prompt in prompts if prompt.digest in digests])
        measured, _ = measure(Design(setup=setup, greedy=True, queue_size=len(planned[0])), ran)
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
                "graded": setup.length not in calibration_lengths(lengths),
                "runs": len(ran),
                "partings": measured.num_divergences,
                "disturbed": measured.num_disturbed,
            }
        )
    return rows


def choice_of(rows: list[dict[str, Any]]) -> str:
    """The fastest that is clearly faster than plain decoding, else plain decoding."""
    clear = [row for row in rows if row["interval"][0] > 1.0 and row["speedup"] >= MIN_SPEEDUP]
    return max(clear, key=lambda row: row["speedup"])["setup"] if clear else PLAIN.name


def run_engine(name: str, num_prompts: int, max_new_tokens: int) -> dict[str, Any]:
    """Both batch sizes on one engine."""
    bench = bench_of(name)
    try:
        loads = loads_of(bench, num_prompts, max_new_tokens)
        version = bench.engine.environment.engine_version
        rows = [row for workload, prompts in loads for row in measure_load(bench, workload, prompts)]
    finally:
        bench.close()
    for row in rows:
        low, high = row["interval"]
        print(
            f"{name:9} {row['batch_size']:3} {row['setup']:28} {row['forecast']:8.3f} {row['speedup']:8.3f} "
            f"[{low:.3f}, {high:.3f}] {row['error']:+7.1%}  {'yes' if row['graded'] else 'no'}",
            flush=True,
        )
    errors = [abs(row["error"]) for row in rows if row["graded"]]
    return {
        "version": version,
        "median_abs_error": round(float(numpy.median(errors)), 4),
        "max_abs_error": round(max(errors), 4),
        "rows": rows,
        "choices": {size: choice_of([row for row in rows if row["batch_size"] == size]) for size in BATCH_SIZES},
    }


def main() -> None:
    """A row per engine, batch and length, then the choices side by side, then JSON."""
    parser = arguments(__doc__)
    parser.add_argument("engines", nargs="*", default=list(ENGINES), metavar="ENGINE", help=", ".join(ENGINES))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    print(f"{'engine':9} {'B':>3} {'setup':28} {'forecast':>8} {'measured':>8} {'interval':16} {'error':>7}  graded")
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in options.engines:
        try:
            found[name] = run_engine(name, options.prompts, options.max_new_tokens)
        except DraftpickError as error:
            left_out[name] = str(error)
            print(f"{name}: left out: {error}", flush=True)
    for name, one in found.items():
        print(f"{name}: " + "; ".join(f"batch {size}: {choice}" for size, choice in one["choices"].items()))
    choices = {name: one["choices"] for name, one in found.items()}
    differ = len({tuple(own.values()) for own in choices.values()}) > 1
    finish(
        {"benchmark": "engines", "engines": found, "choices": choices, "choices_differ": differ, "left_out": left_out}
    )


if __name__ == "__main__":
    main()
