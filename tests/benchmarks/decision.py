"""How often a decision is right, on made-up timings: `python -m tests.benchmarks.decision [--cases NAME ...]`.

The real `worth_racing`, `race`, `among_equals`, `proof.measure` and `proof.prove` decide one operating point over and
over; no model runs. A prompt's speed-up is log-normal around the true one with the case's spread, half of which all
drafts share; the target is the population's ratio of totals. A forecast knows a prompt's speed-up but for 3 % of its
own and 2 % (in some cases 9 %) of its draft's. A third of the prompts choose, the rest prove: 144 in a large case.
One draft has the case's gain and the others none, but for the two cases that name what they gain.

`before` is a paired t interval: large cases on 30 prompts of the same race's winner; small ones choose the best
forecast on all prompts, prove on the same ones, and correct for all drafts (Bonferroni).

Printed for each case: proofs attempted, share of claims, share of intervals that cover the truth, timed prompts.
"""

import argparse
import json
import math
import multiprocessing.pool
import os
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from profiles.records.core import PLAIN, Draft, Interval, Model, Prompt, Setup, digest_of
from profiles.stats import Linearised, LogRatio, log_ratio
from tests.benchmarks.common import arguments, finish
from tuner.forecast.queues import spread_over_domains
from tuner.pipeline.points import num_proof_prompts
from tuner.policy.estimates import Forecast, Measured
from tuner.search import proof
from tuner.search.objective import MIN_SPEEDUP, among_equals, worth_racing
from tuner.search.pairs import Pair, Queue, columns
from tuner.search.race import race

