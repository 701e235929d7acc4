"""One recorded run of a drafter on a real vLLM against real runs at every k: `python -m tests.benchmarks.traced_heads`.

On vLLM's CPU build (`python -m tests.lanes.vllm_env`), float32: rounds that the trace tells are compared prompt by
prompt with those of real runs, and outputs with plain decoding. Parts are run one by one and kept in `--folder`
(`--part NAME`; rows that are there are not measured again), then `--merge` prints them all:

* `draft_model`, `eagle`, `ngram`: greedy, k = 1..8. `cost_ratio`: seconds of the real runs at all batch sizes over
  seconds of the trace and of the timed rounds; starts are left out.
* `composite`: the head at 3 tokens, the look-up before it at up to 8.
* `v2_draft_model`, `v2_eagle`: Model Runner V2 through Triton's interpreter.
* `sampled_*`: temperature 0.8; accepted tokens per round, of the trace's walk and of real runs, and the 95 % interval
  of their difference over prompts and seeds. vLLM's sampling is repaired (`tests/support/repaired_vllm_worker.py`).
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy

from profiles.acceptance.expected_rounds import DraftAcceptance, combine, expected_rounds
from profiles.engines.runs import Run
from profiles.engines.vllm.config import VllmOptions
from profiles.engines.vllm.engine import VllmEngine
from profiles.models import loader
from profiles.prompts import reader, tokenize
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.evidence import RoundCount, Rounds, TargetTrace
from tests import ROOT
from tests.benchmarks.common import LENGTHS, arguments, finish
from tests.lanes.places import RUNNING, V2
from tuner.forecast.queues import spread_over_domains

CONTEXT = 384
LONGEST = max(LENGTHS)
QUIET = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
TEMPERATURE, SEEDS, RESAMPLINGS = 0.8, 5, 2000
REPAIRED = ROOT / "tests/support/repaired_vllm_worker.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one run of this script measures."""

    draft: str
    lengths: tuple[int, ...] = LENGTHS
    batch_sizes: tuple[int, ...] = (1, 4, 8)
    prompts: int = 24
    new_tokens: int = 24
    is_v2: bool = False
    temperature: float = 0.0

    @property
    def times(self) -> bool:
        return not self.is_v2 and self.temperature == 0.0 and self.draft != "composite"


DRAFTS = ("draft_model", "eagle", "ngram")
PARTS = {
    **{name: Part(draft=name) for name in DRAFTS},
    "composite": Part(draft="composite", lengths=(3,), batch_sizes=(1, 4)),
    **{
        f"v2_{name}": Part(draft=name, lengths=(1, 3, 8), batch_sizes=(4,), prompts=8, new_tokens=12, is_v2=True)
        for name in DRAFTS[:2]
    },
    **{
        f"sampled_{name}": Part(draft=name, lengths=(1, 3, 8), batch_sizes=(4,), prompts=12, temperature=TEMPERATURE)
        for name in DRAFTS
    },
}


def draft_of(name: str) -> Draft:
    if name == "draft_model":
        return Draft(kind="model", model=loader.describe("builtin:draft-general", dtype="float32").record)
    if name == "ngram":
        return Draft(kind="ngram", max_match=4, min_match=2)
    head = loader.describe_head("builtin:draft-eagle", dtype="float32")
    if name == "eagle":
        return Draft(kind="native", method="eagle", model=head)
    return Draft(kind="composite", method="eagle", model=head, max_match=4, min_match=2)


