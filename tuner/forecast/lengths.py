"""Expected seconds of decoding at every length up to a longest, at batch 1, in one pass over all prompts.

The recursion of `profiles.acceptance.expected_rounds`, run from the last token to the first and on seconds instead of
rounds: what is left after token `start` is this round and what is left after it. Shapes: P prompts, K lengths, T
tokens of the longest output.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy

Array: TypeAlias = numpy.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """What a look-up proposes for a round at every token, and how much of it is accepted; (P, T) each."""

    proposed: Array
    accepted: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A draft model over the traces: the probability that each token is accepted, (P, T).

    `is_sure`: rounds do not stop before the token, (P, T); `past_rejection` (P,): see `StopRule`. None: they never do.
    """

    accept_probs: Array
    is_sure: Array | None = None
    past_rejection: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Seconds of rounds.

    Attributes:
        looked_up: (K+1,) by tokens proposed, without a draft model.
        modelled: (K+1, 2) by tokens proposed by a draft model, and whether it ran one step more.
        catch_up: by the tokens that the model is behind, what a wider first step adds; (T+2,) or more.
        per_length: (K,) added to every round.
    """

    looked_up: Array
    modelled: Array
    catch_up: Array
    per_length: Array


def seconds_of_lengths(
    sizes: Array, max_new_tokens: int, prices: Prices, *, lookup: Lookup | None = None, model: Model | None = None
) -> Array:
    """Seconds (P, K) of decoding all tokens after the first; `sizes` (P,) are those of the outputs.

    A composite asks the model where the look-up has nothing. See `expected_rounds` for the rules.
    """
    walk = _Walk(sizes, prices, model)
    prompts, lengths = numpy.arange(len(sizes))[:, None], walk.lengths - 1
    # per token at which a round may start: the seconds of look-ups until the next other round, and its token
    looking_s = numpy.zeros_like(walk.left_s)
    other = numpy.tile(numpy.arange(walk.left_s.shape[2]), (*walk.left_s.shape[:2], 1))
    from_other_s = numpy.zeros_like(walk.left_s)
    ran_model = numpy.zeros(walk.left_s.shape, bool)
    for start in range(int(sizes.max()) - 1, 0, -1):
        limit = numpy.minimum(walk.lengths, max_new_tokens - start - 1)
        under_way = (sizes > start)[:, None]
        from_other_s[:, :, start] = under_way * walk.other_round(start, limit)
        ran_model[:, :, start] = under_way & (limit > 0)
        if lookup is not None:
            proposed = numpy.minimum(limit, lookup.proposed[:, start, None])
            after = start + numpy.minimum(proposed, lookup.accepted[:, start, None]) + 1
            finds = under_way & (proposed > 0)
            round_s = prices.looked_up[proposed] + prices.per_length
            looking_s[:, :, start] = numpy.where(finds, round_s + looking_s[prompts, lengths, after], 0.0)
            other[:, :, start] = numpy.where(finds, other[prompts, lengths, after], start)
        at = other[:, :, start]
        left_s = looking_s[:, :, start] + from_other_s[prompts, lengths, at]
        for behind, part in ((1, walk.left_s), (2, walk.left_when_behind_s)):
            catching_up_s = prices.catch_up[at - start + behind] if model is not None else 0.0
            part[:, :, start] = left_s + ran_model[prompts, lengths, at] * catching_up_s
    return walk.left_s[:, :, 1]


class _Walk:
    """Rounds without a look-up, and the seconds left from every token, (P, K, T + K + 2); 0 past the end.

    `left_when_behind_s`: where the draft model has not taken in its last proposal.
    """

    def __init__(self, sizes: Array, prices: Prices, model: Model | None) -> None:
        longest = len(prices.per_length)
        self.lengths = numpy.arange(1, longest + 1)
        self.left_s = numpy.zeros((len(sizes), longest, int(sizes.max()) + longest + 2))
        self.left_when_behind_s = self.left_s.copy()
        self._prices, self._sizes, self._model = prices, sizes, model
        self._prompts = numpy.arange(len(sizes))[:, None]
        limits, accepted = numpy.arange(longest + 1)[:, None], numpy.arange(longest)
        self._before = accepted < limits  # [limit, tokens accepted]
        if model is not None:
            self._probs = numpy.pad(model.accept_probs, ((0, 0), (0, 1)))  # nothing is accepted past the end
        if model is not None and model.is_sure is not None:
            assert model.past_rejection is not None
            self._sure = numpy.pad(model.is_sure, ((0, 0), (0, 1)), constant_values=True)
            proposed = numpy.minimum(limits, accepted + 1 + model.past_rejection[:, None, None])
            self._rejected_s = prices.modelled[proposed, (proposed < limits).astype(int)]  # [prompt, limit, accepted]

    def other_round(self, start: int, limit: Array) -> Array:
        """Seconds (P, K) of a round at `start` of up to `limit` (K,) tokens, and of what is left after it."""
        prices = self._prices
        if self._model is None or not limit.any():
            plain_s: Array = self.left_s[:, :, start + 1] + (prices.looked_up[0] + prices.per_length)
            return plain_s
        probs = self._probs[:, start : start + len(self.lengths)]
        most = probs.shape[1]  # tokens that a round can accept, and one
        before, columns, reached = self._before[limit, :most], self.lengths - 1, numpy.minimum(limit, most)
        survival = numpy.cumprod(numpy.concatenate([numpy.ones((len(probs), 1)), probs], 1), 1)  # (P, most + 1)
        rejected = survival[:, :-1] * (1.0 - probs)
        following_s = self.left_s[:, :, start + 1 : start + 1 + most]
        whole_s = prices.modelled[limit, 0] + self.left_when_behind_s[:, columns, start + 1 + limit]
        ends_s: Array = prices.per_length + survival[:, reached] * whole_s
        if self._model.is_sure is None:
            round_s = prices.modelled[limit, :1]
            ends_s += numpy.einsum("pj,kj,pkj->pk", rejected, before, following_s + round_s)
            return ends_s
        sure = self._sure[:, start : start + most]
        first = numpy.where(sure.all(1), most, sure.argmin(1))[:, None]  # tokens proposed before the stop, (P, 1)
        rejected = rejected * (numpy.arange(most) < first)
        round_s = self._rejected_s[:, limit, :most]
        at_end = numpy.arange(start, start + most) >= self._sizes[:, None]  # there all that may be is proposed
        round_s = numpy.where(at_end[:, None], prices.modelled[limit, :1], round_s)
        stopped_s = prices.modelled[first, 1] + self.left_s[self._prompts, columns, start + 1 + first]
        stopped_s = prices.per_length + survival[self._prompts, first] * stopped_s
        ends_s = numpy.where(first < reached, stopped_s, ends_s)
        ends_s += numpy.einsum("pj,kj,pkj->pk", rejected, before, following_s + round_s)
        return ends_s
