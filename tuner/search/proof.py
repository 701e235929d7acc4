"""Proves a winner: paired runs, a confidence interval, and Holm's step-down over all operating points.

`speedup` is plain seconds per output token over the setup's, decoding only; the end-to-end ratio includes prefill.
A proof is looked at several times while it grows (`sequential`), and forecasts of prompts that are not timed yet make
it more precise (`profiles.stats.assisted_log_ratio`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy
from scipy.special import ndtr, stdtrit

from profiles.records.core import Setup
from profiles.stats import (
    Linearised,
    LogRatio,
    assisted_log_ratio,
    holm,
    log_ratio,
    rate_interval,
    regression_slope,
    two_way_log_ratio,
)
from tuner.policy.estimates import Measured, Objective
from tuner.search import sequential
from tuner.search.objective import MIN_SPEEDUP
from tuner.search.pairs import Pair, columns, timed_pairs
from tuner.search.sequential import Look

LEVEL = 0.05  # two-sided, of all operating points together
POWER = 0.8  # with which the smallest detectable speed-up is detected
LOOKS = (24, 48)  # timed prompts before the last look, which is at all of them
QUEUE_LOOKS = (6, 12)  # the same in batches: queues
SHARE_LEFT = 0.05  # of an operating point's level, at least, for setups after the one that is proven first
MIN_GROWTH = 1.25  # of a look, else it is left out
MIN_PROOF_PROMPTS = 8
MIN_RUNNER_UP_PROMPTS = 24  # of the proof: t intervals of fewer cover too seldom at the small levels that are left
MIN_QUEUES = 4
MAX_DISTURBED = 0.1  # share of the pairs


Seconds: TypeAlias = Mapping[Objective, Mapping[str, tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasts:
    """What plain decoding and the setup should take on prompts that had no part in the choice.

    `seconds` by objective and prompt digest: (plain decoding, setup). `weights`: how far they are trusted, from 0 to 1.
    """

    seconds: Seconds
    weights: Mapping[Objective, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What a proof rests on besides its runs.

    Args:
        setup: what is compared with plain decoding.
        greedy: outputs must be equal, so those that differ are counted.
        queue_size: so many pairs in a row are run as one queue.
        domains: by prompt digest; what differs between domains is no uncertainty, because their shares are fixed.
        objective: which of the two speed-ups the p-value is of.
        forecasts: of all prompts of the proof; None for a proof by its runs alone.
        num_pairs: pairs at the last look; None: the first look is the only one.
        share: of the operating point's level, that this setup may spend.
    """

    setup: Setup
    greedy: bool
    queue_size: int = 1
    domains: Mapping[str, str] | None = None
    objective: Objective = "tpot"
    forecasts: Forecasts | None = None
    num_pairs: int | None = None
    share: float = 1.0


def look_sizes(num_units: int, looks: Sequence[int]) -> tuple[int, ...]:
    """How many of the units (prompts, or queues in a batch) are timed at each look; the last is at all of them."""
    return (*(size for size in looks if size * MIN_GROWTH <= num_units), num_units)


def measure(
    design: Design, pairs: Sequence[Pair], earlier: Sequence[Look] = (), *, level: float = LEVEL
) -> tuple[Measured, tuple[Look, ...]]:
    """Speed-ups and rates of a setup from all pairs so far, and the looks with this one.

    Decoding is compared on the pairs with a time per token, end to end on all. In a batch disturbed queues are left out
    where at least four others remain. The interval and p-value of the objective hold for all looks together.

    Args:
        level: Holm's level of the operating point, two-sided.

    Raises:
        InputError: see `missing_runs`.
    """
    is_last = design.num_pairs is None or len(pairs) >= design.num_pairs
    pairs = _without_disturbed_queues(pairs, design.queue_size)
    intervals, looks = {}, tuple(earlier)
    objectives: tuple[Objective, ...] = ("tpot", "throughput")
    for objective in objectives:
        ratio, predicted = _compare(design, pairs, objective)
        intervals[objective] = ratio.interval()
        if objective == design.objective:
            looks = (*earlier, sequential.next_look(ratio, predicted, earlier, is_last=is_last))
            intervals[objective] = sequential.interval(looks, level * design.share)
    timed = timed_pairs(pairs)
    prompts = _prompt_numbers(timed, design.queue_size)
    plain_s, plain_tokens, chosen_s, chosen_tokens = (
        numpy.bincount(prompts, weights=column).tolist() for column in columns(timed)
    )
    measured = Measured(
        setup=design.setup,
        speedup=intervals["tpot"],
        end_to_end=intervals["throughput"],
        plain_tok_per_s=rate_interval(plain_s, plain_tokens),
        tok_per_s=rate_interval(chosen_s, chosen_tokens),
        p_value=min(1.0, looks[-1].p_value / design.share),
        num_prompts=len(set(prompts)),
        num_divergences=sum(p.plain.output_digest != p.chosen.output_digest for p in pairs) if design.greedy else 0,
        num_disturbed=len({number for number, pair in zip(prompts, timed, strict=True) if _is_disturbed(pair)}),
        num_forecast_prompts=len(design.forecasts.seconds[design.objective]) if design.forecasts else None,
        detectable_speedup=detectable_speedup(looks[-1], level * design.share),
    )
    return measured, looks


