"""What tuning costs against the exhaustive grid, and how far its pick is from the grid's best.

`python -m tests.benchmarks.cost`: the tuner decides on a fresh store; then every setup is really run once on every one
of the same prompts; then the pick and the grid's top three are run again, prompt by prompt back to back. `regret` is
the pick's seconds per token over the fastest of the four's in that rerun, less 1 (0 when the pick is fastest; choosing
the fastest by the same rerun makes it a little too large). All seconds are of measuring; loading is left out.

The grid's seconds are those of its requests, each with a prefill of its own; the tuner prefills a prompt once.
`--small`: a look-up and an early exit at k = 1..5 on 20 prompts of 300 tokens and more, 48 new ones; without the rerun,
and the grid's seconds are four times those of every fourth prompt. Its last line has the seconds by stage.
"""

import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.stats import speedup_interval
from store.evidence_store import EvidenceStore
from tests.benchmarks.common import LENGTHS, arguments, family, finish, load_family
from tuner import run as store_runs
from tuner.pipeline.pipeline import Watch
from tuner.pipeline.trial import Options
from tuner.search.objective import candidates

SMALL_LENGTHS = tuple(range(1, 6))


def run_grid(
    engine: Engine, workload: Workload, prompts: tuple[Prompt, ...], lengths: Sequence[int] = LENGTHS
) -> tuple[float, dict[Setup, float]]:
    """(seconds of all requests, tokens per second of every setup)."""
    setups = candidates(engine.drafts, lengths)
    seconds: dict[Setup, float] = defaultdict(float)
    tokens: dict[Setup, int] = defaultdict(int)
    prefills_s = 0.0
    for prompt in prompts:
        for setup in random.Random(prompt.digest).sample(setups, len(setups)):
            (sample,) = engine.run_together(workload, (prompt,), (setup,), "grid")
            seconds[setup] += sample.decode_s
            tokens[setup] += sample.output_tokens - 1
            prefills_s += sample.ttft_s
    return prefills_s + sum(seconds.values()), {setup: tokens[setup] / seconds[setup] for setup in setups}


def rerun(
    engine: Engine, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], repeats: int
) -> dict[Setup, tuple[list[float], list[int]]]:
    """Decode seconds (summed over repeats) and tokens of each setup, prompt by prompt."""
    found: dict[Setup, tuple[list[float], list[int]]] = {setup: ([], []) for setup in setups}
    for prompt in prompts:
        total = dict.fromkeys(setups, 0.0)
        tokens = dict.fromkeys(setups, 0)
        for repeat in range(repeats):
            order = tuple(random.Random(f"{repeat}/{prompt.digest}").sample(setups, len(setups)))
            for setup, sample in zip(order, engine.run_together(workload, (prompt,), order, "rerun"), strict=True):
                total[setup] += sample.decode_s
                tokens[setup] += sample.output_tokens - 1
        for setup in setups:
            if tokens[setup] > 0:
                found[setup][0].append(total[setup])
                found[setup][1].append(tokens[setup])
    return found


class Stages:
    """Seconds by stage of a run, as `Watch.progress` sees them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since_s = "", time.monotonic()

    def note(self, stage: str, *_: int) -> None:
        now = time.monotonic()
        self.seconds[self._stage] += now - self._since_s
        self._stage, self._since_s = stage, now


def tune(
    engine: Engine, workload: Workload, prompts: tuple[Prompt, ...], lengths: tuple[int, ...]
) -> tuple[store_runs.FinishedRun, dict[str, float]]:
    """The tuner on a fresh store, and its seconds by stage."""
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder, EvidenceStore.open(Path(folder) / "evidence.db") as evidence_store:
        done = store_runs.tune(
            engine,
            [(workload, prompts)],
            store_runs.TuningSession.of(evidence_store),
            Options(lengths=lengths),
            Watch(progress=stages.note),
        )
    stages.note("end")
    return done, {stage: round(seconds, 1) for stage, seconds in stages.seconds.items() if stage}


def small() -> None:
    """A small grid on long prompts."""
    bench, [(workload, prompts)] = load_family(("ngram", "early-exit:5"), lengths=SMALL_LENGTHS, max_new_tokens=48)
    tokens = [token for prompt in prompts for token in prompt.token_ids]
    long = tuple(
        Prompt(domain="mixed text", token_ids=tuple(tokens[400 * number : 400 * number + 300 + 5 * number]))
        for number in range(20)
    )
    workload = replace(workload, context_length=464)
    done, stages = tune(bench.engine, workload, long, SMALL_LENGTHS)
    sampled_seconds, rates = run_grid(bench.engine, workload, long[2::4], SMALL_LENGTHS)
    grid_seconds = 4 * sampled_seconds
    tuner_seconds = float(done.cost["measured_seconds"])
    print(done.policy.headline.reason)
    finish(
        {
            "benchmark": "cost, small",
            "pick": done.policy.headline.setup.name,
            "num_setups": len(rates),
            "grid_seconds": round(grid_seconds, 1),
            "tuner_seconds": tuner_seconds,
            "stages": stages,
            "small_cost_ratio": round(grid_seconds / tuner_seconds, 2),
        }
    )


def main() -> None:
    """Tuner, grid, rerun, JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2, help="of the rerun")
    parser.add_argument("--small", action="store_true", help="the small grid instead")
    options = parser.parse_args()
    if options.small:
        small()
        return
    bench, workload, prompts = family(options.prompts, options.tokens)
    engine = bench.engine
    done, stages = tune(engine, workload, prompts, LENGTHS)
    pick, tuner_seconds = done.policy.headline.setup, float(done.cost["measured_seconds"])
    print(f"tuner: {tuner_seconds:.1f} s, pick {pick.name}: {done.policy.headline.reason}", flush=True)
    grid_seconds, rates = run_grid(engine, workload, prompts)
    top = sorted(rates, key=lambda setup: -rates[setup])[:3]
    print(f"grid: {grid_seconds:.1f} s over {len(rates)} setups; plain {rates[PLAIN]:.1f} tok/s", flush=True)
    again = rerun(engine, workload, prompts, tuple(dict.fromkeys((pick, *top))), options.repeats)
    per_token = {setup: sum(seconds) / sum(tokens) for setup, (seconds, tokens) in again.items()}
    fastest = min(per_token, key=lambda setup: per_token[setup])
    for setup in again:
        mark = "pick" if setup == pick else f"top {top.index(setup) + 1}"
        print(f"{setup.name:32} {mark:6} grid {rates[setup]:7.1f} tok/s, rerun {1 / per_token[setup]:7.1f} tok/s")
    low = high = regret = 0.0
    if fastest != pick:
        interval, _ = speedup_interval(*again[pick], *again[fastest])
        regret, low, high = interval.estimate - 1.0, interval.low - 1.0, interval.high - 1.0
    finish(
        {
            "benchmark": "cost",
            "pick": pick.name,
            "proven": done.policy.headline.proven,
            "grid_top": [setup.name for setup in top],
            "fastest_in_rerun": fastest.name,
            "num_prompts": len(prompts),
            "num_setups": len(rates),
            "grid_seconds": round(grid_seconds, 2),
            "grid_seconds_estimate": done.cost["grid_seconds_estimate"],
            "tuner_seconds": tuner_seconds,
            "stages": stages,
            "cost_ratio": round(grid_seconds / tuner_seconds, 2),
            "regret": round(regret, 4),
            "regret_low": round(low, 4),
            "regret_high": round(high, 4),
        }
    )


if __name__ == "__main__":
    main()
