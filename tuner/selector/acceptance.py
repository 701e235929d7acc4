"""How many tokens a draft yields on each domain, and which domain the text of a request is like.

Stored evidence is the prior; rounds that are run update it. Plain loops over short lists: this runs in every round.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from tuner.policy.prior import DraftAcceptance, Prior
from tuner.policy.query import MIXED

MAX_PRIOR_ROUNDS = 64.0  # weight of the stored evidence at most, because the text served may differ from it
HALF_LIFE_ROUNDS = 1024.0  # of the domain's own rounds
DECAY_ROUNDS = 16.0  # counts decay in steps of so many
AGING_ROUNDS = 2000.0  # without a round of a draft, after which one more standard error of it is doubtful
SHIFT_PRIOR = 40.0  # accepted and rejected tokens of even odds that a draft's stored acceptance weighs
SHIFT_ROUNDS = 1024.0  # of the draft that it is taken over
MAX_SHIFT = 2.0  # of the logarithm of odds
MIN_PROB = 0.001  # of a stored acceptance whose odds are shifted
REJECTED = "rejected"  # text of which no draft gets anything right, beside the policy's domains
REJECTED_ACCEPT_PROB = 0.02
OUTSIDE_SHARE = 0.06  # of the prior for domains other than the labelled one
REJECTED_SHARE = 0.02
TEMPER = 0.9  # exponent of a round's likelihood: rounds of one request are alike
CHANGE_PROB = 0.01  # that a request's text changes its domain in a round
MIX_RATE = 1.0 / 100.0  # of a round in the shares of domains under a label
LABEL_SHARE = 0.5  # of a labelled round that counts as its label says, whatever its text is like
MIN_WEIGHT = 0.1  # of a domain, under which a round does not count for it


class Shift:
    """By how much the odds of a draft's acceptance are off on all domains alike, as labelled rounds show.

    One Newton step of a logistic regression with a normal prior: accepted less expected tokens over their variance.
    """

    LEARNED = ("excess", "information")
    __slots__ = LEARNED

    def __init__(self) -> None:
        self.excess, self.information = 0.0, SHIFT_PRIOR

    def observe(self, expected: float, information: float, accepted: int) -> None:
        """A round of a labelled request: tokens that were expected to be accepted of those tested, their variance."""
        self.excess += accepted - expected - (self.excess + accepted - expected) / SHIFT_ROUNDS
        self.information += information - (self.information - SHIFT_PRIOR) / SHIFT_ROUNDS

    @property
    def odds(self) -> float:
        return math.exp(min(MAX_SHIFT, max(-MAX_SHIFT, self.excess / self.information)))


class AcceptanceModel:
    """Posterior acceptance by position of one draft on one domain.

    A position's probability is (stored probability x its weight + accepted) / (weight + tested); a position behind a
    rejection was not tested. Counts decay with the domain's own rounds. `reach[j]`: probability that a round accepts
    at least j tokens; `reach[0]` that it proposes any. `tokens[i]`: of a mean round at `lengths[i]`, the bonus token
    included.
    """

    LEARNED = ("_tested", "_accepted", "last", "age")
    __slots__ = (
        "_accepted",
        "_calibration",
        "_odds",
        "_prior",
        "_tested",
        "age",
        "expected",
        "information",
        "last",
        "lengths",
        "reach",
        "shift",
        "tokens",
        "weight",
    )

    def __init__(self, stored: DraftAcceptance, lengths: Sequence[int], shift: Shift | None = None) -> None:
        self.lengths, self.shift = tuple(lengths), shift or Shift()
        self._prior = (stored.propose_prob, *stored.accept_probs)  # index 0: whether anything is proposed
        clipped = [min(1.0 - MIN_PROB, max(MIN_PROB, prob)) for prob in stored.accept_probs]
        self._odds = [prob / (1.0 - prob) for prob in clipped]
        # of the first so many positions: tokens accepted where all are tested, and their variance
        self.expected = [0.0, *accumulate(clipped)]
        self.information = [0.0, *accumulate(prob * (1.0 - prob) for prob in clipped)]
        self.weight = min(MAX_PRIOR_ROUNDS, max(1.0, stored.num_rounds))
        self._tested, self._accepted = [0.0] * len(self._prior), [0.0] * len(self._prior)
        self.last = self.age = 0.0  # rounds of the domain when counts decayed, and since a round was seen
        self._calibration = [1.0] * len(self.lengths)
        self.update()
        self._calibration = [
            (measured - 1.0) / (computed - 1.0) if measured > 1.0 < computed else 1.0
            for measured, computed in zip(stored.mean_tokens, self.tokens, strict=True)
        ]  # rounds of a length start elsewhere in the text than the longest ones, which the probabilities are of
        self.update()

    def observe(self, proposed: int, accepted: int, weight: float, now: float) -> None:
        """Counts a round; `update` makes the figures follow. `now`: rounds of the domain so far."""
        self.decay(now)
        tested, counts = self._tested, self._accepted
        tested[0] += weight
        self.age = now
        if proposed:
            counts[0] += weight
            for position in range(1, accepted + 1):
                tested[position] += weight
                counts[position] += weight
            if accepted < proposed:
                tested[accepted + 1] += weight

    def decay(self, now: float) -> None:
        if now - self.last >= DECAY_ROUNDS:
            factor = 0.5 ** ((now - self.last) / HALF_LIFE_ROUNDS)
            self._tested = [count * factor for count in self._tested]
            self._accepted = [count * factor for count in self._accepted]
            self.last = now

    def update(self) -> None:
        """Recomputes `reach` and `tokens`."""
        weight, product, shift = self.weight, 1.0, self.shift.odds
        reach, priors = [], self._prior
        if shift != 1.0:
            priors = (priors[0], *[odds * shift / (1.0 + odds * shift) for odds in self._odds])
        for prior, tested, accepted in zip(priors, self._tested, self._accepted, strict=True):
            product *= (weight * prior + accepted) / (weight + tested)
            reach.append(product)
        self.reach, tokens, position, total = reach, [], 0, 0.0
        for length, calibration in zip(self.lengths, self._calibration, strict=True):
            total += sum(reach[position + 1 : length + 1])
            position = length
            tokens.append(1.0 + total * calibration)
        self.tokens = tokens

    def error(self, index: int, now: float) -> float:
        """Standard error of `tokens[index]`, which grows while the draft is not run."""
        length = self.lengths[index]
        mean = self.tokens[index] - 1.0
        squares = sum((2 * position - 1) * self.reach[position] for position in range(1, length + 1))
        spread = math.sqrt(max(squares - mean * mean, 0.05) / (self.weight + self._tested[0]))
        return spread * (1.0 + (now - self.age) / AGING_ROUNDS)


class Domains:
    """The policy's domains as components of every request's text; the last one is text that no draft gets right.

    A request starts at the shares of domains under its label, which are learned too, so a wrong label does little harm.
    Every round multiplies in the likelihoods of what was accepted; a round counts for every domain by its weight.
    `rounds[c]` counts the rounds of a domain.
    """

    LEARNED = ("rounds",)

    def __init__(self, prior: Prior) -> None:
        names = dict.fromkeys(stored.domain for stored in prior.acceptance)
        self.names = (*names, REJECTED)
        self.rounds = [0.0] * len(self.names)
        self.mixes: dict[str | None, tuple[list[float], list[float]]] = {}
        stored = {(item.draft, item.domain, item.temperature): item for item in prior.acceptance}
        self.temperatures = sorted({item.temperature for item in prior.acceptance})
        self.models: dict[float, list[list[AcceptanceModel]]] = {}
        for temperature in self.temperatures:
            self.models[temperature] = []
            for draft in range(len(prior.drafts)):
                rows = [stored.get((draft, name, temperature)) for name in names]
                useful = [row for row in rows if row is not None]
                propose_prob = sum(row.propose_prob for row in useful) / max(1, len(useful))
                shift = Shift()
                rejected = _rejected(draft, temperature, propose_prob, prior.lengths)
                self.models[temperature].append(
                    [
                        *(AcceptanceModel(row or rejected, prior.lengths, shift) for row in rows),
                        AcceptanceModel(rejected, prior.lengths),
                    ]
                )

    def start(self, label: str | None) -> list[float]:
        """The shares of domains that a request under this label starts with; do not change the list."""
        return self._mix(label)[0]

    def _mix(self, label: str | None) -> tuple[list[float], list[float]]:
        """Shares under a label: as learned, and as they were at first."""
        mix = self.mixes.get(label)
        if mix is None:
            if len(self.mixes) > 256:  # a caller that puts anything into the label
                self.mixes.clear()
            is_domain = label in self.names[:-1] and label != MIXED
            outside = OUTSIDE_SHARE if is_domain else 1.0 - REJECTED_SHARE
            main = label if is_domain else MIXED
            # beside a label, or one domain alone, other text may be anything; without, it is of one of the domains
            unnamed = 3.0 if is_domain or len(self.names) <= 3 else 0.1
            parts = {name: unnamed if name == MIXED else 1.0 for name in self.names[:-1]}
            first = [*(outside * part / sum(parts.values()) for part in parts.values()), REJECTED_SHARE]
            first[self.names.index(main) if main in self.names else 0] += 1.0 - sum(first)
            mix = self.mixes[label] = list(first), first
        return mix

    def learn(
        self, weights: list[float], label: str | None, models: Sequence[AcceptanceModel], row: tuple[int, int]
    ) -> tuple[list[float], int]:
        """A request's weights after a round of a draft with these models, and the domain that weighs most."""
        proposed, accepted = row
        if accepted < proposed:
            likelihoods = [model.reach[accepted] - model.reach[accepted + 1] for model in models]
        else:
            likelihoods = [model.reach[accepted] if proposed else 1.0 - model.reach[0] for model in models]
        scores = [weight * likelihood**TEMPER for weight, likelihood in zip(weights, likelihoods, strict=True)]
        total = sum(scores)
        mix, first = self._mix(label)
        stay = (1.0 - CHANGE_PROB) / total if total > 1e-30 else 0.0
        leave = CHANGE_PROB if stay else 1.0
        after = [stay * score + leave * share for score, share in zip(scores, mix, strict=True)]
        mix[:] = [
            share + MIX_RATE * (0.98 * weight + 0.02 * start - share)
            for share, weight, start in zip(mix, after, first, strict=True)
        ]
        # a draft that turned useless looks like text that none gets right: those rounds count for the domains too
        lost = after[-1] / max(1e-9, 1.0 - mix[-1])
        heaviest, most = 0, 0.0
        labelled = self.names.index(label) if label in self.names else -1
        label_share = 0.0
        if labelled >= 0:
            label_share = LABEL_SHARE
            model, tested = models[labelled], min(proposed, accepted + 1)
            model.shift.observe(model.expected[tested], model.information[tested], accepted)
        for index in range(len(after) - 1):
            weight = (1.0 - label_share) * (after[index] + lost * mix[index]) + (
                label_share if index == labelled else 0.0
            )
            if weight > MIN_WEIGHT:  # squared: rounds of uncertain domains would make these alike
                self.rounds[index] += weight * weight
                models[index].observe(proposed, accepted, weight * weight, self.rounds[index])
            if weight > most:
                heaviest, most = index, weight
        return after, heaviest

    def parts(self) -> Iterator[Any]:
        """What learns, for snapshots; the shares under labels are apart."""
        yield self
        for drafts in self.models.values():
            for models in drafts:
                yield from (*models, models[0].shift)


def _rejected(draft: int, temperature: float, propose_prob: float, lengths: Sequence[int]) -> DraftAcceptance:
    """A draft that gets next to nothing right."""
    reach = [propose_prob * REJECTED_ACCEPT_PROB**position for position in range(1, lengths[-1] + 1)]
    return DraftAcceptance(
        draft=draft,
        domain=REJECTED,
        temperature=temperature,
        propose_prob=propose_prob,
        accept_probs=(REJECTED_ACCEPT_PROB,) * lengths[-1],
        mean_tokens=tuple(1.0 + sum(reach[:length]) for length in lengths),
        num_rounds=0.0,
    )
