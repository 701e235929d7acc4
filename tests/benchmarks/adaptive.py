"""The selector against the best fixed setup in hindsight, look-ups, simple rules and an oracle.

    python -m tests.benchmarks.adaptive [--seeds 50] [--real-seeds 3] [--traces FOLDER]
    python -m tests.benchmarks.adaptive --store STORE

Replay: streams drawn by seed from prompts that the policy was not made from are served by the simulated server, at
stated prices (`world.StatedPrices`), with rounds that scatter log-normally. A ratio is tokens per second over the best
static's: the fastest setup of the whole grid on the very same stream. Seconds are those of the machine as it usually
is: noise disturbs what controllers see. Each figure is the mean over seeds with a 95 % t interval. `lookup` learns
nothing; `simple` is `controllers.Simple`. At batch 1 the oracle runs every request with the setup that is best for it;
in a batch every phase of the stream with the static setup that is best in it.

Real engine: shorter streams, decoded part by part under the selector, the look-up, plain decoding and the fixed setups
that replay finds the best, interleaved, with times measured here; the best static is the fastest of these.

With a store: the policy and traces of a `make tune`, its prompts in their order and shuffled, at its own round times.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from profiles.engines.base import RoundController
from profiles.records.core import PLAIN, Prompt, Setup
from tests.benchmarks import traffic, world
from tests.benchmarks.common import arguments, finish
from tests.benchmarks.controllers import Fixed, Oracle, Simple
from tests.benchmarks.simulator import Record
from tests.benchmarks.traffic import Disturbance, Phase, Request, Stream
from tests.benchmarks.world import Family
from tuner.selector.selector import Selector

NOISES = (0.03, 0.06, 0.17)
SCREENED_SEEDS, SCREENED_SHARE = 3, 0.9
LONG_SEEDS = 10  # of streams of 10,000 rounds
DRIFT_ROUNDS, DRIFT_SHARE = 10_000, 0.2
SHIFT_BATCH = 4  # where drafts differ most by domain; beyond the crossover plain decoding is best in most of them
DOMAINS = ("code", "copy", "prose")
# up and down again; each load lasts about as long as the others, as loads do, so a larger one serves more requests
LOADS = [
    Phase(num_requests=requests, concurrency=size) for size, requests in ((1, 24), (8, 64), (32, 96), (8, 64), (1, 24))
]
Builder = Callable[[tuple[Prompt, ...], int], Stream]
BUILDERS: Mapping[str, Builder] = {
    "steady": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=90),
    "steady_in_batch": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=240, concurrency=SHIFT_BATCH),
    "domain_shift": lambda prompts, seed: traffic.shifting(
        prompts, seed, domains=DOMAINS * 2, num_requests=48, concurrency=SHIFT_BATCH
    ),
    "domain_shift_alone": lambda prompts, seed: traffic.shifting(prompts, seed, domains=DOMAINS * 2),
    "batch_shift": lambda prompts, seed: traffic.stream_of("batch shift", LOADS, prompts, seed),
    "long": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=600),
    "bursts": lambda prompts, seed: traffic.bursty(prompts, seed, batches=world.BATCHES[:3], num_bursts=30),
}
REAL_BUILDERS: Mapping[str, Builder] = {
    "steady": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=48),
    "domain_shift": lambda prompts, seed: traffic.shifting(
        prompts, seed, domains=DOMAINS * 2, num_requests=32, concurrency=SHIFT_BATCH
    ),
    "batch_shift": BUILDERS["batch_shift"],
}
REAL_STATICS = 3
PART_REQUESTS = 12  # of a long phase at batch 1, on the real engine
Rates = dict[str, list[float]]  # controller -> tokens per second, seed by seed
AllRates = dict[tuple[str, float], Rates]  # by case and noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A stream of `BUILDERS`, what is told of it and goes wrong; `wrong` names a policy of `world.wrong_policies`."""

    stream: str
    labelled: bool = True
    wrong: str | None = None
    disturbance: Disturbance | None = None


RIGHT = ("steady", "steady_in_batch", "domain_shift", "domain_shift_alone", "batch_shift")
WRONG = ("acceptance_too_good", "late_positions_too_good", "labels_permuted", "times_under_load", "cliff")
CASES: Mapping[str, Case] = {
    **{name: Case(stream=name) for name in RIGHT},
    **{f"unlabelled_{name}": Case(stream=name, labelled=False) for name in RIGHT},
    **{name: Case(stream="steady", wrong=name) for name in WRONG},
    "drift": Case(stream="long", disturbance=traffic.drift(DRIFT_ROUNDS, DRIFT_SHARE)),
    "bursts": Case(stream="bursts"),
    "spikes": Case(stream="steady", disturbance=traffic.spikes(50, 2, 20.0)),
    "outages": Case(stream="steady", disturbance=traffic.outages(600, 300)),
}
COMPARED = ("selector", "lookup", "simple")


