"""One recorded run of a drafter on a real vLLM against real runs at every k: `python -m tests.benchmarks.traced_heads`.

On vLLM's CPU build (`python -m tests.lanes.vllm_env`), float32, greedy, for a draft model, a poor EAGLE head made in
seconds (`tests/support/eagle_head.py`) and a look-up: the rounds that the trace tells are compared
prompt by prompt with those of real runs, and outputs with plain decoding. `cost_ratio`: seconds of the real runs at all
batch sizes over seconds of the trace and of the timed rounds at these batch sizes; starts are left out. With `--v2` on
Model Runner V2 through Triton's interpreter, where look-ups do not run and times mean nothing.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.engines.vllm.config import VllmOptions
from profiles.engines.vllm.engine import VllmEngine
from profiles.models import loader
from profiles.prompts import reader, tokenize
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from tests.benchmarks.common import finish
from tests.lanes.places import RUNNING, V2
from tests.support.eagle_head import write_eagle_head
from tuner.forecast.queues import spread_over_domains

CONTEXT = 384
HEAD_TEXTS = 60
QUIET = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def compare(
    engine: VllmEngine, draft: Draft, prompts: tuple[Prompt, ...], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], float]:
    """A row for every length and batch size of one draft; the seconds that its trace took."""
    longest = max(options.lengths)
    # longer by a round that passes the end: vLLM drafts its full length there
    longer = Workload(context_length=CONTEXT + longest, max_new_tokens=options.max_new_tokens + longest)
    traces = [engine.trace_target(longer, prompt) for prompt in prompts]
    engine.trace_draft(longer, prompts[0], traces[0], draft, longest)  # starts the engine, and is compared
    began = time.monotonic()
    acceptances = [
        engine.trace_draft(longer, prompt, trace, draft, longest) for prompt, trace in zip(prompts, traces, strict=True)
    ]
    trace_s = time.monotonic() - began
    rows = []
    for batch_size in options.batch_sizes:
        workload = Workload(batch_size=batch_size, context_length=CONTEXT, max_new_tokens=options.max_new_tokens)
        plain = engine._decode(workload, prompts, PLAIN)
        for length in options.lengths:
            walked = [
                expected_rounds(trace, acceptance, length, options.max_new_tokens, past_end=True).rounds
                for trace, acceptance in zip(traces, acceptances, strict=True)
            ]
            began = time.monotonic()
            runs = engine._decode(workload, prompts, Setup(draft=draft, length=length))
            real_s = time.monotonic() - began
            row = {
                "draft": draft.method or draft.name,
                "batch_size": batch_size,
                "k": length,
                "rounds": sum(sum(run.rounds.values()) for run in runs),
                "rounds_walked": round(sum(sum(rounds.values()) for rounds in walked)),
                "prompts_that_differ": sum(
                    dict(run.rounds) != rounds for run, rounds in zip(runs, walked, strict=True)
                ),
                "outputs_that_differ": sum(
                    list(run.token_ids) != list(other.token_ids) for run, other in zip(runs, plain, strict=True)
                ),
                "seconds": round(real_s, 3),
            }
            rows.append(row)
            print(" ".join(f"{value!s:>14}" for value in row.values()), flush=True)
    return rows, trace_s


def main() -> None:
    """A row per draft, batch size and length, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--kinds", nargs="+", default=["model", "native", "ngram"], help="kinds of drafts")
    parser.add_argument("--no-times", action="store_true", help="leave the timed rounds and cost_ratio out")
    parser.add_argument("--v2", action="store_true", help="Model Runner V2")
    options = parser.parse_args()
    os.environ.update({**QUIET, **(V2 if options.v2 else {})})
    target = loader.load("builtin:target", dtype="float32", device="cpu")
    longest = max(options.lengths)
    texts, _ = tokenize(reader.read_all(["builtin:all"]), target.tokenizer, CONTEXT - options.max_new_tokens)
    prompts = spread_over_domains(texts, options.prompts)
    held_out = [list(prompt.token_ids) for prompt in texts if prompt not in prompts]
    head = write_eagle_head(Path(tempfile.mkdtemp()), target, held_out[:: max(1, len(held_out) // HEAD_TEXTS)])
    kinds = [
        Draft(kind="model", model=loader.describe("builtin:draft-general", dtype="float32").record),
        Draft(kind="native", method="eagle", model=loader.describe_head(str(head), dtype="float32")),
        Draft(kind="ngram", max_match=4, min_match=2),
    ]
    drafts = [draft for draft in kinds if draft.kind in options.kinds and not (options.v2 and draft.kind == "ngram")]
    engine_options = VllmOptions(
        python=str(RUNNING.python), max_length=longest, max_batch_size=8, context_length=CONTEXT + longest
    )
    rows: list[dict[str, Any]] = []
    spent_s = 0.0
    with VllmEngine(target.record, drafts, engine_options) as engine:
        for draft in drafts:
            of_draft, trace_s = compare(engine, draft, prompts, options)
            rows += of_draft
            spent_s += trace_s
        if not (options.no_times or options.v2):
            workload = Workload(context_length=CONTEXT, max_new_tokens=options.max_new_tokens)
            began = time.monotonic()
            for batch_size in options.batch_sizes:
                engine.time_steps(replace(workload, batch_size=batch_size), CONTEXT // 2, longest)
            spent_s += time.monotonic() - began
    prefix = "v2_" if options.v2 else ""
    document = {
        f"{prefix}{name}": sum(row[name] for row in rows) for name in ("prompts_that_differ", "outputs_that_differ")
    }
    if not (options.no_times or options.v2):
        document["cost_ratio"] = round(sum(row["seconds"] for row in rows) / spent_s, 2)
    finish({"benchmark": "traced_heads", "prompts": len(prompts), **document, "rows": rows})


if __name__ == "__main__":
    main()
