"""The selector against the best fixed setup in hindsight, published adaptive rules and an oracle, on shifting traffic.

    python -m tests.benchmarks.adaptive [--seeds 100] [--store FOLDER]

Replay: streams drawn by seed from prompts that the policy was not made from are served by the simulated server, with
noise as the steps had it. The best static setup is the fastest of the whole grid on the very same stream: after the
first seeds only those within 15 % of it are simulated on. A ratio is tokens per second over the best static's; each
figure is the mean over seeds with a 95 % t interval. At batch 1 the oracle runs every request with the setup that is
best for it; in a batch, where rows share one, every phase of the stream with the static setup that is best in it.

Real engine: shorter streams, decoded part by part under the selector, plain decoding and the three fixed setups that
replay finds the best on that very stream, interleaved; the best static is the fastest of these. Keys without `replay_`
are of these runs.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from profiles.engines.base import RoundController
from profiles.records.core import PLAIN, Prompt, Setup
from tests.benchmarks import real, traffic, world
from tests.benchmarks.common import finish
from tests.benchmarks.controllers import Ema, Exp3, Oracle, Table, Ucb
from tests.benchmarks.simulator import Fixed, Record
from tests.benchmarks.traffic import Phase, Stream
from tests.benchmarks.world import Family
from tuner.selector.selector import Selector

SCREENED_SEEDS, SCREENED_SHARE = 5, 0.85
ARM_LENGTHS = (4,)
MOST_OVER_PLAIN = 4.0  # a round's speed-up that counts as reward 1
SHIFT_BATCH = 4  # where drafts differ most by domain; beyond the crossover plain decoding is best in most of them
DOMAINS = ("code", "copy", "prose")
# up and down again; each load lasts about as long as the others, as loads do, so a larger one serves more requests
LOADS = [
    Phase(num_requests=requests, concurrency=size) for size, requests in ((1, 24), (8, 64), (32, 96), (8, 64), (1, 24))
]
BUILDERS: Mapping[str, Callable[[tuple[Prompt, ...], int], Stream]] = {
    "steady": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=90),
    "steady_in_batch": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=240, concurrency=SHIFT_BATCH),
    "domain_shift": lambda prompts, seed: traffic.shifting(
        prompts, seed, domains=DOMAINS * 2, num_requests=48, concurrency=SHIFT_BATCH
    ),
    "domain_shift_alone": lambda prompts, seed: traffic.shifting(prompts, seed, domains=DOMAINS * 2),
    "batch_shift": lambda prompts, seed: traffic.stream_of("batch shift", LOADS, prompts, seed),
}
REAL_BUILDERS: Mapping[str, Callable[[tuple[Prompt, ...], int], Stream]] = {
    "steady": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=48),
    "domain_shift": lambda prompts, seed: traffic.shifting(
        prompts, seed, domains=DOMAINS * 2, num_requests=32, concurrency=SHIFT_BATCH
    ),
    "batch_shift": lambda prompts, seed: traffic.stream_of("batch shift", LOADS, prompts, seed),
}
REAL_STATICS = 3
Rates = dict[str, dict[str, list[float]]]  # stream -> controller -> tokens per second, seed by seed


def controllers_for(family: Family, stream: Stream, seed: int) -> dict[str, RoundController]:
    """What is compared, each fresh."""
    drafts = tuple(dict.fromkeys(setup.draft for setup in family.setups if setup.draft))
    arms = (PLAIN, *(Setup(draft=draft, length=length) for draft in drafts for length in ARM_LENGTHS))
    static = family.look_up(stream.most_rows, None)
    ema = static if static.draft else family.look_up(1, None)
    plain_s = family.simulator.arm(PLAIN).seconds(1, (1, 0, 0))
    arms: dict[str, RoundController] = {
        "selector": Selector(family.policy, seed=seed),
        "plain": Fixed(PLAIN),
        "policy": Table(family.look_up),
        "policy, one setup": Fixed(static),
        "ucb": Ucb(arms, MOST_OVER_PLAIN / plain_s),
        "exp3": Exp3(arms, MOST_OVER_PLAIN / plain_s, seed),
    }
    if ema.draft is not None:
        arms["ema"] = Ema(ema.draft, ema.length)
    return arms


class Replay:
    """Streams replayed seed by seed."""

    def __init__(self, family: Family) -> None:
        self.rates: Rates = defaultdict(lambda: defaultdict(list))
        self.statics: dict[str, dict[Setup, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._family = family

    def play(self, name: str, seed: int) -> None:
        """One stream under every controller and every fixed setup that may be the best."""
        family, rates = self._family, self.rates[name]
        stream = BUILDERS[name](family.served, seed)
        records = {setup: self._serve(stream, Fixed(setup), seed) for setup in self._worth_serving(name)}
        for setup, record in records.items():
            self.statics[name][setup].append(record.tok_per_s)
        rates["best static"].append(max(record.tok_per_s for record in records.values()))
        for controller_name, controller in controllers_for(family, stream, seed).items():
            rates[controller_name].append(self._serve(stream, controller, seed).tok_per_s)
        if stream.most_rows == 1:
            oracle = self._serve(stream, Oracle(self._best_by_request(stream)), seed).tok_per_s
        else:
            oracle = _best_by_phase(list(records.values()))
        rates["oracle"].append(oracle)

    def _serve(self, stream: Stream, controller: RoundController, seed: int) -> Record:
        return self._family.simulator.serve(stream, controller, seed=seed, noise=self._family.noise)

    def _worth_serving(self, name: str) -> list[Setup]:
        """The grid; after the first seeds what was close to the best of it on any of them."""
        seen = self.statics[name]
        if not seen or len(seen[PLAIN]) < SCREENED_SEEDS:
            return list(self._family.setups)
        best = [max(rates[seed] for rates in seen.values()) for seed in range(SCREENED_SEEDS)]
        return [
            setup
            for setup, rates in seen.items()
            if any(rates[seed] >= SCREENED_SHARE * best[seed] for seed in range(SCREENED_SEEDS)) or setup == PLAIN
        ]

    def _best_by_request(self, stream: Stream) -> list[tuple[Setup, int]]:
        """Of every request the setup that takes the least, alone and without noise; and the tokens of its rounds."""
        return [self._family.best_alone(request.prompt) for request in stream.requests]


def _best_by_phase(records: list[Record]) -> float:
    """Tokens per second with the best record's time per token in every phase."""
    sums = []
    for record in records:
        tokens: dict[int, int] = defaultdict(int)
        seconds: dict[int, float] = defaultdict(float)
        for result in record.rounds:
            tokens[result.phase] += result.tokens
            seconds[result.phase] += result.seconds
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


