"""What speculation may cost at worst: the selector on traffic and machines that turn against it, in replay.

    python -m tests.benchmarks.adversarial [--seeds 20] [--store FOLDER]

Every stream is served under every disturbance: drafts that turn useless when they are switched to, once they are
trusted, or by the clock; spikes of the machine; batches that flip; requests under the wrong domain. Of every 1,000
rounds in a row, plain decoding's time for the same tokens in the same conditions over the time they took:
`worst_window` is the least over all streams, disturbances and seeds.
"""

import argparse
from collections.abc import Callable, Mapping

from profiles.records.core import Prompt
from tests.benchmarks import traffic, world
from tests.benchmarks.common import finish
from tests.benchmarks.traffic import Disturbance, Phase, Stream
from tests.benchmarks.world import Family
from tuner.selector.selector import Selector

WINDOW = 1000
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
    "spikes 200 of 500": traffic.spikes(500, 200, 3.0),
}


def worst(family: Family, name: str, disturbance: Disturbance, num_seeds: int) -> tuple[float, float, int]:
    """(least window over seeds, least over whole streams, the fewest rounds of a stream)."""
    windows, wholes, rounds = [], [], []
    for seed in range(num_seeds):
        record = family.simulator.serve(
            BUILDERS[name](family.served, seed),
            Selector(family.policy, seed=seed),
            seed=seed,
            noise=family.noise,
            disturbance=disturbance,
        )
        windows.append(record.worst_window(WINDOW))
        wholes.append(record.over_plain)
        rounds.append(len(record.rounds))
    return min(windows), min(wholes), min(rounds)


def main() -> None:
    """Every stream under every disturbance, table, JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    world.add_options(parser)
    options = parser.parse_args()
    with world.family(options) as family:
        least: dict[str, float] = {}
        print(
            f"least plain seconds over seconds, {options.seeds} seeds: of {WINDOW} rounds in a row, of a whole stream"
        )
        for stream in BUILDERS:
            for name, disturbance in DISTURBANCES.items():
                window, whole, num_rounds = worst(family, stream, disturbance, options.seeds)
                least[stream] = min(window, least.get(stream, window))
                mark = "" if window >= REQUIRED else f"  under {REQUIRED}"
                print(f"  {stream:12} {name:20} {window:6.4f} {whole:6.4f} ({num_rounds} rounds){mark}", flush=True)
        finish(
            {
                "benchmark": "adversarial",
                "seeds": options.seeds,
                "window_rounds": WINDOW,
                "asked": REQUIRED,
                "worst_window": round(min(least.values()), 4),
                **{f"worst_window_{stream.replace(' ', '_')}": round(ratio, 4) for stream, ratio in least.items()},
            }
        )


if __name__ == "__main__":
    main()
