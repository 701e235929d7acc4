"""Checks that an engine samples the same text with a draft as without one, by mean log-probabilities.

A coarse check: wrong distributions can have equal means.
"""

import itertools
import math
import statistics
from collections.abc import Sequence

from profiles.records.core import Prompt, Workload
from profiles.records.errors import EngineError, InputError

NUM_TEXTS = 16
FALSE_ALARM = 6e-5  # the chance to refuse a draft that samples as it should: four standard errors of many texts


def texts_of(workload: Workload, prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """The prompts and seeds of the texts to sample: the prompts in turn, each text with a seed of its own."""
    in_turn = itertools.islice(itertools.cycle(prompts), NUM_TEXTS)
    return [(prompt, workload.seed + number) for number, prompt in enumerate(in_turn)]


def check_means(name: str, drafted: Sequence[float], plain: Sequence[float]) -> None:
    """Compares the target's mean log-probability of sampled texts, with the draft `name` and without, by text.

    Pairs with NaN are left out. Raises: EngineError: the means are further apart than chance makes them, by Student's
    t-test of paired differences. InputError: fewer than two texts.
    """
    from scipy import stats  # slow to import, and only sampling needs it

    pairs = [pair for pair in zip(drafted, plain, strict=True) if not any(map(math.isnan, pair))]
    if len(pairs) < 2:
        raise InputError(f"sampling is compared over {len(pairs)} texts: at least 2 of more than one token are needed")
    differences = [first - second for first, second in pairs]
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    most = float(stats.t.isf(FALSE_ALARM / 2, len(differences) - 1))
    if abs(statistics.fmean(differences)) > most * error:
        raise EngineError(
            f"{name} writes another text than plain decoding: mean log-probability {means[0]:.2f} "
            f"against {means[1]:.2f} over {len(pairs)} texts; allowed is a difference of {most * error:.2f}"
        )