def show(replayed: Replay) -> None:
    """A table for every stream: ratio to the best static and share of the oracle."""
    for stream, rates in replayed.rates.items():
        statics = replayed.statics[stream]
        num_seeds = len(rates["oracle"])
        full = [setup for setup, setup_rates in statics.items() if len(setup_rates) == num_seeds]
        usual = max(full, key=lambda setup: fmean(statics[setup]))
        print(
            f"\n{stream}: {num_seeds} seeds, best static mostly {usual.name}, {fmean(rates['best static']):.1f} tok/s"
        )
        for name in sorted(rates, key=lambda name: -fmean(rates[name])):
            mean, low, high = interval(over(rates, name, "best static"))
            share = fmean(over(rates, name, "oracle"))
            print(f"  {name:18} {mean:6.3f} [{low:.3f}, {high:.3f}] of the best static, {share:.3f} of the oracle")


def document(replayed: Replay) -> dict[str, Any]:
    """The replay's part of the last line."""
    values: dict[str, Any] = {}
    for stream, rates in replayed.rates.items():
        values |= figures(f"replay_{stream}_ratio", over(rates, "selector", "best static"))
        values |= figures(f"replay_{stream}_oracle_share", over(rates, "selector", "oracle"))
        values[f"replay_{stream}_baselines"] = {
            name: round(fmean(over(rates, name, "best static")), 4)
            for name in rates
            if name not in ("selector", "best static")
        }
    steady = replayed.rates.get("steady")
    return values | (figures("replay_oracle_share", over(steady, "selector", "oracle")) if steady else {})


def run_real(family: Family, num_seeds: int) -> dict[str, Any]:
    """The selector, plain decoding, the best static setups by replay and at batch 1 the oracle, on the real engine."""
    values: dict[str, Any] = {}
    for name, build in REAL_BUILDERS.items():
        ran: dict[str, list[float]] = defaultdict(list)
        for seed in range(num_seeds):
            stream = build(family.served, seed)
            serve = family.simulator.serve
            statics = sorted(family.setups, key=lambda setup: -serve(stream, Fixed(setup)).tok_per_s)
            arms: dict[str, RoundController] = {setup.name: Fixed(setup) for setup in (*statics[:REAL_STATICS], PLAIN)}
            arms["selector"] = Selector(family.policy, seed=seed)
            if stream.most_rows == 1:
                arms["oracle"] = real.oracle(family, stream)
            rates = real.rates(family, stream, arms, seed)
            best = max((arm for arm in rates if arm not in ("selector", "oracle")), key=lambda arm: rates[arm])
            shown = ", ".join(f"{arm} {rates[arm]:.1f}" for arm in sorted(rates, key=lambda arm: -rates[arm]))
            print(f"real {name}, seed {seed}, tok/s: {shown}", flush=True)
            ran["selector"].append(rates["selector"])
            ran["best static"].append(rates[best])
            if "oracle" in rates:
                ran["oracle"].append(rates["oracle"])
        values |= figures(f"{name}_ratio", over(ran, "selector", "best static"))
        if "oracle" in ran:
            values |= figures("oracle_share", over(ran, "selector", "oracle"))
    return values


def main() -> None:
    """Replay, real runs, tables, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    world.add_options(parser)
    parser.add_argument("--real-seeds", type=int, default=3, help="on the real engine; 0: replay only")
    parser.add_argument("--streams", nargs="+", choices=sorted(BUILDERS), default=list(BUILDERS), help="of the replay")
    options = parser.parse_args()
    with world.family(options) as family:
        replayed = Replay(family)
        for name in options.streams:
            for seed in range(options.seeds):
                replayed.play(name, seed)
        show(replayed)
        ran = run_real(family, options.real_seeds) if options.real_seeds else {}
        seeds = {"replay_seeds": options.seeds, "real_seeds": options.real_seeds}
        finish({"benchmark": "adaptive", **seeds, **document(replayed), **ran})


if __name__ == "__main__":
    main()