@cache
def scatter(std: float, seed: int) -> list[float]:
    """Factors of rounds that scatter log-normally, of mean 1."""
    rng = random.Random(f"{seed} scatter")
    return [rng.lognormvariate(-std * std / 2, std) for _ in range(4096)]


class Replay:
    """Cases replayed seed by seed; a fixed setup and a look-up do not depend on noise, so they are served once."""

    def __init__(self, family: Family) -> None:
        self.rates: AllRates = defaultdict(lambda: defaultdict(list))
        self._family = family
        self._screened: dict[str, list[dict[Setup, float]]] = defaultdict(list)
        self._statics: dict[tuple[str, int], tuple[float, float]] = {}

    def play(self, name: str, seed: int, case: Case, build: Builder, noises: Sequence[float] = NOISES) -> None:
        """One stream under every controller, at every noise."""
        family = self._family
        stream = build(family.served, seed)
        policy = family.policy if case.wrong is None else world.wrong_policies(family, seed)[case.wrong]
        key = case.stream if case.disturbance is None else name
        if (key, seed) not in self._statics:
            self._statics[key, seed] = self._best_static(key, case, stream, seed)
        best, oracle = self._statics[key, seed]
        lookup = self._serve(case, stream, world.lookup_table(policy), seed, 0.06).usual_rate
        for noise in noises:
            rates = self.rates[name, noise]
            learning: dict[str, RoundController] = {"selector": Selector(policy, seed=seed), "simple": Simple(policy)}
            for rule, controller in learning.items():
                rates[rule].append(self._serve(case, stream, controller, seed, noise).usual_rate / best)
            rates["lookup"].append(lookup / best)
            if oracle:
                rates["oracle"].append(oracle / best)

    def _serve(self, case: Case, stream: Stream, controller: RoundController, seed: int, noise: float) -> Record:
        return self._family.simulator.serve(
            stream,
            controller,
            seed=seed,
            noise=scatter(noise, seed),
            disturbance=case.disturbance,
            labelled=case.labelled,
        )

    def _best_static(self, key: str, case: Case, stream: Stream, seed: int) -> tuple[float, float]:
        """Tokens per second of the best fixed setup, and of the oracle (0: none)."""
        family = self._family
        if stream.most_rows == 1 and case.disturbance is None:
            alone = [family.alone(request.prompt) for request in stream.requests]
            tokens = sum(family.output_tokens(request.prompt) for request in stream.requests)
            best_s = min(sum(seconds[setup] for seconds in alone) for setup in family.setups)
            return tokens / best_s, tokens / sum(min(seconds.values()) for seconds in alone)
        seen = self._screened[key]
        worth = [setup for setup in family.setups if setup == PLAIN or self._may_be_best(seen, setup)]
        records = {setup: self._serve(case, stream, Fixed(setup), seed, 0.0) for setup in worth}
        rates = {setup: record.usual_rate for setup, record in records.items()}
        if len(seen) < SCREENED_SEEDS:
            seen.append(rates)
        return max(rates.values()), 0.0 if case.disturbance else _best_by_phase(list(records.values()))

    @staticmethod
    def _may_be_best(seen: list[dict[Setup, float]], setup: Setup) -> bool:
        """Whether a setup was close to the best on any of the first streams."""
        near = [rates[setup] >= SCREENED_SHARE * max(rates.values()) for rates in seen if setup in rates]
        return not near or any(near)


def replay(family: Family, seeds: range, names: tuple[str, ...], first_seed: int) -> AllRates:
    """What controllers reach on cases of these names."""
    played = Replay(family)
    for seed in seeds:
        for name in names:
            if CASES[name].stream != "long" or seed - first_seed < LONG_SEEDS:
                played.play(name, seed, CASES[name], BUILDERS[CASES[name].stream])
        print(f"seed {seed}", flush=True)
    return {key: dict(rates) for key, rates in played.rates.items()}


