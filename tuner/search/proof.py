"""The proof of a winner: paired runs on prompts the race never saw, an interval, and Holm's step-down over anchors.

`speedup` is plain seconds per output token over the setup's, decode only; the end-to-end ratio stands beside it with
prefill. A win is claimed only when every condition of `is_proven` holds. Knows nothing of how the winner was found.
"""

from collections.abc import Sequence

from profiles.records.core import Interval, Setup
from profiles.records.evidence import Sample
from profiles.stats import holm, rate_interval, speedup_interval
from tuner.policy.estimates import Measured
from tuner.search.objective import MIN_SPEEDUP

MIN_PROOF_PROMPTS = 24
MIN_QUEUES = 4
MOST_DISTURBED = 0.1  # share of the pairs

Pair = tuple[Sample, Sample]


def decoded_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with a time per token: runs of one token have none."""
    return [pair for pair in pairs if min(sample.output_tokens for sample in pair) > 1]


def num_timed(pairs: Sequence[Pair], queue_size: int) -> int:
    """How many prompts have a time per token; in a batch a prompt that was run again counts once."""
    return len(_by_prompt(decoded_pairs(pairs), queue_size))


def measure(setup: Setup, pairs: Sequence[Pair], *, greedy: bool, queue_size: int = 1) -> Measured:
    """Speed-ups and rates from (plain, setup) pairs, `queue_size` of them in a row run as one queue.

    Only `decoded_pairs` count, in `num_prompts` too; the end-to-end ratio is over all pairs. Greedy outputs that
    differ are counted as divergences. In a batch prompts repeat and share their queue's noise: the interval is the
    wider of those over prompts and over queues, and disturbed queues are left out where four others are left. Raises
    InputError when fewer than two prompts remain.
    """
    pairs = _quiet(pairs, queue_size)
    decoded = decoded_pairs(pairs)
    by_prompt = _by_prompt(decoded, queue_size)
    groupings = [by_prompt]
    if queue_size > 1:
        kept = [number // queue_size for number, pair in enumerate(pairs) if pair in decoded]
        groupings.append(_grouped(decoded, kept))
    speedup, p_value = max(
        (speedup_interval(*_columns(groups)) for groups in groupings), key=lambda found: found[0].high - found[0].low
    )
    plain_s, plain_tokens, chosen_s, chosen_tokens = _columns(by_prompt)
    whole = _by_prompt(pairs, queue_size)
    plain_all, chosen_all = ([_total_s(group, side) for group in whole] for side in (0, 1))
    plain_out, chosen_out = ([sum(pair[side].output_tokens for pair in group) for group in whole] for side in (0, 1))
    end_to_end, _ = speedup_interval(plain_all, plain_out, chosen_all, chosen_out)
    return Measured(
        setup=setup,
        speedup=speedup,
        end_to_end=end_to_end,
        plain_tok_per_s=rate_interval(plain_s, plain_tokens),
        tok_per_s=rate_interval(chosen_s, chosen_tokens),
        p_value=p_value,
        num_prompts=len(by_prompt),
        num_divergences=sum(plain.output_digest != chosen.output_digest for plain, chosen in pairs) if greedy else 0,
        num_disturbed=sum(any(run.disturbed for pair in group for run in pair) for group in by_prompt),
    )


def _grouped(pairs: Sequence[Pair], keys: Sequence[object]) -> list[list[Pair]]:
    """Pairs with equal keys together, in the order of their first."""
    groups: dict[object, list[Pair]] = {}
    for key, pair in zip(keys, pairs, strict=True):
        groups.setdefault(key, []).append(pair)
    return list(groups.values())


def _quiet(pairs: Sequence[Pair], queue_size: int) -> Sequence[Pair]:
    queues = [pairs[start : start + queue_size] for start in range(0, len(pairs), queue_size)]
    quiet = [queue for queue in queues if not any(run.disturbed for pair in queue for run in pair)]
    return pairs if queue_size == 1 or len(quiet) < MIN_QUEUES else [pair for queue in quiet for pair in queue]


def _by_prompt(pairs: Sequence[Pair], queue_size: int) -> list[list[Pair]]:
    """The pairs of each prompt; at batch 1 every pair is one of its own."""
    return _grouped(pairs, [number if queue_size == 1 else pair[0].prompt_digest for number, pair in enumerate(pairs)])


def _total_s(group: Sequence[Pair], side: int) -> float:
    return sum(pair[side].ttft_s + pair[side].decode_s for pair in group)


def _columns(groups: Sequence[Sequence[Pair]]) -> tuple[list[float], list[int], list[float], list[int]]:
    """Decode seconds and tokens after the first of every group, of plain decoding and of the setup."""
    (plain_s, plain_tokens), (chosen_s, chosen_tokens) = (
        (
            [sum(pair[side].decode_s for pair in group) for group in groups],
            [sum(pair[side].output_tokens - 1 for pair in group) for group in groups],
        )
        for side in (0, 1)
    )
    return plain_s, plain_tokens, chosen_s, chosen_tokens


def speedup_so_far(pairs: Sequence[Pair]) -> Interval | None:
    """Decode speed-up over the pairs there are; None under two with a second token. For people who watch."""
    decoded = decoded_pairs(pairs)
    return speedup_interval(*_columns([[pair] for pair in decoded]))[0] if len(decoded) > 1 else None


def prove(measured: Sequence[Measured]) -> list[bool]:
    """Which of the anchors' winners are proven wins, in the order given; Holm at 5 % over all of them together."""
    rejected = holm([one.p_value for one in measured])
    return [ok and is_proven(one) for ok, one in zip(rejected, measured, strict=True)]


def is_proven(measured: Measured) -> bool:
    """The conditions beside Holm's: low above 1, 1.5 % faster, no slower end to end, enough undisturbed prompts."""
    return (
        measured.speedup.low > 1.0
        and measured.speedup.estimate >= MIN_SPEEDUP
        and measured.end_to_end.estimate >= 1.0
        and measured.num_prompts >= MIN_PROOF_PROMPTS
        and measured.num_disturbed <= MOST_DISTURBED * measured.num_prompts
    )


def shortfall(measured: Measured) -> str:
    """Why a winner is not proven, in words."""
    speedup = measured.speedup
    figure = f"{speedup.estimate:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"
    if measured.num_prompts < MIN_PROOF_PROMPTS:
        return f"only {measured.num_prompts} prompts were left to prove it, {MIN_PROOF_PROMPTS} are needed"
    if measured.num_disturbed > MOST_DISTURBED * measured.num_prompts:
        disturbed = f"{measured.num_disturbed} of {measured.num_prompts} pairs of runs"
        return f"other programs disturbed {disturbed}: run again on a quiet machine, these are then measured again"
    if speedup.low <= 1.0:
        return f"its speed-up {figure} is not clearly above 1"
    if speedup.estimate < MIN_SPEEDUP:
        return f"its speed-up {figure} is under {MIN_SPEEDUP:g}"
    if measured.end_to_end.estimate < 1.0:
        return f"end to end it is slower ({measured.end_to_end.estimate:.3f}), prefill included"
    return f"its p-value {measured.p_value:.2g} does not pass Holm's step-down over all anchors"
