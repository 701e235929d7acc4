"""How many tokens a draft yields on each domain, and which domain the text of a request is like.

Stored evidence is the prior; rounds that are run update it. Plain loops over short lists: this runs in every round.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from profiles.records.core import digest_of
from tuner.policy.prior import DraftAcceptance, Prior
from tuner.policy.query import MIXED

MAX_PRIOR_ROUNDS = 64.0  # weight of the stored evidence at most, because the text served may differ from it
HALF_LIFE_ROUNDS = 1024.0  # of the domain's own rounds
DECAY_ROUNDS = 16.0  # counts decay in steps of so many
AGING_ROUNDS = 2000.0  # without a round of a draft, after which one more standard error of it is doubtful
REJECTED = "rejected"  # text of which no draft gets anything right, beside the policy's domains
REJECTED_ACCEPT_PROB = 0.02
OUTSIDE_SHARE = 0.06  # of the prior for domains other than the labelled one
REJECTED_SHARE = 0.02
TEMPER = 0.9  # exponent of a round's likelihood: rounds of one request are alike
CHANGE_PROB = 0.01  # that a request's text changes its domain in a round
MIX_RATE = 1.0 / 20.0  # of a request in the shares of domains under its label
REPEAT_RATE = 1.0 / 8.0  # of a request in how often requests are like the one before

Text = tuple[list[float], int]  # weights of domains, updated in place, and the number of the label


class AcceptanceModel:
    """Posterior acceptance by position of one draft on one domain.

    A position's probability is (stored probability x its weight + accepted) / (weight + tested); a position behind a
    rejection was not tested. Counts decay with the domain's own rounds. `reach[j]`: probability that a round accepts
    at least j tokens; `reach[0]` that it proposes any. `tokens[i]`: of a mean round at `lengths[i]`, the bonus token
    included.
    """

    LEARNED = ("_accepted", "_tested", "_excess_run", "_decayed", "last")

    def __init__(self, stored: DraftAcceptance, lengths: Sequence[int], key: str = "") -> None:
        self.lengths, self.key = tuple(lengths), key
        self.weight = min(MAX_PRIOR_ROUNDS, max(1.0, stored.num_rounds))
        # rounds that accept by position, of `weight` that test it; index 0: rounds that propose anything
        self._prior = [self.weight * prob for prob in (stored.propose_prob, *stored.accept_probs)]
        self._accepted, self._tested = [0.0] * len(self._prior), [0.0] * len(self._prior)
        self.changes = 0  # rounds that were counted here
        self._decayed = self.last = 0.0  # rounds of the domain when counts decayed, and at the last round
        # rounds of a length start elsewhere in the text than the longest ones, which the stored probabilities are of:
        # by length, how many more tokens they have; and the sum over the rounds that were run
        self._excess, self._excess_run = dict.fromkeys(self.lengths, 0.0), 0.0
        self.update()
        for length, measured, computed in zip(self.lengths, stored.mean_tokens, self.tokens, strict=True):
            if measured > 1.0 < computed:
                self._excess[length] = (measured - 1.0) / (computed - 1.0) - 1.0
        self.update()

    def observe(self, proposed: int, accepted: int, weight: float, now: float) -> None:
        """Counts a round; `update` makes the figures follow. `now`: rounds of the domain so far."""
        if now - self._decayed >= DECAY_ROUNDS:
            self.decay(now)
        counts, tested, reached = self._accepted, self._tested, accepted + (proposed > 0)
        for position in range(reached):
            counts[position] += weight
            tested[position] += weight
        if accepted < proposed or not proposed:
            tested[reached] += weight
        self._excess_run += weight * self._excess.get(proposed, 0.0)
        self.last = now
        self.changes += 1

    def decay(self, now: float) -> None:
        factor = 0.5 ** ((now - self._decayed) / HALF_LIFE_ROUNDS)
        self._accepted = [count * factor for count in self._accepted]
        self._tested = [count * factor for count in self._tested]
        self._excess_run *= factor
        self._decayed = now

    def update(self) -> None:
        """Recomputes `reach` and `tokens`."""
        weight, counts = self.weight, zip(self._prior, self._accepted, self._tested, strict=True)
        self.reach = list(
            accumulate([(prior + accepted) / (weight + tested) for prior, accepted, tested in counts], mul)
        )
        sums = list(accumulate(self.reach))
        first, run = sums[0], 1.0 + self._excess_run / max(1e-9, self._prior[0] + self._accepted[0])
        self.tokens = [1.0 + (sums[length] - first) * (1.0 + excess) / run for length, excess in self._excess.items()]

    def error(self, index: int, now: float) -> float:
        """Standard error of `tokens[index]`, as accepted tokens scatter geometrically; it grows without rounds."""
        mean = self.tokens[index] - 1.0
        spread = math.sqrt(max(mean * (1.0 + mean), 0.05) / (self.weight + self._tested[0]))
        return spread * (1.0 + (now - self.last) / AGING_ROUNDS)


class DraftModels:
    """The models of one draft at one temperature, by domain."""

    def __init__(self, models: Sequence[AcceptanceModel]) -> None:
        self.models = tuple(models)
        self._likelihoods: dict[tuple[int, bool], list[float]] = {}

    def likelihoods(self, proposed: int, accepted: int) -> list[float]:
        """By domain, how likely a round of so many proposed tokens accepts so many."""
        key = accepted, accepted < proposed
        likelihoods = self._likelihoods.get(key)
        if likelihoods is None:
            reach = [model.reach for model in self.models]
            if accepted < proposed:
                probs = [row[accepted] - row[accepted + 1] for row in reach]
            else:
                probs = [row[accepted] if proposed else 1.0 - row[0] for row in reach]
            likelihoods = self._likelihoods[key] = [prob**TEMPER for prob in probs]
        return likelihoods

    def update(self, domain: int) -> None:
        """Makes the figures of a domain follow what was counted."""
        self.models[domain].update()
        self._likelihoods.clear()


class Domains:
    """The policy's domains as components of every request's text; the last one is text that no draft gets right.

    A request starts at the shares of domains under its label, which are learned too, so a wrong label does little harm.
    Every round multiplies in the likelihoods of what was accepted; a round counts for every domain by its weight.
    `rounds[c]` counts the rounds of a domain. `shares[label]` and `first` are shares under a label as learned and at
    first; `rows[label]` is the text of all rows that come without their requests.
    """

    LEARNED = ("rounds", "shares", "latest", "repeats", "rows")

    def __init__(self, prior: Prior) -> None:
        named = tuple(dict.fromkeys(stored.domain for stored in prior.acceptance))
        self.names = (*named, REJECTED)
        self.key = digest_of(["domains", self.names])
        self.rounds = [0.0] * len(self.names)
        # number of a domain's label; 0: none, or another
        self.labels: dict[str | None, int] = {name: at for at, name in enumerate(named, 1) if name != MIXED}
        self.first = [self._first(None)] * (len(named) + 1)
        for name, number in self.labels.items():
            self.first[number] = self._first(name)
        self.shares = [list(shares) for shares in self.first]
        self.latest = [list(shares) for shares in self.first]
        self.repeats = [0.0] * len(self.first)
        self.rows: list[Text] = [(list(shares), label) for label, shares in enumerate(self.first)]
        stored = {(row.draft, row.domain, row.temperature): row for row in prior.acceptance}
        self.drafts: dict[float, list[DraftModels]] = {row.temperature: [] for row in prior.acceptance}
        for temperature, drafts in self.drafts.items():
            for number, draft in enumerate(prior.drafts):
                useful = [row.propose_prob for (of, _, at), row in stored.items() if (of, at) == (number, temperature)]
                rejected = _rejected(number, temperature, sum(useful) / max(1, len(useful)), prior.lengths)
                rows = [stored.get((number, name, temperature), rejected) for name in self.names]
                keys = [digest_of([draft.digest, name, temperature, prior.lengths]) for name in self.names]
                models = [AcceptanceModel(row, prior.lengths, key) for row, key in zip(rows, keys, strict=True)]
                drafts.append(DraftModels(models))

    def _first(self, label: str | None) -> list[float]:
        """The shares of domains under a label before anything was learned."""
        outside = 1.0 - REJECTED_SHARE if label is None else OUTSIDE_SHARE
        # beside a label, or one domain alone, other text may be anything; without, it is of one of the domains
        mixed = 3.0 if label is not None or len(self.names) <= 3 else 0.1
        parts = [mixed if name == MIXED else 1.0 for name in self.names[:-1]]
        shares = [*(outside * part / sum(parts) for part in parts), REJECTED_SHARE]
        main = label or MIXED
        shares[self.names.index(main) if main in self.names else 0] += 1.0 - sum(shares)
        return shares

    def nearest(self, temperature: float) -> list[DraftModels]:
        """Drafts at the measured temperature that is nearest."""
        return self.drafts[min(self.drafts, key=lambda measured: abs(measured - temperature))]

    def learn(self, text: Text, draft: DraftModels, row: tuple[int, int]) -> int:
        """Counts a round of a text and updates its weights; returns the domain that it is most like."""
        weights, label = text
        scores = list(map(mul, weights, draft.likelihoods(*row)))
        total, shares = sum(scores), self.shares[label]
        stay = (1.0 - CHANGE_PROB) / total if total > 1e-30 else 0.0
        leave = CHANGE_PROB if stay else 1.0
        weights[:] = [stay * score + leave * share for score, share in zip(scores, shares)]  # noqa: B905 -- fast
        rejected = weights[-1]
        weight = max(weights[:-1])
        main = weights.index(weight)
        # a draft that turned useless looks like text that none gets right: those rounds count for the domains too
        weight += rejected * shares[main] / max(1e-9, 1.0 - shares[-1])
        weight *= weight  # rounds of uncertain domains would make these alike
        self.rounds[main] += weight
        draft.models[main].observe(*row, weight, self.rounds[main])
        return main

    def start(self, domain: str | None) -> Text:
        """A new request's text: the shares under its label, as far as requests do not repeat the domain of the last."""
        label = self.labels.get(domain, 0)
        shares, latest = self.shares[label], self.latest[label]
        chance = sum(map(mul, shares, shares))
        repeat = max(0.0, (self.repeats[label] - chance) / (1.0 - chance))
        return [share + repeat * (weight - share) for share, weight in zip(shares, latest, strict=True)], label

    def finish(self, text: Text) -> None:
        """Learns from a request that ended what text is under its label."""
        weights, label = text
        shares, latest = self.shares[label], self.latest[label]
        self.repeats[label] += REPEAT_RATE * (sum(map(mul, weights, latest)) - self.repeats[label])
        self.shares[label] = [
            share + MIX_RATE * (0.98 * weight + 0.02 * first - share)
            for share, weight, first in zip(shares, weights, self.first[label], strict=True)
        ]
        self.latest[label] = weights

    def align(self) -> None:
        """No domain has fewer rounds than a model that was taken over from another policy has counted."""
        for draft in (draft for drafts in self.drafts.values() for draft in drafts):
            self.rounds = [max(count, model.last) for count, model in zip(self.rounds, draft.models, strict=True)]

    def parts(self) -> Iterator[Any]:
        """What learns."""
        yield self
        for drafts in self.drafts.values():
            for draft in drafts:
                yield from draft.models


def _rejected(draft: int, temperature: float, propose_prob: float, lengths: Sequence[int]) -> DraftAcceptance:
    """A draft that gets next to nothing right."""
    return DraftAcceptance(
        draft=draft,
        domain=REJECTED,
        temperature=temperature,
        propose_prob=propose_prob,
        accept_probs=(REJECTED_ACCEPT_PROB,) * lengths[-1],
        mean_tokens=(1.0,) * len(lengths),
        num_rounds=0.0,
    )
