"""What the selector costs: microseconds a round, against a round of the family, and its import.

    python -m tests.benchmarks.selector_cost

The policy is one of the family's size: its drafts, four domains at batch 1 and 8, lengths 1 to 8; rounds are drawn, so
that nothing is timed but `choose`, making the report, and `observe`. A round of the family is one of plain decoding of
the target that ships, measured here; rounds that draft take longer.
Every round is timed by itself, garbage collection included. Beside it stands what a loop of 1,000 additions takes,
before and after: it tells how busy the machine was (30 us on an idle core here). Imports are timed as whole processes,
bare Python and the import in turn, from compiled modules as an installed package has them.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

from profiles.engines.base import RequestInfo, RoundReport
from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.stats import median
from tests import ROOT
from tests.benchmarks.common import arguments, family, finish
from tests.support.policies import acceptance, choice, policy, round_times
from tuner.policy.policy import Policy
from tuner.policy.prior import Prior
from tuner.selector.selector import Selector

DOMAINS = ("mixed", "code", "copy", "prose")
BATCHES = (1, 8)
LENGTHS = tuple(range(1, 9))
ROUNDS_PER_REQUEST = 40
NUM_DRAFTS = 9  # as many as ship, with the composites


def family_sized() -> Policy:
    """A policy with as many drafts, domains, batches and lengths as a run of the family makes."""
    looks_up = Draft(kind="ngram", max_match=4, min_match=2)
    models = [
        Draft(kind="model", model=Model(name=f"draft-{number}", dtype="float32", digest=f"{number:032}", num_params=1))
        for number in range(1, NUM_DRAFTS)
    ]
    prior = Prior(
        drafts=(looks_up, *models),
        lengths=LENGTHS,
        acceptance=tuple(
            acceptance(
                number, 0.5 + 0.03 * number if number else 0.7, propose_prob=1.0 if number else 0.5, domain=domain
            )
            for number in range(NUM_DRAFTS)
            for domain in DOMAINS
        ),
        round_times=tuple(
            round_times(number, 0.001 if number == 0 else 0.003, batch_size=batch)
            for number in (None, *range(NUM_DRAFTS))
            for batch in BATCHES
        ),
    )
    rows = [
        choice(Setup(draft=looks_up, length=8) if batch == 1 else PLAIN, domain=domain, batch_size=batch)
        for domain in DOMAINS
        for batch in BATCHES
    ]
    return replace(policy(*rows), prior=prior)


def microseconds(policy_: Policy, num_rounds: int, rows: int) -> list[float]:
    """Of every round: `choose`, making the report, `observe`."""
    selector, rng = Selector(policy_), random.Random(0)
    spent = []
    for number in range(num_rounds):
        domain = DOMAINS[(number // 200) % len(DOMAINS)]
        requests = [RequestInfo((number // ROUNDS_PER_REQUEST, row), domain, 400) for row in range(rows)]
        started = time.perf_counter_ns()
        pick = selector.choose(requests=requests)
        chosen = time.perf_counter_ns()
        outcomes = tuple(drawn(pick.setup, rng) for _ in range(rows))
        seconds = (0.01 + 0.001 * max(proposed for proposed, _ in outcomes)) * rng.uniform(0.95, 1.05)
        drawn_at = time.perf_counter_ns()
        selector.observe(RoundReport(pick, outcomes, seconds))
        spent.append((time.perf_counter_ns() - drawn_at + chosen - started) / 1e3)
    return spent


def calibration_us() -> float:
    """Microseconds of a loop of 1,000 additions, the median of 200."""
    taken = []
    for _ in range(200):
        started, total = time.perf_counter_ns(), 0
        for number in range(1000):
            total += number
        taken.append((time.perf_counter_ns() - started) / 1e3)
    return median(taken)


def drawn(setup: Setup, rng: random.Random) -> tuple[int, int]:
    """(proposed, accepted) of a round: half of the look-ups propose nothing, 0.7 is every acceptance probability."""
    proposed = 0 if setup.draft is None or (setup.draft.looks_up and rng.random() < 0.5) else setup.length
    accepted = next((position for position in range(proposed) if rng.random() > 0.7), proposed)
    return proposed, accepted


def plain_round_s() -> float:
    """Seconds of a round of plain decoding of the family's target at batch 1."""
    bench, workload, prompts = family(5, 32)
    runs = [bench.engine.run_together(workload, (prompt,), (PLAIN,), "bench")[0] for prompt in prompts]
    return median(run.decode_s / (run.output_tokens - 1) for run in runs if run.output_tokens > 1)


def import_seconds(programs: list[str], repeats: int) -> list[float]:
    """Of each program as a process of its own: the median of interleaved runs, the first of which compiles."""
    taken: list[list[float]] = [[] for _ in programs]
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(repeats + 1):
            for program, seconds in zip(programs, taken, strict=True):
                started = time.perf_counter()
                subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
                seconds.append(time.perf_counter() - started)
    return [median(seconds[1:]) for seconds in taken]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    """A row per batch size, then JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=40000)
    parser.add_argument("--imports", type=int, default=30)
    options = parser.parse_args()
    policy_ = family_sized()
    document: dict[str, Any] = {"benchmark": "selector_cost", "rounds": options.rounds}
    round_s = plain_round_s()
    document["calibration_us"] = [round(calibration_us(), 1)]
    print(f"rows  p50 us  p99 us  of a plain round of {round_s * 1e3:.2f} ms")
    for rows in BATCHES:
        spent = microseconds(policy_, options.rounds, rows)
        p50, p99 = percentile(spent, 0.5), percentile(spent, 0.99)
        print(f"{rows:4}  {p50:6.1f}  {p99:6.1f}  {p50 / 1e6 / round_s:.5f}")
        suffix = "" if rows == 1 else f"_batch_{rows}"
        document |= {f"p50_us{suffix}": round(p50, 2), f"p99_us{suffix}": round(p99, 2)}
        document[f"round_fraction{suffix}"] = round(p50 / 1e6 / round_s, 5)
    document["calibration_us"] = [*document["calibration_us"], round(calibration_us(), 1)]
    print(f"1,000 additions, before and after: {document['calibration_us']} us")
    bare, light = import_seconds(["pass", "import tuner.selector"], options.imports)
    print(f"import of the selector and the policy reader: {light / bare:.2f} times bare Python")
    ratio = round(light / bare, 3)
    finish(document | {"import_ratio": ratio, "import_ratio_with_policy": ratio})


if __name__ == "__main__":
    main()
