"""What a selector starts from: the two halves of the evidence, boiled down to a few figures each.

How often drafts are kept belongs to the text, how long rounds take to the machine; joined they price any draft at any
length. Records only, standard library only: serving code reads them. How they come from traces it must not know.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.records.core import Draft
from profiles.records.errors import require
from tuner.policy.query import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How far a draft's proposals go on a domain, by the walk over traces; `draft` is a place in `Prior.drafts`.

    `hit`: share of rounds that proposed anything. `keep[i]`: of the rounds in which position i+1 was tested (all before
    it were kept), the share that kept it, at the longest length. `per_round[j]`: tokens of a mean round at
    `Prior.lengths[j]`, the target token included. `num_rounds`: how many rounds `keep` rests on.
    """

    draft: int
    domain: str
    temperature: float
    hit: float
    keep: tuple[float, ...]
    per_round: tuple[float, ...]
    num_rounds: float

    def __post_init__(self) -> None:
        require(self.draft >= 0, f"draft number {self.draft}: whole numbers from 0 are allowed")
        good = all(0.0 <= share <= 1.0 for share in (self.hit, *self.keep))
        require(good, f"shares of kept tokens {[self.hit, *self.keep]}: allowed are fractions from 0 to 1")
        require(all(tokens >= 1.0 for tokens in self.per_round), f"a round of {min(self.per_round, default=0)} tokens")
        require(self.num_rounds >= 0.0, f"{self.num_rounds} rounds: at least 0 are needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """How long rounds of a batch take; `draft` is a place in `Prior.drafts`, None for plain decoding.

    `max_length`: the longest that kept the run's limits there. `seconds[p]`: a round in which the widest row proposes p
    tokens, overhead included; p = 0 is a round of this draft that finds nothing. Plain decoding has p = 0 only.
    `catch_up_s`: per token of text that a draft model has to take in when it is switched to, for the whole batch.
    """

    draft: int | None
    batch_size: int
    context_length: int
    temperature: float
    max_length: int
    seconds: tuple[float, ...]
    catch_up_s: float = 0.0

    def __post_init__(self) -> None:
        require(self.draft is None or self.draft >= 0, f"draft number {self.draft}: whole numbers from 0 are allowed")
        good = len(self.seconds) > 0 and all(math.isfinite(one) and one > 0.0 for one in self.seconds)
        require(good, f"round times {list(self.seconds)[:3]}: positive seconds are needed")
        good = math.isfinite(self.catch_up_s) and self.catch_up_s >= 0.0
        require(good, f"catching up takes {self.catch_up_s} s a token: at least 0 is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Everything a selector starts from. Raises InputError where the halves do not fit each other."""

    drafts: tuple[Draft, ...]
    lengths: tuple[int, ...]
    kept: tuple[Kept, ...]
    times: tuple[RoundTimes, ...]

    def __post_init__(self) -> None:
        good = list(self.lengths) == sorted(set(self.lengths)) and all(length >= 1 for length in self.lengths)
        require(good and bool(self.lengths), f"lengths {list(self.lengths)}: rising ones from 1 are needed")
        longest = self.lengths[-1]
        for kept in self.kept:
            require(kept.draft < len(self.drafts), f"draft number {kept.draft}: there are {len(self.drafts)}")
            fits = len(kept.keep) == longest and len(kept.per_round) == len(self.lengths)
            require(fits, f"draft number {kept.draft} on {kept.domain!r}: figures for other lengths")
        for times in self.times:
            require((times.draft or 0) < max(1, len(self.drafts)), f"draft number {times.draft} is not there")
            wanted = 1 if times.draft is None else longest + 1
            require(len(times.seconds) == wanted, f"draft number {times.draft}: round times for other lengths")


def joined(prior: Prior | None, earlier: Prior | None, standing: Sequence[Point]) -> Prior | None:
    """The newer evidence, and of the earlier what is under choices that the newer left `standing`.

    Nothing else: a draft that was not tried again, or broke a limit, is no option where the newer run decided. Evidence
    of other lengths cannot stand beside.
    """
    if earlier is None or not standing or (prior is not None and prior.lengths != earlier.lengths):
        return prior
    drafts = tuple(dict.fromkeys((*(() if prior is None else prior.drafts), *earlier.drafts)))
    moved = [drafts.index(draft) for draft in earlier.drafts]
    texts = {(domain, temperature) for _, _, domain, temperature in standing}
    points = {(batch, context, temperature) for batch, context, _, temperature in standing}
    kept = {} if prior is None else {(one.draft, one.domain, one.temperature): one for one in prior.kept}
    decided = {(one.domain, one.temperature) for one in kept.values()}
    for old in earlier.kept:
        text = old.domain, old.temperature
        if text in texts and text not in decided:
            kept[moved[old.draft], *text] = replace(old, draft=moved[old.draft])
    times = [] if prior is None else list(prior.times)
    timed = {(one.batch_size, one.context_length, one.temperature) for one in times}
    for each in earlier.times:
        point = each.batch_size, each.context_length, each.temperature
        if point in points and point not in timed:
            times.append(replace(each, draft=None if each.draft is None else moved[each.draft]))
    return Prior(drafts=drafts, lengths=earlier.lengths, kept=tuple(kept.values()), times=tuple(times))
