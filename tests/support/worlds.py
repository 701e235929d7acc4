"""A made-up world that plays rounds for a selector: its chances and times are known, so what is right is known."""

import random
from dataclasses import dataclass, field
from typing import Any

from profiles.engines.base import RoundDecision, RoundReport
from profiles.records.core import PLAIN, Setup
from tests.support.policies import CODE_DRAFT, NGRAM
from tuner.selector.selector import Selector

NGRAM8, CODE2 = Setup(draft=NGRAM, length=8), Setup(draft=CODE_DRAFT, length=2)


@dataclass
class World:
    """Plays rounds; by draft the chances that it proposes and that a position is kept, and seconds a proposed token."""

    hit: dict[object, float] = field(default_factory=lambda: {NGRAM: 0.5, CODE_DRAFT: 1.0})
    keep: dict[object, float] = field(default_factory=lambda: {NGRAM: 0.8, CODE_DRAFT: 0.6})
    step_s: dict[object, float] = field(default_factory=lambda: {NGRAM: 0.001, CODE_DRAFT: 0.003})
    slowness: float = 1.0
    noise: float = 0.03
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    tokens: int = 0
    seconds: float = 0.0
    picks: list[RoundDecision] = field(default_factory=list)

    def play(self, selector: Selector, rounds: int, **question: Any) -> list[RoundDecision]:
        """The picks of so many rounds."""
        first = len(self.picks)
        for _ in range(rounds):
            pick = selector.choose(**question)
            proposed = accepted = 0
            draft = pick.setup.draft
            if draft is not None and self.rng.random() < self.hit[draft]:
                proposed = pick.setup.length
                while accepted < proposed and self.rng.random() < self.keep[draft]:
                    accepted += 1
            seconds = (0.01 + proposed * self.step_s.get(draft, 0.0)) * self.slowness
            seconds *= self.rng.uniform(1.0 - self.noise, 1.0 + self.noise)
            rows = ((proposed, accepted),) * max(1, len(pick.requests))
            assert selector.observe(RoundReport(pick, rows, seconds))
            self.tokens += accepted + 1
            self.seconds += seconds
            self.picks.append(pick)
        return self.picks[first:]


def drafted(picks: list[RoundDecision]) -> float:
    """Share of the rounds that drafted, probes aside."""
    return sum(pick.setup != PLAIN and not pick.probe for pick in picks) / len(picks)
