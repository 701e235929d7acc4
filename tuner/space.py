"""What can be chosen: the candidate setups of a workload, plain decoding always among them.

It must not know which candidates can run or how good they are.
"""

from collections.abc import Sequence

from profiles.terms import PLAIN, Draft, Setup


def candidates(drafts: Sequence[Draft], lengths: Sequence[int]) -> tuple[Setup, ...]:
    """Plain decoding first, then every draft at every length, draft by draft; the same draft twice counts once."""
    setups = [PLAIN] + [Setup(draft=draft, length=length) for draft in drafts for length in lengths]
    distinct: dict[str, Setup] = {}
    for setup in setups:
        distinct.setdefault(setup.digest, setup)
    return tuple(distinct.values())
