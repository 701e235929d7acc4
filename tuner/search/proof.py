"""Proves a winner: paired runs, a confidence interval, and Holm's step-down over everything that was tried.

`speedup` is plain seconds per output token over the setup's, decoding only; the end-to-end ratio includes prefill.
"""

from collections.abc import Hashable, Mapping, Sequence

from profiles.records.core import Setup
from profiles.stats import holm, rate_interval, speedup_interval
from tuner.policy.estimates import Measured, Objective
from tuner.search.objective import MIN_SPEEDUP
from tuner.search.pairs import Pair, columns, timed_pairs

MIN_PROOF_PROMPTS = 12
MIN_QUEUES = 4
MAX_DISTURBED = 0.1  # share of the pairs


def measure(
    setup: Setup,
    pairs: Sequence[Pair],
    *,
    greedy: bool,
    queue_size: int = 1,
    domains: Mapping[str, str] | None = None,
    num_compared: int = 1,
    objective: Objective = "tpot",
) -> Measured:
    """Speed-ups and rates of a setup from pairs.

    Decoding is compared on the pairs with a time per token, end to end on all. In a batch, prompts repeat and share the
    noise of their queue, so the interval is the wider of those over prompts and over queues, and disturbed queues are
    left out where at least four others remain. Greedy outputs that differ are counted.

    Args:
        queue_size: so many pairs in a row were run as one queue.
        domains: by prompt digest; what differs between domains is no uncertainty, because their shares are fixed.
        num_compared: how many setups were compared on these very prompts before this one was chosen; interval and
            p-value hold for all of them together (Bonferroni).
        objective: which of the two speed-ups the p-value is of.

    Raises:
        InputError: fewer than two prompts have a time per token.
    """
    pairs = _without_disturbed_queues(pairs, queue_size)
    by_prompt = _by_prompt(timed_pairs(pairs), queue_size)
    groupings = [by_prompt]
    if queue_size > 1:
        queues = [pairs[start : start + queue_size] for start in range(0, len(pairs), queue_size)]
        groupings.append([timed for queue in queues if (timed := timed_pairs(queue))])
    level = 0.05 / num_compared
    speedup, p_value = max(
        (
            speedup_interval(
                *columns(groups), strata=_strata(groups, domains) if groups is by_prompt else None, level=level
            )
            for groups in groupings
        ),
        key=lambda interval_and_p: interval_and_p[0].high - interval_and_p[0].low,
    )
    decoding, requests = columns(by_prompt), _by_prompt(pairs, queue_size)
    end_to_end, request_p_value = speedup_interval(
        *columns(requests, "throughput"), strata=_strata(requests, domains), level=level
    )
    if objective == "throughput":
        p_value = request_p_value
    return Measured(
        setup=setup,
        speedup=speedup,
        end_to_end=end_to_end,
        plain_tok_per_s=rate_interval(decoding.plain_s, decoding.plain_tokens),
        tok_per_s=rate_interval(decoding.chosen_s, decoding.chosen_tokens),
        p_value=min(1.0, p_value * num_compared),
        num_prompts=len(by_prompt),
        num_divergences=sum(pair.plain.output_digest != pair.chosen.output_digest for pair in pairs) if greedy else 0,
        num_disturbed=sum(any(_is_disturbed(pair) for pair in group) for group in by_prompt),
    )


def _strata(by_prompt: Sequence[Sequence[Pair]], domains: Mapping[str, str] | None) -> list[str] | None:
    return None if domains is None else [domains[group[0].plain.prompt_digest] for group in by_prompt]


def num_timed_prompts(pairs: Sequence[Pair], queue_size: int) -> int:
    """How many prompts have a time per token; in a batch a prompt that was run again counts once."""
    return len(_by_prompt(timed_pairs(pairs), queue_size))


def prove(measured: Sequence[Measured], objective: Objective = "tpot") -> list[bool]:
    """Which setups are proven, in the order given; Holm's step-down at 5 % over all of them together."""
    rejected = holm([each.p_value for each in measured])
    return [
        passes and _unmet_condition(each, objective) is None for passes, each in zip(rejected, measured, strict=True)
    ]


def shortfall(measured: Measured, objective: Objective = "tpot") -> str:
    """Why a winner is not proven."""
    holm_reason = f"its p-value {measured.p_value:.2g} does not pass Holm's step-down over all operating points"
    return _unmet_condition(measured, objective) or holm_reason


def _unmet_condition(measured: Measured, objective: Objective) -> str | None:
    speedup = measured.speedup if objective == "tpot" else measured.end_to_end
    figure = f"its speed-up {speedup.estimate:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"
    if measured.num_prompts < MIN_PROOF_PROMPTS:
        return f"only {measured.num_prompts} prompts were left to prove it, {MIN_PROOF_PROMPTS} are needed"
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


def _by_prompt(pairs: Sequence[Pair], queue_size: int) -> list[list[Pair]]:
    """The pairs of each prompt; at batch 1 every pair is one of its own."""
    groups: dict[Hashable, list[Pair]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(number if queue_size == 1 else pair.plain.prompt_digest, []).append(pair)
    return list(groups.values())


def _without_disturbed_queues(pairs: Sequence[Pair], queue_size: int) -> Sequence[Pair]:
    queues = [pairs[start : start + queue_size] for start in range(0, len(pairs), queue_size)]
    quiet = [queue for queue in queues if not any(_is_disturbed(pair) for pair in queue)]
    return pairs if queue_size == 1 or len(quiet) < MIN_QUEUES else [pair for queue in quiet for pair in queue]


def _is_disturbed(pair: Pair) -> bool:
    return pair.plain.disturbed or pair.chosen.disturbed