class Comparison:
    """The traces of a part's draft, and what its real runs are compared with."""

    def __init__(self, engine: VllmEngine, part: Part, prompts: Sequence[Prompt]) -> None:
        self._engine, self._part, self._prompts = engine, part, tuple(prompts)
        self._draft = engine.drafts[0]
        self._traced: dict[int, list[tuple[TargetTrace, DraftAcceptance]]] = {}
        self._plain: dict[int, list[Run]] = {}
        self.trace_s = 0.0

    def workload(self, batch_size: int, seed: int = 0, extra: int = 0) -> Workload:
        return Workload(
            batch_size=batch_size,
            context_length=CONTEXT + extra,
            max_new_tokens=self._part.new_tokens + extra,
            temperature=self._part.temperature,
            seed=seed,
        )

    def traced(self, seed: int) -> list[tuple[TargetTrace, DraftAcceptance]]:
        """By prompt: its text, longer by a round that passes the end, and the draft's acceptance there."""
        if seed not in self._traced:
            longer = self.workload(1, seed, LONGEST)
            traces = [self._engine.trace_target(longer, prompt) for prompt in self._prompts]
            parts = self._draft.components
            for component in parts:  # starts and warms up the engines
                self._engine._decode(longer, self._prompts[:1], Setup(draft=component, length=LONGEST))
            began = time.monotonic()
            self._traced[seed] = [
                (trace, combine([self._engine.trace_draft(longer, prompt, trace, each, LONGEST) for each in parts]))
                for prompt, trace in zip(self._prompts, traces, strict=True)
            ]
            self.trace_s += time.monotonic() - began
        return self._traced[seed]

    def row(self, batch_size: int, length: int) -> dict[str, Any]:
        """Rounds and outputs of real runs at a length beside those walked and those of plain decoding."""
        setup = Setup(draft=self._draft, length=length)
        walked, rounds, outputs_differ, seconds = [], [], 0, 0.0
        for seed in range(SEEDS if self._part.temperature else 1):
            workload = self.workload(batch_size, seed)
            walked += [
                expected_rounds(*traced, length, self._part.new_tokens, past_end=True).rounds
                for traced in self.traced(seed)
            ]
            self._engine._drafting(workload, setup)  # starts it
            began = time.monotonic()
            runs = self._engine._decode(workload, self._prompts, setup)
            seconds += time.monotonic() - began
            rounds += [run.rounds for run in runs]
            if not self._part.temperature:
                if batch_size not in self._plain:
                    self._plain[batch_size] = self._engine._decode(workload, self._prompts, PLAIN)
                plain = self._plain[batch_size]
                outputs_differ += sum(
                    list(run.token_ids) != list(other.token_ids) for run, other in zip(runs, plain, strict=True)
                )
        row = {"batch_size": batch_size, "k": length, "rounds": _num_rounds(rounds), "walked": _num_rounds(walked)}
        if self._part.temperature:
            return {**row, **compare_sampled(walked, rounds)}
        differ = sum(dict(real) != expected for real, expected in zip(rounds, walked, strict=True))
        return {
            **row,
            "prompts_that_differ": differ,
            "outputs_that_differ": outputs_differ,
            "seconds": round(seconds, 3),
        }


def _num_rounds(rounds: Sequence[Rounds]) -> int:
    return round(sum(sum(of_prompt.values()) for of_prompt in rounds))


def compare_sampled(walked: Sequence[Rounds], real: Sequence[Rounds]) -> dict[str, Any]:
    """Accepted tokens per round of both, and the 95 % bootstrap interval of their difference."""

    def totals(rounds: Sequence[Rounds]) -> numpy.ndarray:
        return numpy.array(
            [(sum(n * RoundCount(*pair).accepted for pair, n in each.items()), sum(each.values())) for each in rounds]
        )

    both = totals(walked), totals(real)
    picked = numpy.random.default_rng(0).integers(len(walked), size=(RESAMPLINGS, len(walked)))
    means = [numbers[:, 0].sum() / numbers[:, 1].sum() for numbers in both]
    resampled = [numbers[picked].sum(axis=1) for numbers in both]
    differences = resampled[0][:, 0] / resampled[0][:, 1] - resampled[1][:, 0] / resampled[1][:, 1]
    low, high = numpy.quantile(differences, [0.025, 0.975])
    return {
        "accepted_walked": round(float(means[0]), 4),
        "accepted_real": round(float(means[1]), 4),
        "difference": [round(float(value), 4) for value in (low, means[0] - means[1], high)],
        "inside": bool(low <= 0.0 <= high),
    }


