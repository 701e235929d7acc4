"""What speculation may cost at worst: the selector on traffic and machines that turn against it, in replay.

    python -m tests.benchmarks.adversarial [--seeds 4] [--traces FOLDER]

Every stream is served under every disturbance for 15,000 rounds at three noise levels: drafts that turn useless when
they are switched to, once they are trusted, or by the clock; spikes of the machine; batches that flip; requests under
the wrong domain. Of plain decoding's time for the same tokens in the same conditions over the time they took:
`least_cumulative` is the least over all prefixes of at least 5,000 rounds, `worst_window` of 5,000 rounds in a row, in
seconds of the machine as it usually is. Then the same with the guarantee switched off, on the first seed.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from profiles.records.core import Prompt
from tests.benchmarks import traffic, world
from tests.benchmarks.adaptive import NOISES, scatter
from tests.benchmarks.common import finish
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
    "useless after 200": traffic.useless_later(200),
    "outages 20 of 40": traffic.outages(40, 20),
    "outages 300 of 600": traffic.outages(600, 300),
    "spikes 2 of 50": traffic.spikes(50, 2, 20.0),
    "spikes 3 of 50": traffic.spikes(50, 3, 20.0),
    "spikes 4 of 50": traffic.spikes(50, 4, 20.0),
    "spikes 5 of 200": traffic.spikes(200, 5, 20.0),
    "spikes 200 of 500": traffic.spikes(500, 200, 3.0),
}


def worst(
    family: Family, case: tuple[str, str], noise: float, *, seeds: range, guarantee: float | None
) -> tuple[float, float, int]:
    """(least prefix over seeds, least window, the fewest rounds of a stream)."""
    stream, disturbance = case
    prefixes, windows, rounds = [], [], []
    for seed in seeds:
        record = family.simulator.serve(
            BUILDERS[stream](family.served, seed),
            Selector(family.policy, seed=seed, guarantee=guarantee),
            seed=seed,
            noise=scatter(noise, seed),
            disturbance=DISTURBANCES[disturbance],
            num_rounds=NUM_ROUNDS,
        )
        prefixes.append(record.worst_prefix(WINDOW))
        windows.append(record.worst_window(WINDOW))
        rounds.append(len(record.rounds))
    return min(prefixes), min(windows), min(rounds)


def main() -> None:
    """Every stream under every disturbance, table, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    world.add_options(parser, seeds=4)
    parser.add_argument("--noises", type=float, nargs="+", default=NOISES)
    parser.add_argument("--streams", nargs="+", choices=sorted(BUILDERS), default=list(BUILDERS))
    options = parser.parse_args()
    document: dict[str, Any] = {
        "benchmark": "adversarial",
        "first_seed": options.first_seed,
        "seeds": options.seeds,
        "window_rounds": WINDOW,
    }
    rounds: list[int] = []
    with world.family(options) as family:
        for guarantee, suffix in ((GUARANTEE, ""), (None, "_no_guarantee")):
            prefixes: dict[str, float] = {}
            windows: dict[str, float] = {}
            for noise in options.noises:
                for case in ((stream, name) for stream in options.streams for name in DISTURBANCES):
                    seeds = range(options.first_seed, options.first_seed + (options.seeds if guarantee else 1))
                    prefix, window, fewest = worst(family, case, noise, seeds=seeds, guarantee=guarantee)
                    key = str(noise)
                    prefixes[key], windows[key] = (
                        min(prefix, prefixes.get(key, prefix)),
                        min(window, windows.get(key, window)),
                    )
                    rounds.append(fewest)
                    mark = f"  under {REQUIRED}" if guarantee and min(prefix, window) < REQUIRED else ""
                    print(
                        f"  {noise:4} {case[0]:12} {case[1]:20} prefix {prefix:6.4f} window {window:6.4f}{mark}"
                        + ("" if guarantee else "  without guarantee"),
                        flush=True,
                    )
            document |= {
                f"least_cumulative{suffix}": round(min(prefixes.values()), 4),
                f"worst_window{suffix}": {noise: round(value, 4) for noise, value in windows.items()},
            }
    finish({**document, "cases": len(options.streams) * len(DISTURBANCES), "fewest_rounds": min(rounds)})


if __name__ == "__main__":
    main()