RACE_PROMPTS, NUM_FINALISTS = 12, 3
BEFORE_PROMPTS = 30
CHUNK = 50  # repetitions
NUM_SELECTION, NUM_PROOF = 72, 144
TOKENS, PLAIN_S, TTFT_S = 65, 0.32, 0.05
PROMPT_ERROR = 0.03
SETUPS = tuple(
    Setup(
        draft=Draft(kind="model", model=Model(name=f"d{n}", dtype="float32", digest=digest_of(n), num_params=1)),
        length=3,
    )
    for n in range(6)
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """True speed-ups by draft, how prompts and runs vary, and how many prompts there are."""

    name: str
    speedups: tuple[float, ...] = (1.0, 1.0, 1.0)
    spread: float = 0.10
    noise: float = 0.02
    order: float = 0.0  # what the second run of a pair takes longer, relative
    spikes: float = 0.0  # share of the runs that take half as long again
    draft_error: float = 0.02
    num_prompts: int | None = None  # of a small case

    @property
    def is_null(self) -> bool:
        return max(self.speedups) <= 1.0

    @property
    def split(self) -> tuple[int, int]:
        """Prompts of choice and proof, as `plan_points` splits them."""
        if self.num_prompts is None:
            return NUM_SELECTION, NUM_PROOF
        num_proof = num_proof_prompts(self.num_prompts)
        return self.num_prompts - num_proof, num_proof


SMALL = {"spread": 0.25, "speedups": (1.0,) * 6}
CASES = (
    Case(name="null, spread 0, noise 5 %", spread=0.0, noise=0.05),
    Case(name="null, spread 10 %"),
    Case(name="null, spread 20 %, noise 5 %", spread=0.20, noise=0.05),
    Case(name="null, spread 35 %, spikes", spread=0.35, spikes=0.05),
    Case(name="null, second run 3 % slower", order=0.03),
    Case(name="null, second run 3 % faster", order=-0.03),
    Case(name="null, draft error 9 %", draft_error=0.09),
    Case(name="null, 12 prompts, 6 drafts", num_prompts=12, **SMALL),
    Case(name="null, 20 prompts, 6 drafts", num_prompts=20, **SMALL),
    Case(name="null, 24 prompts, 6 drafts", num_prompts=24, **SMALL),
    Case(name="power_1_05_spread_10", speedups=(1.05, 1.0, 1.0)),
    Case(name="power_1_05_spread_20", speedups=(1.05, 1.0, 1.0), spread=0.20),
    Case(name="power_1_02_spread_10", speedups=(1.02, 1.0, 1.0)),
    Case(name="power_small", speedups=(1.28, *(1.0,) * 5), spread=0.25, num_prompts=20),
    Case(
        name="1.28 among 1.15 to 0.95, 20 prompts",
        speedups=(1.28, 1.15, 1.10, 1.05, 1.0, 0.95),
        spread=0.25,
        num_prompts=20,
    ),
    Case(name="1.05 beside 1.03 and 1.01, spread 20 %", speedups=(1.05, 1.03, 1.01), spread=0.20),
    Case(name="1.05, spread 10 %, draft error 9 %", speedups=(1.05, 1.0, 1.0), draft_error=0.09),
    Case(name="1.05, spread 20 %, draft error 9 %", speedups=(1.05, 1.0, 1.0), spread=0.20, draft_error=0.09),
    Case(name="1.02, spread 10 %, draft error 9 %", speedups=(1.02, 1.0, 1.0), draft_error=0.09),
)


class Run(NamedTuple):
    """What race and proof read of a `Sample`, without its checks, which take most of the time."""

    prompt_digest: str
    decode_s: float
    ttft_s: float = TTFT_S
    output_tokens: int = TOKENS
    output_digest: str = "o"
    disturbed: bool = False


class World:
    """One draw of a case: prompts, their speed-ups with each draft, forecasts, and timed runs."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.rng = rng = numpy.random.default_rng(seed)
        self.setups = SETUPS[: len(case.speedups)]
        self.index = {id(setup): index for index, setup in enumerate(self.setups)}
        size, count = sum(case.split), len(case.speedups)
        self.speedups = rng.permutation(case.speedups)  # ties go by name, which must not tell the best
        self.prompts = PROMPTS[:size]
        self.number = {prompt.digest: index for index, prompt in enumerate(self.prompts)}
        self.plain_s = PLAIN_S * numpy.exp(rng.normal(0.0, 0.3, size))
        parts = rng.normal(0.0, case.spread * math.sqrt(0.5), (count + 1, size))
        # the mean of exp(-gain) is 1 / speed-up, so that the ratio of expected totals is the speed-up
        self.gains = numpy.log(self.speedups)[:, None] + case.spread**2 / 2.0 + parts[0] + parts[1:]
        errors = rng.normal(0.0, PROMPT_ERROR, (count, size)) + rng.normal(0.0, case.draft_error, (count, 1))
        self.forecast_s = self.plain_s * numpy.exp(-self.gains - errors)

    def forecast(self, setup: Setup, prompts: Sequence[Prompt]) -> Forecast:
        picks = [self.number[prompt.digest] for prompt in prompts]
        index = self.index[id(setup)]
        speedup = log_ratio(Linearised.of([self.plain_s[picks]], [self.forecast_s[index][picks]])).interval()
        return Forecast(setup=setup, tok_per_s=speedup, speedup=speedup, acceptance_length=2.0)

    def seconds(self, setup: Setup, prompts: Sequence[Prompt]) -> proof.Seconds:
        index = self.index[id(setup)]
        decode = {
            prompt.digest: (self.plain_s[number], self.forecast_s[index][number])
            for prompt in prompts
            for number in [self.number[prompt.digest]]
        }
        requests = {digest: (plain + TTFT_S, chosen + TTFT_S) for digest, (plain, chosen) in decode.items()}
        return {"tpot": decode, "throughput": requests}

    def run(self, queue: Queue, setup: Setup) -> list[Pair]:
        """Pairs in a random order, as `run_pairs` makes them."""
        return self.run_beside(queue, (setup,))[setup]

    def run_beside(self, queue: Queue, setups: Sequence[Setup]) -> dict[Setup, list[Pair]]:
        """Pairs of several setups that share their plain runs, in a random order."""
        picks = [self.number[prompt.digest] for prompt in queue]
        case, shape = self.case, (len(setups) + 1, len(picks))
        factors = numpy.exp(self.rng.normal(0.0, case.noise, shape))
        for number, setup in enumerate(setups, 1):
            factors[number] *= 1.0 if setup == PLAIN else numpy.exp(-self.gains[self.index[id(setup)]][picks])
        factors[self.rng.integers(shape[0], size=shape[1]), numpy.arange(shape[1])] *= 1.0 + case.order
        factors[self.rng.random(shape) < case.spikes] *= 1.5
        plain, *chosen = [
            [Run(prompt.digest, seconds) for prompt, seconds in zip(queue, row, strict=True)]
            for row in (self.plain_s[picks] * factors).tolist()
        ]
        return {
            setup: [Pair(*pair) for pair in zip(plain, runs, strict=True)]
            for setup, runs in zip(setups, chosen, strict=True)
        }


PROMPTS = tuple(Prompt(domain="code", token_ids=(number + 5,)) for number in range(NUM_SELECTION + NUM_PROOF))


@dataclass
class Tally:
    """What came of a case's repetitions."""

    attempts: int = 0
    claims: int = 0
    covered: int = 0
    timed: int = 0

    def add(self, claimed: bool, covered: bool, timed: int) -> None:
        self.attempts += 1
        self.claims += int(claimed)
        self.covered += int(covered)
        self.timed += timed

    @classmethod
    def of(cls, parts: Sequence["Tally"]) -> "Tally":
        """What several together came to."""
        return cls(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))

    def figures(self, repetitions: int) -> dict[str, float | int | None]:
        attempts = self.attempts
        return {
            "attempts": attempts,
            "claimed": round(self.claims / repetitions, 4),
            "coverage": round(self.covered / attempts, 4) if attempts else None,
            "timed_prompts": round(self.timed / attempts, 1) if attempts else None,
        }


