"""The family's pair on several engines, forecast and measured: `python -m tests.benchmarks.engines [ENGINE ...]`.

On torch, llama.cpp and vLLM, at batch 1 and 8: evidence is gathered as `tune.py run` gathers it, every length of
the draft is forecast, and then every length is really run beside plain decoding, queue by queue. `choice` is what the
measured figures would choose: the fastest whose interval is above 1 and whose gain is not a tie, else plain decoding.
Lengths that the overhead was calibrated with are shown and not graded. vLLM runs in the lane's Python
(`python -m tests.lanes.vllm_env`), or in the one that $DRAFTPICK_VLLM_PYTHON names; without it, it is left out.
llama.cpp has one thread.
"""

import argparse
import os
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
from tests.benchmarks.common import finish
from tests.lanes.places import RUNNING
from tuner.forecast.evidence import calibration_lengths, gather
from tuner.forecast.forecaster import QUEUE_BATCHES, Forecaster
from tuner.forecast.queues import queues, spread_over_domains
from tuner.search.objective import MIN_SPEEDUP
from tuner.search.pairs import Pair, run_pairs
from tuner.search.proof import Design, measure

ENGINES = ("torch", "llamacpp", "vllm")
LENGTHS = (1, 2, 3, 4, 5, 6)
BATCH_SIZES = (1, 8)
NUM_QUEUES = 3  # in a batch, each as long as the forecasts' queues
TARGET, DRAFT = builtin.TARGET, "builtin:draft-general"


def bench_of(engine: str, drafts: tuple[str, ...] = (DRAFT,), max_requests: int = max(BATCH_SIZES)) -> Bench:
    """The pair on an engine. Raises DraftpickError: it is not installed."""
    specs = [draft_spec.parse_draft(text) for text in drafts]
    if engine == "torch":
        return load.load(TARGET, specs, "float32", "cpu")
    python = os.environ.get("DRAFTPICK_VLLM_PYTHON") or (str(RUNNING.python) if RUNNING.is_whole else None)
    spec = factory.EngineSpec(
        engine=engine,
        command=python if engine == "vllm" else None,
        threads=1 if engine == "llamacpp" else None,  # whose threads spin: the client that loads it needs a core too
        max_requests=max_requests,
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


def measure_load(bench: Bench, workload: Workload, prompts: tuple[Prompt, ...]) -> list[dict[str, Any]]:
    """A row for every length at one batch size."""
    engine = bench.engine
    evidence = gather(engine, workload, prompts, LENGTHS)
    forecaster = Forecaster(evidence, workload, engine.target.run_digest)
    setups = [Setup(draft=draft, length=length) for draft in evidence.drafts for length in LENGTHS]
    pairs: dict[Setup, list[Pair]] = {setup: [] for setup in setups}
    several = queues(
        prompts,
        workload.batch_size,
        max_alone=len(prompts),
        num_queues=NUM_QUEUES,
        batches_per_queue=QUEUE_BATCHES,
    )
    for number, queue in enumerate(several):
        for setup in setups:
            pairs[setup] += run_pairs(engine, workload, queue, setup, f"bench {number}")
    rows = []
    for setup in setups:
        forecast = forecaster.forecast(setup, prompts)
        design = Design(setup=setup, greedy=True, queue_size=len(several[0]))
        measured, _ = measure(design, pairs[setup])
        rows.append(
            {
                "batch_size": workload.batch_size,
                "setup": setup.name,
                "forecast": round(forecast.speedup.estimate, 4),
                "speedup": round(measured.speedup.estimate, 4),
                "interval": [round(measured.speedup.low, 4), round(measured.speedup.high, 4)],
                "plain_tok_per_s": round(workload.batch_size * measured.plain_tok_per_s.estimate, 1),
                "error": round(forecast.speedup.estimate / measured.speedup.estimate - 1.0, 4),
                "graded": setup.length not in calibration_lengths(LENGTHS),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
