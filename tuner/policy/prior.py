"""What a selector starts from: acceptance by draft and text, round times by draft and machine."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from profiles.records.core import Draft
from profiles.records.errors import require
from tuner.policy.query import OperatingPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftAcceptance:
    """How far a draft's proposals are accepted on a domain, replayed over traces.

    `draft` is an index of `Prior.drafts`. `propose_prob`: share of rounds that propose anything. `accept_probs[i]`:
    probability that position i+1 is accepted when all before it were, at the longest length. `mean_tokens[j]`: tokens
    of a mean round at `Prior.lengths[j]`, the bonus token included. `num_rounds`: rounds behind `accept_probs`.
    """

    draft: int
    domain: str
    temperature: float
    propose_prob: float
    accept_probs: tuple[float, ...]
    mean_tokens: tuple[float, ...]
    num_rounds: float

    def __post_init__(self) -> None:
        require(self.draft >= 0, f"draft number {self.draft}: whole numbers from 0 are allowed")
        probs = (self.propose_prob, *self.accept_probs)
        require(
            all(0.0 <= prob <= 1.0 for prob in probs), f"acceptance {list(probs)}: fractions from 0 to 1 are allowed"
        )
        require(
            all(tokens >= 1.0 for tokens in self.mean_tokens), f"a round of {min(self.mean_tokens, default=0)} tokens"
        )
        require(self.num_rounds >= 0.0, f"{self.num_rounds} rounds: at least 0 are needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """Round times of a draft at a batch size and context; `draft` None is plain decoding.

    `max_length`: the longest that kept the run's limits there. `seconds[p]`: a round whose widest row proposes p
    tokens, overhead included; p = 0 is a round of this draft that finds nothing, and the only one of plain decoding.
    `catch_up_s`: per token of text that a draft model takes in when it is switched to, for the whole batch.
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
        positive = len(self.seconds) > 0 and all(math.isfinite(value) and value > 0.0 for value in self.seconds)
        require(positive, f"round times {list(self.seconds)[:3]}: positive seconds are needed")
        require(
            math.isfinite(self.catch_up_s) and self.catch_up_s >= 0.0,
            f"catching up takes {self.catch_up_s} s a token: at least 0 is needed",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Everything a selector starts from. Raises InputError when acceptance and times do not fit each other."""

    drafts: tuple[Draft, ...]
    lengths: tuple[int, ...]
    acceptance: tuple[DraftAcceptance, ...]
    round_times: tuple[RoundTimes, ...]

    def __post_init__(self) -> None:
        increasing = list(self.lengths) == sorted(set(self.lengths)) and min(self.lengths, default=0) >= 1
        require(increasing, f"lengths {list(self.lengths)}: increasing ones from 1 are needed")
        longest = self.lengths[-1]
        for acceptance in self.acceptance:
            number = acceptance.draft
            require(number < len(self.drafts), f"draft number {number}: there are {len(self.drafts)}")
            fits = len(acceptance.accept_probs) == longest and len(acceptance.mean_tokens) == len(self.lengths)
            require(fits, f"draft number {number} on {acceptance.domain!r}: figures for other lengths")
        for times in self.round_times:
            require((times.draft or 0) < max(1, len(self.drafts)), f"draft number {times.draft} is not there")
            needed = 1 if times.draft is None else longest + 1
            require(len(times.seconds) == needed, f"draft number {times.draft}: round times for other lengths")


def join_priors(newer: Prior | None, earlier: Prior | None, standing: Collection[OperatingPoint]) -> Prior | None:
    """The newer prior, and of the earlier one what belongs to choices that the newer run left `standing`.

    A draft that was not tried again, or broke a limit, is no option where the newer run decided. Priors of different
    lengths cannot be joined: the newer one is returned.
    """
    if earlier is None or not standing or (newer is not None and newer.lengths != earlier.lengths):
        return newer
    drafts = tuple(dict.fromkeys((*(() if newer is None else newer.drafts), *earlier.drafts)))
    numbers = [drafts.index(draft) for draft in earlier.drafts]
    acceptance = [] if newer is None else list(newer.acceptance)
    decided = {(item.domain, item.temperature) for item in acceptance}
    wanted = {(point.domain, point.temperature) for point in standing} - decided
    acceptance += (
        replace(item, draft=numbers[item.draft])
        for item in earlier.acceptance
        if (item.domain, item.temperature) in wanted
    )
    round_times = [] if newer is None else list(newer.round_times)
    timed = {(item.batch_size, item.context_length, item.temperature) for item in round_times}
    untimed = {(point.batch_size, point.context_length, point.temperature) for point in standing} - timed
    round_times += (
        replace(item, draft=None if item.draft is None else numbers[item.draft])
        for item in earlier.round_times
        if (item.batch_size, item.context_length, item.temperature) in untimed
    )
    return Prior(drafts=drafts, lengths=earlier.lengths, acceptance=tuple(acceptance), round_times=tuple(round_times))