@dataclass
class Result:
    """Of one case: decided as now, and as before."""

    after: Tally = field(default_factory=Tally)
    before: Tally = field(default_factory=Tally)


def decide(case: Case, seed: int, result: Result) -> None:
    """One operating point from forecasts to claim, as `tuner.pipeline` decides it, and the same winner as before."""
    world = World(case, seed)
    num_selection, _ = case.split
    selection, fresh = world.prompts[:num_selection], world.prompts[num_selection:]
    hopeful = worth_racing([world.forecast(setup, selection) for setup in world.setups])
    if case.num_prompts is not None:
        small_before(world, result.before)
    if not hopeful:
        return
    raced: dict[Setup, list[Pair]] = {}

    race_prompts = spread_over_domains(selection, RACE_PROMPTS)

    def run(number: int, setups: Sequence[Setup]) -> dict[Setup, list[Pair]]:
        ran = world.run_beside((race_prompts[number],), setups)
        for setup, pairs in ran.items():
            raced.setdefault(setup, []).extend(pairs)
        return ran

    ratios = {hopeful[0]: LogRatio(math.log(MIN_SPEEDUP), 0.0, 1.0)}  # a single finalist goes to the proof at once
    if len(hopeful) > 1:
        result_of_race = race(
            run, len(race_prompts), hopeful, num_finalists=NUM_FINALISTS, study_name="race", storage=None
        )
        domains = {prompt.digest: prompt.domain for prompt in selection}
        ratios = {
            setup: proof.race_ratio(raced[setup], world.seconds(setup, selection), domains, "tpot")
            for setup in result_of_race.speedups
        }
    speedups = {setup: math.exp(ratio.value) for setup, ratio in ratios.items()}
    winner = among_equals(speedups)
    if winner is None or not proof.is_worth_proving(ratios[winner]):
        return
    others = {setup: speedup for setup, speedup in speedups.items() if setup != winner and speedup >= MIN_SPEEDUP}
    second = among_equals(others) if len(fresh) >= proof.MIN_RUNNER_UP_PROMPTS else None
    share = proof.share_of_level(ratios, winner, second)
    measured, pairs, proven = prove(world, winner, raced.get(winner, []), fresh, share)
    timed = len(pairs)
    if not proven and second:
        share = (1.0 - share) * proof.share_of_level(ratios, second, None)
        other, more, proven = prove(world, second, raced[second], fresh, share)
        timed += len(more)
        measured = other if proven else measured
    truth = world.speedups[world.setups.index(measured.setup)]
    result.after.add(proven, covers(measured.speedup, truth), timed)
    if case.num_prompts is None:
        interval = plain_interval(pairs + world.run(fresh[len(pairs) : BEFORE_PROMPTS], winner), 0.05)
        truth = world.speedups[world.setups.index(winner)]
        result.before.add(is_claimed(interval), covers(interval, truth), BEFORE_PROMPTS)


def prove(
    world: World, setup: Setup, race_pairs: list[Pair], prompts: Sequence[Prompt], share: float
) -> tuple[Measured, list[Pair], bool]:
    """The looks at a proof until it is won or over; it is the only operating point."""
    domains = {prompt.digest: prompt.domain for prompt in world.prompts}
    raced = [world.prompts[world.number[pair.plain.prompt_digest]] for pair in race_pairs]
    forecasts = proof.Forecasts(
        seconds=world.seconds(setup, prompts), weights=proof.weights(race_pairs, world.seconds(setup, raced), domains)
    )
    sizes = proof.look_sizes(len(prompts), proof.LOOKS)
    design = proof.Design(
        setup=setup,
        greedy=True,
        domains=domains,
        forecasts=forecasts if len(sizes) > 1 else None,
        num_pairs=len(prompts),
        share=share,
    )
    pairs: list[Pair] = []
    looks: tuple[proof.Look, ...] = ()
    for size in sizes:
        pairs += world.run(tuple(prompts[len(pairs) : size]), setup)
        measured, looks = proof.measure(design, pairs, looks)
        if measured.p_value <= proof.LEVEL:
            break
    return measured, pairs, proof.prove([measured])[0]