def measure(name: str, folder: Path) -> None:
    """Adds the rows of a part that are not in its file yet, each as soon as it is measured."""
    part, file = PARTS[name], folder / f"{name}.jsonl"
    there = {(row.get("batch_size"), row.get("k")) for row in rows_of(file)}
    missing = [(batch, k) for batch in part.batch_sizes for k in part.lengths if (batch, k) not in there]
    if not missing and (not part.times or (None, None) in there):
        return
    for variable in V2:  # of the part before
        os.environ.pop(variable, None)
    os.environ.update({**QUIET, **(V2 if part.is_v2 else {})})
    target = loader.load("builtin:target", dtype="float32", device="cpu")
    texts, _ = tokenize(reader.read_all(["builtin:all"]), target.tokenizer, CONTEXT - part.new_tokens - LONGEST)
    options = VllmOptions(
        python=str(RUNNING.python),
        max_length=LONGEST,
        max_batch_size=8,
        context_length=CONTEXT + LONGEST,
        worker=REPAIRED if part.temperature else None,
    )
    with VllmEngine(target.record, [draft_of(part.draft)], options) as engine, file.open("a", encoding="utf-8") as out:

        def add(row: dict[str, Any]) -> None:
            out.write(json.dumps({"part": name, **row}) + "\n")
            out.flush()
            print(name, row, flush=True)

        comparison = Comparison(engine, part, spread_over_domains(texts, part.prompts))
        for batch_size, length in missing:
            add(comparison.row(batch_size, length))
        if part.times and (None, None) not in there:
            comparison.traced(0)
            add({"trace_s": round(comparison.trace_s, 3), "timed_s": dict(timed_seconds(engine, comparison, part))})


def timed_seconds(engine: VllmEngine, comparison: Comparison, part: Part) -> Iterator[tuple[int, float]]:
    """By batch size: seconds of the timed rounds."""
    for batch_size in part.batch_sizes:
        began = time.monotonic()
        engine.time_steps(replace(comparison.workload(batch_size)), CONTEXT // 2, LONGEST)
        yield batch_size, round(time.monotonic() - began, 3)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def merged(folder: Path) -> dict[str, Any]:
    """The figures over all parts that are there."""
    rows = [row for name in PARTS for row in rows_of(folder / f"{name}.jsonl")]
    greedy = [row for row in rows if "prompts_that_differ" in row]
    document: dict[str, Any] = {"parts": {name: len(rows_of(folder / f"{name}.jsonl")) for name in PARTS}}
    for prefix in ("", "v2_"):
        chosen = [row for row in greedy if row["part"].startswith("v2_") == bool(prefix)]
        for figure in ("prompts_that_differ", "outputs_that_differ"):
            document[prefix + figure] = sum(row[figure] for row in chosen) if chosen else None
    sampled = [row["inside"] for row in rows if "inside" in row]
    document |= {"sampled_rows": len(sampled), "sampled_inside": sum(sampled)}
    timed = {row["part"]: row for row in rows if "trace_s" in row}
    real = [row for row in greedy if row["part"] in timed]
    if timed:
        for label, batches in (("cost_ratio", (1, 4, 8)), ("cost_ratio_one_batch", (1,))):
            spent_s = sum(
                row["trace_s"] + sum(row["timed_s"][str(batch)] for batch in batches) for row in timed.values()
            )
            document[label] = round(sum(row["seconds"] for row in real if row["batch_size"] in batches) / spent_s, 2)
    return {**document, "rows": rows}


def main() -> None:
    """Measures parts, or prints what they say together."""
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=list(PARTS), nargs="*", default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("traced_heads"))
    parser.add_argument("--merge", action="store_true", help="only print what is in the folder")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in () if options.merge else options.part:
        measure(name, options.folder)
    finish({"benchmark": "traced_heads", **merged(options.folder)})


if __name__ == "__main__":
    main()
