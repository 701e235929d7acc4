"""The proof of a winner: paired runs on prompts the race never saw, an interval, and Holm's step-down over anchors.

`speedup` is plain seconds per output token over the setup's, decode only; the end-to-end ratio stands beside it with
prefill. A win is claimed only when every condition of `is_proven` holds. Knows nothing of how the winner was found.
"""

from collections.abc import Sequence

from profiles.formulas import holm, rate_interval, speedup_interval
from profiles.terms import Sample, Setup
from tuner.claims import Measured
from tuner.objective import MIN_SPEEDUP

MIN_PROOF_PROMPTS = 24

Pair = tuple[Sample, Sample]


def measure(setup: Setup, pairs: Sequence[Pair]) -> Measured:
    """Speed-ups and rates from (plain, setup) pairs, one per prompt.

    Runs of one token have no time per token and are left out of the decode figures on both sides. Raises InputError
    when fewer than two prompts remain.
    """
    decoded = [pair for pair in pairs if min(sample.output_tokens for sample in pair) > 1]
    plain_s, chosen_s = ([pair[side].decode_s for pair in decoded] for side in (0, 1))
    plain_tokens, chosen_tokens = ([pair[side].output_tokens - 1 for pair in decoded] for side in (0, 1))
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
        num_prompts=len(pairs),
        num_partings=sum(plain.output_digest != chosen.output_digest for plain, chosen in pairs),
        num_disturbed=sum(plain.disturbed or chosen.disturbed for plain, chosen in pairs),
    )


def prove(measured: Sequence[Measured]) -> list[bool]:
    """Which of the anchors' winners are proven wins, in the order given; Holm at 5 % over all of them together."""
    rejected = holm([one.p_value for one in measured])
    return [ok and is_proven(one) for ok, one in zip(rejected, measured, strict=True)]


def is_proven(measured: Measured) -> bool:
    """The conditions beside Holm's: interval above 1, at least 1.5 % faster, no slower end to end, enough prompts."""
    return (
        measured.speedup.low > 1.0
        and measured.speedup.estimate >= MIN_SPEEDUP
        and measured.end_to_end.estimate >= 1.0
        and measured.num_prompts >= MIN_PROOF_PROMPTS
    )


def shortfall(measured: Measured) -> str:
    """Why a winner is not proven, in words."""
    speedup = measured.speedup
    figure = f"{speedup.estimate:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"
    if measured.num_prompts < MIN_PROOF_PROMPTS:
        return f"only {measured.num_prompts} prompts were left to prove it, {MIN_PROOF_PROMPTS} are needed"
    if speedup.low <= 1.0:
        return f"its speed-up {figure} is not clearly above 1"
    if speedup.estimate < MIN_SPEEDUP:
        return f"its speed-up {figure} is under {MIN_SPEEDUP:g}"
    if measured.end_to_end.estimate < 1.0:
        return f"end to end it is slower ({measured.end_to_end.estimate:.3f}), prefill included"
    return f"its p-value {measured.p_value:.2g} does not pass Holm's step-down over all anchors"
