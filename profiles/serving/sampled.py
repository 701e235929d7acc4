"""Whether an engine samples the same text with a draft as without one, as far as mean log-probabilities tell.

Arithmetic only. A coarse check: wrong distributions can have equal means.
"""

import math
import statistics
from collections.abc import Sequence

from profiles.errors import EngineError, InputError

SURE = 4.0  # standard errors of the mean difference, over texts


def check_means(name: str, drafted: Sequence[float], plain: Sequence[float]) -> None:
    """Compares the target's mean log-probability of sampled texts, with the draft `name` and without, by text.

    Pairs with NaN are left out. Raises: EngineError: the means are further apart than four standard errors of their
    difference. InputError: fewer than two texts.
    """
    pairs = [pair for pair in zip(drafted, plain, strict=True) if not any(map(math.isnan, pair))]
    if len(pairs) < 2:
        raise InputError(f"sampling is compared over {len(pairs)} texts: at least 2 of more than one token are needed")
    differences = [one - other for one, other in pairs]
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(statistics.fmean(differences)) > SURE * error:
        raise EngineError(
            f"{name} samples another text than plain decoding: mean log-probability {means[0]:.2f} "
            f"against {means[1]:.2f}; allowed are {SURE:g} standard errors, each {error:.2f}"
        )