def detectable_speedup(look: Look, level: float) -> float:
    """The gain that the last look claims in 80 % of the cases at this two-sided level (minimum detectable effect)."""
    error, freedom = look.ratio.error * math.sqrt(look.fraction), look.ratio.freedom
    beyond_bar = float(stdtrit(freedom, POWER)) * error
    return math.exp(max(float(stdtrit(freedom, 1.0 - level / 2.0)) * error, math.log(MIN_SPEEDUP)) + beyond_bar)


def weights(race_pairs: Sequence[Pair], seconds: Seconds, domains: Mapping[str, str]) -> dict[Objective, float]:
    """How far forecasts are trusted, from the race's pairs: a poor forecast gets weight 0 and costs nothing.

    Args:
        seconds: forecasts of the race's prompts, as in `Forecasts`.
    """
    result: dict[Objective, float] = {}
    for objective, forecasts in seconds.items():
        compared = _compared(race_pairs, objective)
        digests = [pair.plain.prompt_digest for pair in compared]
        result[objective] = 0.0
        if len(digests) > 2 and forecasts.keys() >= set(digests):
            plain_s, chosen_s = zip(*(forecasts[digest] for digest in digests), strict=True)
            result[objective] = regression_slope(
                _linearised(compared, objective).terms,
                Linearised.of([plain_s], [chosen_s]).terms,
                [domains[digest] for digest in digests],
            )
    return result


def race_ratio(
    race_pairs: Sequence[Pair], seconds: Seconds | None, domains: Mapping[str, str], objective: Objective
) -> LogRatio:
    """The log speed-up in a race, over all prompts that have forecasts, of which a few were raced. It only selects."""
    compared = _compared(race_pairs, objective)
    assisted = None
    if seconds is not None:
        forecasts = Forecasts(seconds=seconds, weights=weights(race_pairs, seconds, domains))
        assisted = _assisted(compared, objective, forecasts, domains)
    return assisted or log_ratio(_linearised(compared, objective))


def is_worth_proving(raced: LogRatio) -> bool:
    """Whether the speed-up in a race reaches, within a standard error, the smallest that is claimed."""
    return raced.value + raced.error >= math.log(MIN_SPEEDUP)


def share_of_level(ratios: Mapping[Setup, LogRatio], setup: Setup, runner_up: Setup | None) -> float:
    """The share of a level that a setup may spend before its runner-up: the chance that it is the faster of the two.

    By the race, which has no prompt of the proof: so the shares are weights that are fixed before the proof.
    """
    chance = 1.0
    if runner_up is not None:
        error = math.hypot(ratios[setup].error, ratios[runner_up].error)
        chance = float(ndtr((ratios[setup].value - ratios[runner_up].value) / error)) if error > 0.0 else 1.0
    return min(1.0 - SHARE_LEFT, max(0.5, chance))


def _compared(pairs: Sequence[Pair], objective: Objective) -> Sequence[Pair]:
    return timed_pairs(pairs) if objective == "tpot" else pairs


def _linearised(pairs: Sequence[Pair], objective: Objective) -> Linearised:
    plain_s, plain_tokens, chosen_s, chosen_tokens = columns(pairs, objective)
    return Linearised.of([plain_s, chosen_tokens], [chosen_s, plain_tokens])