def _best_by_phase(records: list[Record]) -> float:
    """Tokens per second with the best record's time per token in every phase."""
    sums = []
    for record in records:
        tokens: dict[int, int] = defaultdict(int)
        seconds: dict[int, float] = defaultdict(float)
        for result in record.rounds:
            tokens[result.phase] += result.tokens
            seconds[result.phase] += result.seconds / result.slowed
        sums.append((tokens, seconds))
    tokens = sums[0][0]
    return sum(tokens.values()) / sum(
        tokens[phase] * min(seconds[phase] / phase_tokens[phase] for phase_tokens, seconds in sums) for phase in tokens
    )


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval."""
    mean = fmean(values)
    reach = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean, mean - reach, mean + reach


def figures(key: str, values: list[float]) -> dict[str, float]:
    """Three keys of the document."""
    mean, low, high = interval(values)
    return {key: round(mean, 4), f"{key}_low": round(low, 4), f"{key}_high": round(high, 4)}


def over(rates: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """Seed by seed, one controller's rate over another's."""
    return [rate / base_rate for rate, base_rate in zip(rates[name], rates[base], strict=True)]


def show(name: str, noise: float, rates: Rates) -> None:
    """Ratios to the best static and shares of the oracle."""
    print(f"\n{name}, noise {noise}: {len(rates['selector'])} seeds, over the best static (share of the oracle)")
    for rule in sorted(rates, key=lambda rule: -fmean(rates[rule])):
        mean, low, high = interval(rates[rule])
        share = f" ({mean / fmean(rates['oracle']):.3f})" if "oracle" in rates else ""
        print(f"  {rule:9} {mean:6.3f} [{low:.3f}, {high:.3f}]{share}", flush=True)


def document(rates: Mapping[tuple[str, float], Rates]) -> dict[str, Any]:
    """The replay's part of the last line."""
    played = list(dict.fromkeys(name for name, _ in rates))
    values: dict[str, Any] = {"streams": {}}
    for name, noise in rates:
        rows = {rule: [round(value, 4) for value in interval(rates[name, noise][rule])] for rule in COMPARED}
        if "oracle" in rates[name, noise]:
            rows["oracle_share"] = [round(fmean(over(rates[name, noise], "selector", "oracle")), 4)]
        values["streams"].setdefault(name, {})[str(noise)] = rows
    for key, name in (
        ("unlabelled_steady", "unlabelled_steady"),
        ("unlabelled_shift", "unlabelled_domain_shift_alone"),
    ):
        if name in played:
            values |= figures(f"{key}_ratio", rates[name, 0.06]["selector"])
            values[f"{key}_oracle_share"] = round(fmean(over(rates[name, 0.06], "selector", "oracle")), 4)
    for name in ("steady", "domain_shift", "batch_shift"):
        if name in played:
            values |= figures(f"replay_{name}_ratio", rates[name, 0.06]["selector"])
    over_lookup = {
        (name, noise): fmean(over(rates[name, noise], "selector", "lookup"))
        for name in played
        for noise in NOISES[:2]
        if CASES[name].disturbance is None and name != "bursts"
    }
    wrong = [ratio for (name, _), ratio in over_lookup.items() if name in WRONG]
    right = [ratio for (name, _), ratio in over_lookup.items() if name not in WRONG]
    if wrong:
        values |= {"wrong_evidence_over_lookup": round(fmean(wrong), 4), "wrong_evidence_least": round(min(wrong), 4)}
    if right:
        values["least_over_lookup"] = round(min(right), 4)
    for (name, noise), ratio in over_lookup.items():
        print(f"  {name:30} noise {noise}: selector over look-up {ratio:.4f}")
    return values


def parts(stream: Stream) -> Iterator[list[Request]]:
    """Requests of one phase, a dozen or four full batches at a time."""
    for _, phase in groupby(stream.requests, key=lambda request: request.phase):
        together = list(phase)
        size = max(PART_REQUESTS, 4 * together[0].concurrency)
        for first in range(0, len(together), size):
            yield together[first : first + size]


def real_rates(family: Family, stream: Stream, arms: Mapping[str, RoundController], seed: int) -> dict[str, float]:
    """Tokens per second of every arm over the stream, without prefills; what drifts on the machine meets all alike."""
    order = random.Random(f"{seed} {stream.name}")
    tokens, seconds = dict.fromkeys(arms, 0), dict.fromkeys(arms, 0.0)
    for requests in parts(stream):
        workload = replace(family.workload, batch_size=requests[0].concurrency)
        prompts = tuple(request.prompt for request in requests)
        for name in order.sample(list(arms), len(arms)):
            run = family.bench.engine.run_adaptive(workload, prompts, arms[name], max(world.LENGTHS))
            tokens[name] += sum(each.tokens for each in run.rounds)
            seconds[name] += sum(each.seconds for each in run.rounds)
    return {name: tokens[name] / seconds[name] for name in arms}


