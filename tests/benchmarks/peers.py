"""Decoding speed beside the peers: `python -m tests.benchmarks.peers [--prompts 8] [--max-new-tokens 64]`.

Four comparisons in every cell, a cell being a domain of the prompts that ship, greedy or at temperature 0.8: plain
decoding, a draft model at k = 4 and prompt look-up at k = 4, each against the same in transformers' `generate`, and
our best setup against flashspec as it is by default (its `auto` strategy: look-up of 6, else 2 tokens of the model).
Our best setup is found for each cell by a short race on prompts that are not timed afterwards.

All arms run in one process on the same models in memory, with the same prompts, end tokens and `max_new_tokens`,
prompt by prompt; the order rotates from prompt to prompt, and every second time it runs backwards. Every arm has two
turns at a prompt, of which the faster counts, as what other programs do to a run can only make it longer; on a machine
so busy that `--seconds` do not suffice it has one. Disturbed runs are repeated besides, for every arm by the engine's
rule. A rate is tokens per second of the whole request, prefill included: the peers give no other. A ratio is our rate
over the peer's, both of totals over the prompts of a cell; each `..._ratio` is the smallest over the cells.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
from flashspec.engine.hf_drafter import HuggingFaceDrafter
from flashspec.engine.verifier import TargetModel

from profiles.builtin import TARGET
from profiles.engines import workloads
from profiles.engines.bench import Bench, Question
from profiles.engines.torch import load
from profiles.models.loader import LoadedModel
from profiles.records.core import PLAIN, Interval, Prompt, Setup, Workload, digest_of
from profiles.records.draft_spec import parse_draft
from profiles.stats import speedup_interval
from profiles.timing.clock import Clock, quietest
from tests.benchmarks.common import arguments, finish
from tests.benchmarks.roofline import roofline_fraction

# ---- the setups that race to be "our best" beside plain decoding: (spelling of a draft, its lengths); add others here
RACED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("ngram", (4, 6, 8)),
    ("builtin:draft-general", (2, 4)),
    ("ngram+builtin:draft-general", (3, 6)),
)
# ----
DRAFT = "builtin:draft-general"
LOOKUP = "ngram:max=4,min=1"  # transformers tries every length from the largest down to 1
MAX_MATCH = 4
LENGTH = 4
DOMAINS = ("prose", "code", "copy")
TEMPERATURES = (0.0, 0.8)
TURNS = 2
RACE_PROMPTS = 3
RACE_SHARE = 0.25  # of a cell's seconds
# the ratio's name -> (our arm, the peer's)
PAIRS = {
    "plain": ("plain", "transformers plain"),
    "assisted": ("assisted", "transformers assisted"),
    "lookup": ("lookup", "transformers lookup"),
    "flashspec": ("best", "flashspec"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One request by one arm; `digest` of its tokens."""

    seconds: float
    num_tokens: int
    digest: str


Arm = Callable[[Prompt], Run]
Cell = dict[str, Any]
Turns = dict[str, list[list[Run]]]  # arm -> prompt by prompt, the runs of its turns


def ours(bench: Bench, workload: Workload, prompt: Prompt, setup: Setup) -> Run:
    """One run of our engine: the only place that calls its timed runs."""
    (sample,) = bench.engine.run_together(workload, (prompt,), (setup,), "bench")
    return Run(seconds=sample.ttft_s + sample.decode_s, num_tokens=sample.output_tokens, digest=sample.output_digest)


def our_arm(bench: Bench, workload: Workload, setup: Setup) -> Arm:
    """Our engine with one setup."""
    return lambda prompt: ours(bench, workload, prompt, setup)


def timed(device: str, seed: int, decode: Callable[[], Sequence[int]]) -> Run:
    """One run of a peer, repeated while disturbed by the rule of our arms."""
    clock = Clock(device)

    def run() -> Run:
        torch.manual_seed(seed)
        started = clock.read()
        emitted = decode()
        seconds = clock.read() - started
        return Run(seconds=seconds, num_tokens=len(emitted), digest=digest_of(tuple(emitted)))

    return quietest(run)[0]


def with_transformers(bench: Bench, workload: Workload, device: str) -> dict[str, Arm]:
    """The three arms of `generate`, on our target and draft."""
    target, draft = bench.loaded[0].model, _loaded(bench, DRAFT).model
    ends = list(workload.end_token_ids)
    law = {"temperature": workload.temperature, "top_k": 0, "top_p": 1.0} if workload.temperature > 0.0 else {}
    options = {
        "max_new_tokens": workload.max_new_tokens,
        "do_sample": workload.temperature > 0.0,
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else 0,
        **law,
    }
    draft.generation_config.num_assistant_tokens = LENGTH
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    lookup = {"prompt_lookup_num_tokens": LENGTH, "max_matching_ngram_size": MAX_MATCH}

    def arm(more: dict[str, Any], assistant: transformers.PreTrainedModel | None = None) -> Arm:
        def run(prompt: Prompt) -> Run:
            tokens = torch.tensor([prompt.token_ids], device=device)
            inputs = {"attention_mask": torch.ones_like(tokens), "assistant_model": assistant}

            def decode() -> list[int]:
                config = transformers.GenerationConfig(**options, **more)
                emitted: list[int] = target.generate(tokens, generation_config=config, **inputs)[0].tolist()
                return emitted[len(prompt.token_ids) :]

            return timed(device, workload.seed, decode)

        return run

    return {"transformers plain": arm({}), "transformers assisted": arm({}, draft), "transformers lookup": arm(lookup)}