def _compare(design: Design, pairs: Sequence[Pair], objective: Objective) -> tuple[LogRatio, float]:
    """The log of a speed-up, and Var(last look) / Var(this look) as far as this look can tell."""
    queue_of = {id(pair): number // design.queue_size for number, pair in enumerate(pairs)}
    compared = _compared(pairs, objective)
    digests = [pair.plain.prompt_digest for pair in compared]
    strata = None if design.domains is None else [design.domains[digest] for digest in digests]
    measured = _linearised(compared, objective)
    done = len(pairs) / (design.num_pairs or len(pairs))
    if design.queue_size > 1:
        two_way = two_way_log_ratio(measured, digests, [queue_of[id(pair)] for pair in compared], strata)
        seen = len(set(digests)) / max(len(design.domains or ()), len(set(digests)))
        last = two_way.of_prompts * seen + max(0.0, two_way.of_queues - two_way.of_pairs) * done
        return two_way.ratio, last / two_way.ratio.error**2 if two_way.ratio.error > 0.0 else done
    ratio = log_ratio(measured, strata)
    if design.forecasts is None:
        return ratio, done
    assisted = _assisted(compared, objective, design.forecasts, design.domains)
    if assisted is None or assisted.error == 0.0:
        return assisted or ratio, done
    return assisted, done * (ratio.error / assisted.error) ** 2


def _assisted(
    compared: Sequence[Pair], objective: Objective, forecasts: Forecasts, domains: Mapping[str, str] | None
) -> LogRatio | None:
    """The log of a speed-up over all prompts that have forecasts; None where a pair's prompt has none."""
    seconds, digests = forecasts.seconds[objective], [pair.plain.prompt_digest for pair in compared]
    if not seconds.keys() >= set(digests):
        return None
    ordered = [*digests, *sorted(seconds.keys() - set(digests))]
    strata = None if domains is None else [domains[digest] for digest in ordered]
    plain_s, chosen_s = zip(*(seconds[digest] for digest in ordered), strict=True)
    weight = forecasts.weights[objective]
    return assisted_log_ratio(_linearised(compared, objective), (plain_s, chosen_s), weight, strata)


def missing_runs(pairs: Sequence[Pair], queue_size: int) -> str | None:
    """What an interval lacks: two prompts with a time per token, in a batch of two queues too; None for nothing."""
    timed = [number // queue_size for number, pair in enumerate(pairs) if timed_pairs([pair])]
    num_prompts, num_timed = (len(set(_prompt_numbers(each, queue_size))) for each in (pairs, timed_pairs(pairs)))
    if num_prompts < 2:
        return f"the proof had only one prompt, {MIN_PROOF_PROMPTS} are needed (12 in all)"
    if num_timed < 2:
        return f"only {num_timed} of the {num_prompts} prompts of the proof had a second token to time: 2 are needed"
    return "only one queue of the proof was timed: 2 are needed" if queue_size > 1 and len(set(timed)) < 2 else None


def prove(measured: Sequence[Measured], objective: Objective = "tpot") -> list[bool]:
    """Which setups are proven, in the order given; Holm's step-down at 5 % over all of them together."""
    rejected = holm([each.p_value for each in measured], LEVEL)
    return [
        passes and _unmet_condition(each, objective) is None for passes, each in zip(rejected, measured, strict=True)
    ]


def shortfall(measured: Measured, objective: Objective = "tpot") -> str:
    """Why a winner is not proven, and what gain the run could have shown."""
    holm_reason = f"its p-value {measured.p_value:.2g} does not pass Holm's step-down over all operating points"
    reason = _unmet_condition(measured, objective) or holm_reason
    if measured.detectable_speedup is None:
        return reason
    power = f"{POWER:.0%} of the time this run would have shown a speed-up of {measured.detectable_speedup:.3f}"
    return f"{reason}; {power}"


def _unmet_condition(measured: Measured, objective: Objective) -> str | None:
    speedup = measured.compared(objective)
    figure = f"its speed-up {speedup.estimate:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"
    if measured.num_prompts < MIN_PROOF_PROMPTS:
        return f"{figure} is of only {measured.num_prompts} prompts, {MIN_PROOF_PROMPTS} are needed (12 in all)"
    if measured.num_disturbed > MAX_DISTURBED * measured.num_prompts:
        disturbed = f"{measured.num_disturbed} of {measured.num_prompts} pairs of runs"
        return f"other programs disturbed {disturbed}: run again on a quiet machine, these are then measured again"
    if speedup.low <= 1.0:
        return f"{figure} is not clearly above 1"
    if speedup.estimate < MIN_SPEEDUP:
        return f"{figure} is under {MIN_SPEEDUP:g}"
    if measured.end_to_end.estimate < 1.0:
        return f"end to end it is slower ({measured.end_to_end.estimate:.3f}), prefill included"
    return None


def _prompt_numbers(pairs: Sequence[Pair], queue_size: int) -> list[int]:
    """Which prompt each pair is of; at batch 1 every pair is of one of its own."""
    numbers: dict[str, int] = {}
    return [
        position if queue_size == 1 else numbers.setdefault(pair.plain.prompt_digest, len(numbers))
        for position, pair in enumerate(pairs)
    ]


def _without_disturbed_queues(pairs: Sequence[Pair], queue_size: int) -> Sequence[Pair]:
    queues = [pairs[start : start + queue_size] for start in range(0, len(pairs), queue_size)]
    quiet = [queue for queue in queues if not any(_is_disturbed(pair) for pair in queue)]
    return pairs if queue_size == 1 or len(quiet) < MIN_QUEUES else [pair for queue in quiet for pair in queue]


def _is_disturbed(pair: Pair) -> bool:
    return pair.plain.disturbed or pair.chosen.disturbed