def run_real(family: Family, seeds: range) -> dict[str, Any]:
    """The selector, the look-up, plain decoding, the best static setups by replay, the oracle: on the real engine."""
    values: dict[str, Any] = {}
    for name, build in REAL_BUILDERS.items():
        ran: dict[str, list[float]] = defaultdict(list)
        for seed in seeds:
            stream = build(family.served, seed)
            serve = family.simulator.serve
            statics = sorted(family.setups, key=lambda setup: -serve(stream, Fixed(setup)).tok_per_s)
            arms: dict[str, RoundController] = {setup.name: Fixed(setup) for setup in (*statics[:REAL_STATICS], PLAIN)}
            arms["selector"] = Selector(family.policy, seed=seed)
            arms["lookup"] = world.lookup_table(family.policy)
            if stream.most_rows == 1:
                arms["oracle"] = Oracle([family.best_alone(request.prompt) for request in stream.requests])
            rates = real_rates(family, stream, arms, seed)
            best = max(
                (arm for arm in rates if arm not in ("selector", "lookup", "oracle")), key=lambda arm: rates[arm]
            )
            shown = ", ".join(f"{arm} {rates[arm]:.1f}" for arm in sorted(rates, key=lambda arm: -rates[arm]))
            print(f"real {name}, seed {seed}, tok/s: {shown}", flush=True)
            for arm in ("selector", "lookup", "oracle"):
                if arm in rates:
                    ran[arm].append(rates[arm])
            ran["best static"].append(rates[best])
        values |= figures(f"{name}_ratio", over(ran, "selector", "best static"))
        values |= figures(f"{name}_lookup_ratio", over(ran, "lookup", "best static"))
        if "oracle" in ran:
            values |= figures("oracle_share", over(ran, "selector", "oracle"))
    return values


def replay_store(store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The evidence of a `make tune`: its prompts domain by domain in their order, and shuffled."""
    values: dict[str, Any] = {}
    builders: Mapping[str, Builder] = {
        "in_order": lambda prompts, seed: traffic.shifting(
            prompts, seed, domains=DOMAINS, num_requests=len(prompts) // len(DOMAINS)
        ),
        "shuffled": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=len(prompts)),
    }
    with world.tuned_family(options, store) as family:
        played = Replay(family)
        for (name, build), labelled in product(builders.items(), (True, False)):
            key = name if labelled else f"unlabelled_{name}"
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                played.play(key, seed, Case(stream=name, labelled=labelled), build, noises=(0.06,))
            rates = played.rates[key, 0.06]
            show(f"store, {key}", 0.06, rates)
            values |= figures(f"store_{key}_ratio", rates["selector"])
    return values


def main() -> None:
    """Replay, real runs, tables, JSON."""
    parser = arguments(__doc__)
    world.add_options(parser, seeds=50)
    parser.add_argument("--store", type=Path, help="folder of a `make tune`: replay its policy and evidence only")
    parser.add_argument("--real-seeds", type=int, default=3, help="on the real engine; 0: replay only")
    parser.add_argument("--streams", nargs="*", choices=sorted(CASES), default=list(CASES), help="of the replay")
    options = parser.parse_args()
    first = options.first_seed
    seeds = range(first, first + options.seeds)
    if options.store:
        finish({"benchmark": "adaptive", "replay_seeds": options.seeds, **replay_store(options.store, options)})
        return
    values: dict[str, Any] = {}
    if options.streams:
        with world.family(options) as family:
            size = -(-len(seeds) // options.processes)
            chunks = [seeds[at : at + size] for at in range(0, len(seeds), size)]
            rates: AllRates = defaultdict(lambda: defaultdict(list))
            for _, played in world.spread(family, options.processes, replay, chunks, tuple(options.streams), first):
                for key, of_chunk in played.items():
                    for rule, values_of_rule in of_chunk.items():
                        rates[key][rule] += values_of_rule
        for (name, noise), of_case in rates.items():
            show(name, noise, of_case)
        values |= document(rates)
    if options.real_seeds:
        with world.family(options, measured=True) as family:
            values |= run_real(family, range(first, first + options.real_seeds))
    finish(
        {
            "benchmark": "adaptive",
            "first_seed": first,
            "replay_seeds": options.seeds,
            "real_seeds": options.real_seeds,
            **values,
        }
    )


if __name__ == "__main__":
    main()
