"""What speculation may cost at worst: the selector on traffic and machines that turn against it, in replay.

    python -m tests.benchmarks.adversarial [--seeds 4] [--traces FOLDER]

Every stream is served under every disturbance for 15,000 rounds at three noise levels: drafts that turn useless when
they are switched to, once they are trusted, or by the clock; spikes of the machine; batches that flip; requests under
the wrong domain. Of plain decoding's time for the same tokens in the same conditions over the time they took:
`least_cumulative` is the least over all prefixes of at least 5,000 rounds, `worst_window` of 5,000 rounds in a row, in
seconds of the machine as it usually is. Then the same with the guarantee switched off, on the first seed:
`guarantee_cost` is the mean over cases of how much faster that is. With `--delay` reports come so many rounds late and
without what rows waited for prefills, as engines report.
"""

from collections.abc import Callable, Mapping
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from profiles.records.core import Prompt
from tests.benchmarks import traffic, world
from tests.benchmarks.adaptive import NOISES, scatter
from tests.benchmarks.common import arguments, finish
from tests.benchmarks.traffic import Disturbance, Phase, Stream
from tests.benchmarks.world import Family
from tuner.selector.selector import GUARANTEE, WINDOW, Selector

NUM_ROUNDS = 15_000
REQUIRED = 0.98
BATCH = 8
BUILDERS: Mapping[str, Callable[[tuple[Prompt, ...], int], Stream]] = {
    "steady": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=120),
    "mislabelled": lambda prompts, seed: traffic.mislabelled(traffic.steady(prompts, seed, num_requests=120)),
    "one domain": lambda prompts, seed: traffic.stream_of(
        "one domain", [Phase(num_requests=120, domains=("prose",))], prompts, seed
    ),
    "in batch": lambda prompts, seed: traffic.steady(prompts, seed, num_requests=400, concurrency=BATCH),
    "flipping": lambda prompts, seed: traffic.flipping(prompts, seed, batch=BATCH, num_flips=80),
    "bursty": lambda prompts, seed: traffic.bursty(prompts, seed, batches=world.BATCHES, num_bursts=30),
    "batch shift": lambda prompts, seed: traffic.batch_shift(prompts, seed, batches=world.BATCHES, turns=10),
}
DISTURBANCES: Mapping[str, Disturbance] = {
    "calm": Disturbance(),
    "useless at first 4": traffic.useless_at_first(4),
    "useless at first 64": traffic.useless_at_first(64),
    "useless for ever": traffic.useless_at_first(10**9),
    "useless after 24": traffic.useless_later(24),
    "outages 20 of 40": traffic.outages(40, 20),
    "outages 300 of 600": traffic.outages(600, 300),
    "spikes 2 of 50": traffic.spikes(50, 2, 20.0),
    "spikes 4 of 50": traffic.spikes(50, 4, 20.0),
    "spikes 200 of 500": traffic.spikes(500, 200, 3.0),
}


class Served(NamedTuple):
    """A case: a stream under a disturbance at a noise, by seed, with or without the guarantee."""

    noise: float
    stream: str
    disturbance: str
    seed: int
    guarantee: float | None


class Result(NamedTuple):
    """Over plain decoding: the least prefix, the least window, the whole."""

    prefix: float
    window: float
    mean: float
    num_rounds: int


def serve(family: Family, case: Served, delay: int) -> Result:
    record = family.simulator.serve(
        BUILDERS[case.stream](family.served, case.seed),
        Selector(family.policy, seed=case.seed, guarantee=case.guarantee),
        seed=case.seed,
        noise=scatter(case.noise, case.seed),
        disturbance=DISTURBANCES[case.disturbance],
        num_rounds=NUM_ROUNDS,
        delay=delay,
    )
    return Result(record.worst_prefix(WINDOW), record.worst_window(WINDOW), record.over_plain, len(record.rounds))


def least(results: Mapping[Served, Result], suffix: str) -> dict[str, Any]:
    """The figures over all cases, and by noise."""
    by_noise: dict[str, list[Result]] = {}
    for case, result in results.items():
        by_noise.setdefault(str(case.noise), []).append(result)
    rows = {noise: Result(*map(min, zip(*served, strict=True))) for noise, served in by_noise.items()}
    return {
        f"least_cumulative{suffix}": round(min(row.prefix for row in rows.values()), 4),
        f"least_cumulative_by_noise{suffix}": {noise: round(row.prefix, 4) for noise, row in rows.items()},
        f"worst_window{suffix}": {noise: round(row.window, 4) for noise, row in rows.items()},
    }


def main() -> None:
    """Every stream under every disturbance, table, JSON."""
    parser = arguments(__doc__)
    world.add_options(parser, seeds=4)
    parser.add_argument("--noises", type=float, nargs="+", default=NOISES)
    parser.add_argument("--streams", nargs="+", choices=sorted(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--delay", type=int, default=0, help="rounds by which reports are late")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cases = [
        Served(noise, stream, name, seed, guarantee)
        for stream, name, noise in product(options.streams, DISTURBANCES, options.noises)
        for seed, guarantee in (*((seed, GUARANTEE) for seed in seeds), (seeds[0], None))
    ]
    results: dict[Served, Result] = {}
    with world.family(options) as family:
        for case, result in world.spread(family, options.processes, serve, cases, options.delay):
            results[case] = result
            mark = f"  under {REQUIRED}" if case.guarantee and min(result[:2]) < REQUIRED else ""
            print(
                f"  {case.noise:4} {case.stream:12} {case.disturbance:20} {case.seed} prefix {result.prefix:6.4f}"
                f" window {result.window:6.4f} mean {result.mean:6.4f}{mark}"
                + ("" if case.guarantee else "  without guarantee"),
                flush=True,
            )
    free = {case: result for case, result in results.items() if not case.guarantee}
    bound = {case: result for case, result in results.items() if case.guarantee}
    costs = [result.mean / bound[case._replace(guarantee=GUARANTEE)].mean - 1.0 for case, result in free.items()]
    finish(
        {
            "benchmark": "adversarial",
            "first_seed": options.first_seed,
            "seeds": options.seeds,
            "window_rounds": WINDOW,
            "delay": options.delay,
            **least(bound, ""),
            **least(free, "_no_guarantee"),
            "guarantee_cost": round(fmean(costs), 4),
            "under": sum(min(result[:2]) < REQUIRED for result in bound.values()),
            "cases": len(options.streams) * len(DISTURBANCES),
            "fewest_rounds": min(result.num_rounds for result in results.values()),
        }
    )


if __name__ == "__main__":
    main()
