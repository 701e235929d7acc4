"""Whether an engine samples the same text with a draft as without one, as far as mean log-probabilities tell.

Arithmetic only. A coarse check: wrong distributions can have equal means.
"""

import math
import statistics
from collections.abc import Sequence

from profiles.errors import EngineError, InputError

SURE = 4.0  # standard errors of the mean difference, over prompts


def check_means(name: str, drafted: Sequence[float], plain: Sequence[float]) -> None:
    """Compares the target's mean log-probability of sampled texts, with the draft `name` and without, by prompt.

    Raises: EngineError: the means are further apart than four standard errors of their difference. InputError: fewer
    than two prompts.
    """
    differences = [one - other for one, other in zip(drafted, plain, strict=True)]
    if len(differences) < 2:
        raise InputError(f"sampling is compared over {len(differences)} prompts: at least 2 are needed")
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(statistics.fmean(differences)) > SURE * error:
        raise EngineError(
            f"{name} samples another text than plain decoding: mean log-probability {statistics.fmean(drafted):.2f} "
            f"against {statistics.fmean(plain):.2f}; allowed are {SURE:g} standard errors, each {error:.2f}"
        )