def with_flashspec(bench: Bench, workload: Workload, device: str) -> Arm:
    """flashspec as its defaults are, given one model drafter; only what the workload asks for is set."""
    dtype = getattr(torch, bench.loaded[0].record.dtype)
    config = FlashSpecConfig(
        drafter_name=DRAFT,
        target_name=TARGET,
        device=device,
        dtype=bench.loaded[0].record.dtype,
        max_new_tokens=workload.max_new_tokens,
        eos_token_ids=workload.end_token_ids,
        sampling=SamplingConfig(temperature=workload.temperature, seed=workload.seed),
    )
    place, model = torch.device(device), _loaded(bench, DRAFT).model
    drafter = HuggingFaceDrafter(DRAFT, place, dtype, temperature=workload.temperature, model=model)
    engine = SpeculativeEngine(config, [drafter], TargetModel(TARGET, place, dtype, model=bench.loaded[0].model))

    def run(prompt: Prompt) -> Run:
        tokens = torch.tensor([prompt.token_ids], device=device)

        def decode() -> list[int]:
            found = engine.generate(tokens)
            emitted: list[int] = found.output_ids[0].tolist()
            return emitted[: found.n_tokens_generated]  # behind an end token the row is filled up with -1

        return timed(device, workload.seed, decode)

    return run


def raced(bench: Bench, workload: Workload, prompts: Sequence[Prompt], seconds: float) -> Setup:
    """The fastest of the raced setups and plain decoding on prompts that are not timed afterwards."""
    setups = [PLAIN, *(_setup(bench, spelling, length) for spelling, lengths in RACED for length in lengths)]
    by_name = {setup.name: setup for setup in setups}
    runs = interleaved({name: our_arm(bench, workload, setup) for name, setup in by_name.items()}, prompts, seconds)
    return by_name[max(by_name, key=lambda name: _rate(runs[name]))]


def interleaved(arms: dict[str, Arm], prompts: Sequence[Prompt], seconds: float) -> Turns:
    """Every arm once on every prompt, each prompt begun by another arm; all of it again where `seconds` allow."""
    runs: Turns = {name: [[] for _ in prompts] for name in arms}
    names, begun = list(arms), time.monotonic()
    for turn in range(TURNS):
        if turn > 0 and (time.monotonic() - begun) * (turn + 1) / turn > seconds:
            break
        for number, prompt in enumerate(prompts):
            start = (number + turn) % len(names)
            rotated = names[start:] + names[:start]
            for name in reversed(rotated) if (number + turn) % 2 else rotated:
                runs[name][number].append(arms[name](prompt))
    return runs


def ratio(runs: Turns, our_name: str, peer: str) -> Interval:
    """Our tokens per second over the peer's; each arm's own tokens are counted."""
    columns = [
        [getattr(run, column) for run in _fastest(runs[name])]
        for name in (peer, our_name)
        for column in ("seconds", "num_tokens")
    ]
    return speedup_interval(*columns)[0]


def measure_cell(bench: Bench, workload: Workload, prompts: Sequence[Prompt], seconds: float) -> tuple[Cell, Turns]:
    """Race, warm-up and timed runs of one cell; the race takes the last prompts."""
    timed_prompts, spare = prompts[:-RACE_PROMPTS], prompts[-RACE_PROMPTS:]
    device = str(bench.loaded[0].model.device)
    until = time.monotonic() + seconds
    best = raced(bench, workload, spare, RACE_SHARE * seconds)
    chosen = {
        "plain": PLAIN,
        "assisted": _setup(bench, DRAFT, LENGTH),
        "lookup": _setup(bench, LOOKUP, LENGTH),
        "best": best,
    }
    every = {name: our_arm(bench, workload, setup) for name, setup in chosen.items()}
    every |= with_transformers(bench, workload, device)
    every["flashspec"] = with_flashspec(bench, workload, device)
    arms = {name: every[name] for pair in PAIRS.values() for name in pair}
    interleaved(arms, spare[:1], 0.0)  # the first run of an arm pays for allocation and lazy set-up
    runs = interleaved(arms, timed_prompts, until - time.monotonic())
    cell: Cell = {
        "domain": prompts[0].domain,
        "temperature": workload.temperature,
        "best_setup": best.name,
        "turns": len(runs["best"][0]),
        "tok_per_s": {name: round(_rate(runs[name]), 2) for name in arms},
    }
    for name, pair in PAIRS.items():
        interval = ratio(runs, *pair)
        cell[f"{name}_ratio"] = round(interval.estimate, 4)
        cell[f"{name}_interval"] = [round(interval.low, 4), round(interval.high, 4)]
    return cell, runs


