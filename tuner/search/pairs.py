"""Paired runs: plain decoding and a setup on the same prompts, back to back in a random order."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.evidence import Sample
from profiles.records.keys import queue_digest
from tuner.policy.estimates import Objective

Queue = tuple[Prompt, ...]


class Pair(NamedTuple):
    """Two runs of one prompt: plain decoding, and the setup that is compared with it."""

    plain: Sample
    chosen: Sample


def pair_order(workload: Workload, queue: Queue, setup: Setup) -> tuple[Setup, Setup]:
    """Plain decoding and the setup in an order drawn from seed, prompts and setup: random, but a rerun repeats it."""
    is_plain_first = random.Random(f"{workload.seed}/{_digest(queue)}/{setup.digest}").random() < 0.5
    return (PLAIN, setup) if is_plain_first else (setup, PLAIN)


def run_pairs(engine: Engine, workload: Workload, queue: Queue, setup: Setup, purpose: str) -> list[Pair]:
    """A pair for every prompt of a queue; the setup is not plain decoding itself."""
    order = pair_order(workload, queue, setup)
    samples = engine.run_together(workload, queue, order, purpose)
    runs = {arm: samples[at * len(queue) : (at + 1) * len(queue)] for at, arm in enumerate(order)}
    return [Pair(*pair) for pair in zip(runs[PLAIN], runs[setup], strict=True)]


def run_beside(
    engine: Engine, workload: Workload, queue: Queue, setups: Sequence[Setup], purpose: str
) -> dict[Setup, list[Pair]]:
    """Pairs of several setups, which share their plain run, in an order drawn from seed, prompts and setups."""
    arms = (PLAIN, *setups)
    drawn = random.Random("/".join([str(workload.seed), _digest(queue), *(setup.digest for setup in setups)]))
    order = drawn.sample(range(len(arms)), len(arms))
    samples = engine.run_together(workload, queue, tuple(arms[number] for number in order), purpose)
    runs = {number: samples[at * len(queue) : (at + 1) * len(queue)] for at, number in enumerate(order)}
    return {
        setup: [Pair(*pair) for pair in zip(runs[0], runs[number], strict=True)]
        for number, setup in enumerate(setups, 1)
    }


def _digest(queue: Queue) -> str:
    return queue_digest([prompt.digest for prompt in queue])


def timed_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with a time per token: runs of one token have none."""
    return [pair for pair in pairs if min(sample.output_tokens for sample in pair) > 1]


def columns(
    pairs: Sequence[Pair], objective: Objective = "tpot"
) -> tuple[list[float], list[int], list[float], list[int]]:
    """Seconds and tokens of plain decoding, then of the setup, as `profiles.stats.speedup_interval` takes them.

    Decode seconds and tokens after the first; for throughput request seconds and all tokens.
    """
    plain, chosen = [pair.plain for pair in pairs], [pair.chosen for pair in pairs]
    return (*_seconds_and_tokens(plain, objective), *_seconds_and_tokens(chosen, objective))


def _seconds_and_tokens(samples: Sequence[Sample], objective: Objective) -> tuple[list[float], list[int]]:
    if objective == "throughput":
        return [each.decode_s + each.ttft_s for each in samples], [each.output_tokens for each in samples]
    return [each.decode_s for each in samples], [each.output_tokens - 1 for each in samples]
