"""Forecast against measured over the whole grid: `python -m tests.benchmarks.forecast [--seconds 420]`.

The forecast is made exactly as `tune.py run` makes it, before the grid is run. Then every cell (all drafts at k = 1..8,
plain decoding twice) is really run on the same prompts, prompt by prompt, all cells of a prompt in one shuffled
sequence; passes are repeated until every cell's speed-up is known to 3 % or the time is used up. Calibrated lengths
and plain decoding are shown but not graded. `error` is forecast over measured speed-up, less 1; the error of absolute
tokens per second, which includes the machine's drift since the evidence was taken, stands beside it.
"""

import math
import random
import time
from collections import defaultdict

import numpy

from profiles.engines.torch.engine import TorchEngine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.stats import median
from tests.benchmarks.common import LENGTHS, arguments, family, finish
from tuner.forecast.evidence import Evidence, calibration_lengths, gather
from tuner.forecast.forecaster import Forecaster
from tuner.search.objective import candidates

KNOWN_TO = 0.03
MIN_PASSES = 3
Runs = dict[tuple[str, str], list[float]]  # (cell, prompt digest) -> decode seconds of every pass


def run_pass(engine: TorchEngine, workload: Workload, prompts: tuple[Prompt, ...], runs: Runs, number: int) -> None:
    """Every cell once on every prompt; the second plain cell is called `plain again`."""
    cells = [("plain again", PLAIN), *((setup.name, setup) for setup in candidates(engine.drafts, LENGTHS))]
    for prompt in prompts:
        shuffled = random.Random(f"{number}/{prompt.digest}").sample(cells, len(cells))
        samples = engine.run_together(workload, (prompt,), tuple(setup for _, setup in shuffled), "grid")
        for (name, _), sample in zip(shuffled, samples, strict=True):
            runs[name, prompt.digest].append(sample.decode_s)


def speedup(runs: Runs, name: str, prompts: tuple[Prompt, ...]) -> tuple[float, float]:
    """(speed-up over plain, relative 95 % half-width from pass to pass); both arms emit the same tokens."""
    chosen = numpy.array([runs[name, prompt.digest] for prompt in prompts])
    plain = numpy.array([runs[PLAIN.name, prompt.digest] for prompt in prompts])
    if name != "plain again":  # both plain cells are the baseline, but for the comparison of one with the other
        plain = (plain + numpy.array([runs["plain again", prompt.digest] for prompt in prompts])) / 2
    ratio = float(plain.sum() / chosen.sum())
    by_pass = numpy.log(plain.sum(0) / chosen.sum(0))
    if len(by_pass) < 2:
        return ratio, 1.0
    return ratio, 1.96 * float(by_pass.std(ddof=1)) / math.sqrt(len(by_pass))


def main() -> None:
    """Evidence, grid, comparison, JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=420.0, help="for the grid")
    options = parser.parse_args()
    bench, workload, prompts = family(options.prompts, options.tokens)
    engine = bench.engine
    evidence = gather(engine, workload, prompts, LENGTHS)
    forecaster = Forecaster(evidence, workload, engine.target.run_digest)
    runs: Runs = defaultdict(list)
    names = [setup.name for setup in candidates(engine.drafts, LENGTHS)]
    started, num_passes = time.monotonic(), 0
    while True:
        run_pass(engine, workload, prompts, runs, num_passes)
        num_passes += 1
        spent = time.monotonic() - started
        known = num_passes >= MIN_PASSES and all(speedup(runs, name, prompts)[1] <= KNOWN_TO for name in names)
        if known or spent * (num_passes + 1) / num_passes > options.seconds:
            break
    tokens = sum(len(evidence.traces[prompt.digest].token_ids) - 1 for prompt in prompts)
    cells = []
    print(f"{'setup':46} {'forecast':>9} {'measured':>9} {'+-':>6} {'error':>7} {'tok/s err':>9}  graded")
    for setup in candidates(engine.drafts, LENGTHS):
        cells.append(_cell(setup, forecaster, runs, prompts, tokens))
    graded = numpy.array([abs(cell["error"]) for cell in cells if cell["graded"]])
    again, _ = speedup(runs, "plain again", prompts)
    finish(
        {
            "benchmark": "forecast",
            "cells": cells,
            "num_prompts": len(prompts),
            "num_passes": num_passes,
            "median_abs_error": float(numpy.median(graded)),
            "p95_abs_error": float(numpy.percentile(graded, 95)),
            "max_abs_error": float(graded.max()),
            "aa_error": again - 1.0,
            "target_over_cheapest_draft_step": round(_target_over_cheapest(evidence, engine.target.run_digest), 2),
            "median_abs_rate_error": float(numpy.median([abs(cell["rate_error"]) for cell in cells])),
            "cells_not_known_to_3_percent": sum(cell["known_to"] > KNOWN_TO for cell in cells),
        }
    )


def _target_over_cheapest(evidence: Evidence, target_part: str) -> float:
    """How many steps of the cheapest draft model one plain step of the target takes."""
    drafts = [evidence.steps[part.digest] for part in evidence.components if part.kind == "model"]
    return median(evidence.steps[target_part].samples_s[1]) / min(median(times.samples_s[1]) for times in drafts)


def _cell(
    setup: Setup, forecaster: Forecaster, runs: Runs, prompts: tuple[Prompt, ...], tokens: int
) -> dict[str, object]:
    forecast = forecaster.forecast(setup, prompts)
    measured, known_to = speedup(runs, setup.name, prompts)
    seconds = float(numpy.mean([runs[setup.name, prompt.digest] for prompt in prompts], axis=1).sum())
    cell = {
        "setup": setup.name,
        "forecast": round(forecast.speedup.estimate, 4),
        "measured": round(measured, 4),
        "known_to": round(known_to, 4) if setup != PLAIN else 0.0,
        "error": round(forecast.speedup.estimate / measured - 1.0, 4),
        "rate_error": round(forecast.tok_per_s.estimate * seconds / tokens - 1.0, 4),
        "graded": setup != PLAIN and setup.length not in calibration_lengths(LENGTHS),
    }
    print(
        f"{setup.name:46} {cell['forecast']:9.3f} {cell['measured']:9.3f} {cell['known_to']:6.1%} "
        f"{cell['error']:+7.1%} {cell['rate_error']:+9.1%}  {'yes' if cell['graded'] else 'no'}",
        flush=True,
    )
    return cell


if __name__ == "__main__":
    main()