def compare(
    bench: Bench, workload: Workload, prompts: Sequence[Prompt], runs: Turns, partings: dict[str, list[int]]
) -> None:
    """Adds to every arm's greedy runs, and to those that part from the target's trace."""
    for number, prompt in enumerate(prompts):
        digest = digest_of(bench.engine.trace_target(workload, prompt).token_ids)
        for name, turns in runs.items():
            partings[name][0] += sum(run.digest != digest for run in turns[number])
            partings[name][1] += len(turns[number])


def asked() -> argparse.Namespace:
    """The flags."""
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="timed in each cell, at least 2")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=450.0, help="for all cells; first turns are always finished")
    parser.add_argument("--device", help="cuda:0 or cpu; else the GPU when there is one")
    parser.add_argument("--dtype", help="else float32 on a CPU and bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, help="of torch; 1 suffers least from other busy programs")
    options = parser.parse_args()
    if options.prompts < 2:
        parser.error(f"--prompts {options.prompts}: an interval needs at least 2")
    return options


def main() -> None:
    """Models, cells, partings, JSON."""
    options = asked()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    spellings = dict.fromkeys([DRAFT, LOOKUP, *(spelling for spelling, _ in RACED)])
    specs = [parse_draft(spelling) for spelling in spellings]
    bench = load.load(TARGET, specs, options.dtype, options.device)
    if bench.refused:
        raise SystemExit(f"{bench.refused[0].name}: {bench.refused[0].detail}")
    partings: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    lengths = (LENGTH, *(length for _, lengths in RACED for length in lengths))
    print(f"{'cell':12} " + " ".join(f"{name:>19}" for name in PAIRS) + "  best setup")
    cells, share = [], options.seconds / (len(TEMPERATURES) * len(DOMAINS))
    for temperature in TEMPERATURES:
        question = Question(lengths=lengths, max_new_tokens=options.max_new_tokens, temperature=temperature)
        for domain in DOMAINS:
            ((workload, prompts),), _ = workloads.workloads(bench, question, [f"builtin:{domain}"])
            prompts = prompts[: options.prompts + RACE_PROMPTS]
            cell, runs = measure_cell(bench, workload, prompts, share)
            if temperature == 0.0:
                compare(bench, workload, prompts[:-RACE_PROMPTS], runs, partings)
            _show(cell)
            cells.append(cell)
    print("greedy outputs that part from our plain decoding:")
    for name, (number, of) in partings.items():
        print(f"  {name:22} {number} of {of}")
    finish(
        {
            "benchmark": "peers",
            **{f"{name}_ratio": min(cell[f"{name}_ratio"] for cell in cells) for name in PAIRS},
            "roofline_fraction": roofline_fraction(str(bench.loaded[0].model.device)),
            "device": bench.engine.environment.device,
            "threads": torch.get_num_threads(),
            "dtype": bench.engine.target.dtype,
            "num_prompts": options.prompts,
            "max_new_tokens": options.max_new_tokens,
            "versions": {name: version(name) for name in ("torch", "transformers", "flashspec")},
            "partings": partings,
            "cells": cells,
        }
    )


def _loaded(bench: Bench, name: str) -> LoadedModel:
    return next(loaded for loaded in bench.loaded if loaded.record.name == name)


def _setup(bench: Bench, spelling: str, length: int) -> Setup:
    by_name = {draft.name: draft for draft in bench.engine.drafts}
    return Setup(draft=by_name[parse_draft(spelling).name], length=length)


def _fastest(turns: Sequence[Sequence[Run]]) -> list[Run]:
    return [min(runs, key=lambda run: run.seconds / run.num_tokens) for runs in turns]


def _rate(turns: Sequence[Sequence[Run]]) -> float:
    runs = _fastest(turns)
    return sum(run.num_tokens for run in runs) / sum(run.seconds for run in runs)


def _show(cell: Cell) -> None:
    label = f"{cell['domain']} {cell['temperature']:g}"
    figures = []
    for name in PAIRS:
        low, high = cell[f"{name}_interval"]
        figures.append(f"{cell[f'{name}_ratio']:5.2f} [{low:.2f}, {high:.2f}]")
    print(f"{label:12} " + " ".join(f"{figure:>19}" for figure in figures) + f"  {cell['best_setup']}", flush=True)


if __name__ == "__main__":
    main()
