"""Negative control of a proof: do the two arms of the paired runs differ in more than the draft?"""

from collections.abc import Sequence
from statistics import fmean, median

from profiles.records.core import Setup
from profiles.stats import median_interval, share_interval
from tuner.search.pairs import Pair

SHORTER, LONGER = 1.10, 1.25  # by how much a prefill may differ: a first look-up, or what an engine does for it, adds
MIN_DIFFERENCE_S, MIN_PAIRS = 0.001, 6
DIVERGENCES_PER_TOKEN = 0.01  # of greedy outputs in 16-bit types, by rounding alone, at most


def objection(setup: Setup, pairs: Sequence[Pair], *, batch_size: int, greedy: bool) -> str | None:
    """Why the pairs are no fair comparison, in one sentence; None where nothing speaks against it."""
    return (
        _threads_objection(setup, pairs)
        or _prefill_objection(setup, pairs, batch_size)
        or (_divergence_objection(pairs) if greedy else None)
    )


def threads_used(pairs: Sequence[Pair]) -> tuple[int, int] | None:
    """Threads of plain decoding and of the setup, the fewest of any run; None where they are not known."""
    threads = [(pair.plain.threads, pair.chosen.threads) for pair in pairs]
    both = [(plain, chosen) for plain, chosen in threads if plain is not None and chosen is not None]
    return (min(plain for plain, _ in both), min(chosen for _, chosen in both)) if both else None


def cores_used(pairs: Sequence[Pair]) -> tuple[float, float] | None:
    """Mean processor seconds per second of plain decoding and of the setup; None where they were not measured."""
    cores = [(pair.plain.cores, pair.chosen.cores) for pair in pairs]
    both = [(plain, chosen) for plain, chosen in cores if plain is not None and chosen is not None]
    return (fmean(plain for plain, _ in both), fmean(chosen for _, chosen in both)) if both else None


def _threads_objection(setup: Setup, pairs: Sequence[Pair]) -> str | None:
    """Threads that differ tell on a busy machine too, where no prefill is the same twice."""
    threads = threads_used(pairs)
    if threads is None or threads[0] == threads[1]:
        return None
    return (
        f"plain decoding ran with threads={threads[0]}, {setup.name} with threads={threads[1]}: "
        "set OMP_NUM_THREADS and run again"
    )


def _prefill_objection(setup: Setup, pairs: Sequence[Pair], batch_size: int) -> str | None:
    """Compares the prefills of the same prompts, which no draft makes shorter, and a look-up no longer.

    What a draft model's own prefill adds is not known, so only a shorter prefill counts there. In a batch a request
    also waits for others, whose number differs between the arms: nothing is compared.
    """
    if batch_size > 1 or len(pairs) < MIN_PAIRS or setup.draft is None:
        return None
    ratio = median_interval([pair.plain.ttft_s / pair.chosen.ttft_s for pair in pairs])
    is_longer = setup.draft.kind == "ngram" and ratio.high < 1.0 / LONGER
    difference_s = median(abs(pair.plain.ttft_s - pair.chosen.ttft_s) for pair in pairs)
    if not (ratio.low > SHORTER or is_longer) or difference_s < MIN_DIFFERENCE_S:
        return None
    cores = cores_used(pairs)
    used = "" if cores is None else f"; plain decoding used {cores[0]:.1f} cores, it {cores[1]:.1f}"
    return (
        f"plain decoding takes {ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times as long for the prefill "
        f"of the same prompts, so the two differ in more than the draft: compare their threads and settings{used}"
    )


def _divergence_objection(pairs: Sequence[Pair]) -> str | None:
    """Near-ties fall otherwise in 16-bit types, a few in a hundred tokens; a wrong mask changes nearly every output.

    In long outputs a near-tie comes so surely that the two cannot be told apart.
    """
    diverged = sum(pair.plain.output_digest != pair.chosen.output_digest for pair in pairs)
    tokens = fmean(pair.plain.output_tokens for pair in pairs)
    explained = 1.0 - (1.0 - DIVERGENCES_PER_TOKEN) ** tokens
    if share_interval(diverged, len(pairs)).low <= explained:
        return None
    return (
        f"{diverged} of {len(pairs)} outputs differ from those of plain decoding, where rounding explains "
        f"{explained:.0%}: its tokens are not the target's own"
    )
