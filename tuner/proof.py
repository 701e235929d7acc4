"""The proof of a winner: paired runs on prompts the race never saw, an interval, and Holm's step-down over anchors.

`speedup` is plain seconds per output token over the setup's, decode only; the end-to-end ratio stands beside it with
prefill. A win is claimed only when every condition of `is_proven` holds. Knows nothing of how the winner was found.
"""

from collections.abc import Sequence

from profiles.formulas import holm, rate_interval, speedup_interval
from profiles.terms import Interval, Sample, Setup
from tuner.claims import Measured
from tuner.objective import MIN_SPEEDUP

MIN_PROOF_PROMPTS = 24
MOST_DISTURBED = 0.1  # share of the pairs

Pair = tuple[Sample, Sample]


def decoded_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with a time per token: runs of one token have none."""
    return [pair for pair in pairs if min(sample.output_tokens for sample in pair) > 1]


def measure(setup: Setup, pairs: Sequence[Pair], *, greedy: bool) -> Measured:
    """Speed-ups and rates from (plain, setup) pairs, one per prompt.

    Only `decoded_pairs` count, in `num_prompts` too; the end-to-end ratio is over all pairs. Greedy outputs that
    differ are counted as partings. Raises InputError when fewer than two pairs remain.
    """
    decoded = decoded_pairs(pairs)
    plain_s, plain_tokens, chosen_s, chosen_tokens = _columns(decoded)
    speedup, p_value = speedup_interval(plain_s, plain_tokens, chosen_s, chosen_tokens)
    plain_all, chosen_all = ([pair[side].ttft_s + pair[side].decode_s for pair in pairs] for side in (0, 1))
    plain_out, chosen_out = ([pair[side].output_tokens for pair in pairs] for side in (0, 1))
    end_to_end, _ = speedup_interval(plain_all, plain_out, chosen_all, chosen_out)
    return Measured(
        setup=setup,
        speedup=speedup,
        end_to_end=end_to_end,
        plain_tok_per_s=rate_interval(plain_s, plain_tokens),
        tok_per_s=rate_interval(chosen_s, chosen_tokens),
        p_value=p_value,
        num_prompts=len(decoded),
        num_partings=sum(plain.output_digest != chosen.output_digest for plain, chosen in pairs) if greedy else 0,
        num_disturbed=sum(plain.disturbed or chosen.disturbed for plain, chosen in decoded),
    )


def _columns(pairs: Sequence[Pair]) -> tuple[list[float], list[int], list[float], list[int]]:
    """Decode seconds and tokens after the first, of plain decoding and of the setup."""
    (plain_s, plain_tokens), (chosen_s, chosen_tokens) = (
        ([pair[side].decode_s for pair in pairs], [pair[side].output_tokens - 1 for pair in pairs]) for side in (0, 1)
    )
    return plain_s, plain_tokens, chosen_s, chosen_tokens


def speedup_so_far(pairs: Sequence[Pair]) -> Interval | None:
    """Decode speed-up over the pairs there are; None under two with a second token. For people who watch."""
    decoded = decoded_pairs(pairs)
    return speedup_interval(*_columns(decoded))[0] if len(decoded) > 1 else None


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