def small_before(world: World, tally: Tally) -> None:
    """The best forecast on all prompts, proven on the same ones, corrected for all drafts."""
    forecasts = [world.forecast(setup, world.prompts) for setup in world.setups]
    best = max(forecasts, key=lambda forecast: forecast.speedup.estimate)
    if best.speedup.high <= 1.0:
        return
    interval = plain_interval(world.run(world.prompts, best.setup), 0.05 / len(forecasts))
    truth = world.speedups[world.setups.index(best.setup)]
    tally.add(is_claimed(interval), covers(interval, truth), len(world.prompts))


def plain_interval(pairs: Sequence[Pair], level: float) -> Interval:
    plain_s, plain_tokens, chosen_s, chosen_tokens = columns(pairs[:BEFORE_PROMPTS])
    return log_ratio(Linearised.of([plain_s, chosen_tokens], [chosen_s, plain_tokens])).interval(level)


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def is_claimed(interval: Interval) -> bool:
    return interval.low > 1.0 and interval.estimate >= MIN_SPEEDUP


def repeat(number: int, repetitions: range) -> Result:
    """Some repetitions of a case; each has a seed of its own."""
    result = Result()
    for repetition in repetitions:
        decide(CASES[number], 1_000_003 * number + repetition, result)
    return result


def main() -> None:
    """All cases, a table, and one JSON document."""
    parser = arguments(__doc__)
    parser.add_argument("--reps", type=int, help="of each case; by default 400 of `power_` cases, 2,000 of the others")
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases with one of these in their name")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="print outputs of earlier runs instead")
    options = parser.parse_args()
    started = time.monotonic()
    print(f"{'case':38} {'attempts':>8} {'claimed':>16} {'coverage':>16} {'timed prompts':>15}   (before -> after)")
    if options.merge:
        documents = [json.loads(path.read_text().splitlines()[-1]) for path in options.merge]
        rows = [row for document in documents for row in document["cases"]]
        seconds = sum(document["seconds"] for document in documents)
        for row in rows:
            show(row)
    else:
        with multiprocessing.get_context("fork").Pool(options.processes) as pool:
            rows = [run_case(pool, number, options) for number in selected(options.cases)]
        seconds = round(time.monotonic() - started, 1)
    finish(
        {
            "benchmark": "decision",
            **summary(rows, "after"),
            "before": summary(rows, "before"),
            "cases": rows,
            "seconds": seconds,
        }
    )


def selected(names: Sequence[str]) -> list[int]:
    """The numbers of the cases with one of these in their name."""
    return [number for number, case in enumerate(CASES) if any(name in case.name for name in names)]


def run_case(pool: multiprocessing.pool.Pool, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: the repetitions of a case in chunks, on all processes."""
    case = CASES[number]
    repetitions = options.reps or (400 if case.name.startswith("power_") else 2000)
    starts = range(0, repetitions, CHUNK)
    chunks = [(number, range(start, min(start + CHUNK, repetitions))) for start in starts]
    results = pool.starmap(repeat, chunks, chunksize=1)
    before, after = (
        Tally.of([getattr(result, which) for result in results]).figures(repetitions) for which in ("before", "after")
    )
    row = {"case": case.name, "null": case.is_null, "repetitions": repetitions, "before": before, "after": after}
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    before, after = row["before"], row["after"]
    pairs = [f"{before[name]} -> {after[name]}" for name in ("claimed", "coverage", "timed_prompts")]
    print(f"{row['case']:38} {after['attempts']:8} {pairs[0]:>16} {pairs[1]:>16} {pairs[2]:>15}", flush=True)


def summary(rows: list[dict[str, Any]], which: str) -> dict[str, float]:
    """The figures that are asked for."""
    claims = {row["case"]: row[which]["claimed"] for row in rows}
    coverage = [row[which]["coverage"] for row in rows if row[which]["coverage"] is not None]
    powers = {name: claimed for name, claimed in claims.items() if name.startswith("power_")}
    false_claims = [claims[row["case"]] for row in rows if row["null"]]
    return {
        "false_claims": max(false_claims, default=0.0),
        **powers,
        "coverage_low": min(coverage),
        "coverage_high": max(coverage),
    }


if __name__ == "__main__":
    main()
