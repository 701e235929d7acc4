"""What every setup yields at one batch size, context and temperature."""

from collections.abc import Collection, Iterator, Sequence
from math import exp
from operator import mul, sub

from profiles.records.core import PLAIN, Setup
from tuner.policy.prior import Prior, RoundTimes
from tuner.selector.acceptance import Domains
from tuner.selector.round_time import RoundTimeModel

Arm = tuple[int, int]  # option, index of its length
PLAIN_ARM: Arm = (0, 0)
MIN_SHARE = 0.02  # of a domain in a batch, under which it says nothing
REMAINING_ROUNDS = 16.0  # of a request
UNHEARD_DISCOUNT = 0.03  # of what was forecast and never run here
MAX_DOUBT = 0.15
DOUBT_ROUNDS = 64.0  # of a setup, after which half of the policy's doubt is left
HEARD_ROUNDS = 8.0  # after which half of the discount is left


class Point:
    """Expected tokens per second of a row, by option and length; option 0 is plain decoding.

    Seconds are those of the machine when it was measured: its factor is common to all options. `best[c]` is the best
    setup for text of domain c; it is kept up to date in turn, one option and domain a round.

    Args:
        plain: plain decoding's round times here.
        times: a draft's, by its number in the prior.
        usable: names of the drafts that may be used; None: all.
        baseline: whose time plain decoding takes, see `Selector`.
    """

    def __init__(
        self,
        prior: Prior,
        domains: Domains,
        plain: RoundTimes,
        times: dict[int, RoundTimes],
        *,
        usable: Collection[str] | None,
        max_length: int | None,
        baseline: str,
    ) -> None:
        self.batch_size, self._domains, self._baseline = plain.batch_size, domains, baseline
        self.temperature = min(domains.temperatures, key=lambda value: abs(value - plain.temperature))
        longest = {
            draft: min(row.max_length, max_length or row.max_length)
            for draft, row in times.items()
            if usable is None or prior.drafts[draft].name in usable
        }
        self.lengths = [(0,), *(tuple(k for k in prior.lengths if k <= longest[draft]) for draft in longest)]
        drafts = [draft for draft, lengths in zip(longest, self.lengths[1:], strict=True) if lengths]
        self.lengths = [lengths for lengths in self.lengths if lengths]
        self.drafts = (-1, *drafts)  # by option: number in the prior
        # a look-up without a match takes a plain round; a model drafts in every round
        self.is_lookup = (True, *(prior.drafts[draft].kind == "ngram" for draft in drafts))
        self.setups = [
            [PLAIN],
            *(
                [Setup(draft=prior.drafts[draft], length=length) for length in lengths]
                for draft, lengths in zip(drafts, self.lengths[1:], strict=True)
            ),
        ]
        self.times = RoundTimeModel(
            [plain.seconds, *(times[draft].seconds for draft in drafts)], [len(lengths) for lengths in self.lengths]
        )
        self.catch_up_s = (0.0, *(times[draft].catch_up_s * plain.context_length / 2 for draft in drafts))
        models = domains.models[self.temperature]
        self.models = ([], *(models[draft] for draft in drafts))
        self._by_id = {id(setup): arm for setup, arm in self._arms()}
        self.costs = [[0.0] for _ in self.lengths]
        self._factors = [[1.0] * len(lengths) for lengths in self.lengths]
        self.chosen: set[Arm] = set()  # by the policy, on any domain
        self._peaks: list[list[tuple[float, int]]] = [[(0.0, 0)] * len(self.lengths) for _ in domains.names]
        self.best = [PLAIN_ARM] * len(domains.names)
        self._turn = 0
        self.update()

    def find(self, setup: Setup) -> Arm | None:
        """None: it is not an option here."""
        arm = self._by_id.get(id(setup))  # fast for setups that were handed out; others may equal one
        return arm if arm is not None else next((arm for each, arm in self._arms() if each == setup), None)

    def _arms(self) -> Iterator[tuple[Setup, Arm]]:
        for option, setups in enumerate(self.setups):
            for index, setup in enumerate(setups):
                yield setup, (option, index)

    @property
    def plain_s(self) -> float:
        """Seconds of a round of the baseline."""
        return self.costs[0][0] if self._baseline == "k0" else self.times.seconds[0][0]

    def round_s(self, arm: Arm, proposed: int) -> float:
        """Seconds of a round whose widest row proposes so many."""
        option, index = arm
        if not proposed and self.is_lookup[option]:
            return self.times.seconds[option][0] * self._factors[0][0]
        return self.times.seconds[option][proposed] * self._factors[option][index]

    def value(self, arm: Arm, shares: Sequence[tuple[float, int]], *, extra_s: float = 0.0) -> float:
        """Tokens per second of a mean row; `shares`: (share, domain). `extra_s`: what a round takes besides."""
        option, index = arm
        if not option:
            return 1.0 / self.costs[0][0]
        models, tokens, proposes = self.models[option], 0.0, 0.0
        for share, domain in shares:
            model = models[domain]
            tokens += share * model.tokens[index]
            proposes += share * model.reach[0]
        proposes = self._proposes(option, proposes)
        idle_s = self.times.seconds[option][0] * self._factors[0][0]
        return tokens / (idle_s + proposes * (self.costs[option][index] - idle_s) + extra_s)

    def _proposes(self, option: int, prob: float) -> float:
        """How likely a round drafts, by how likely a row does."""
        if not self.is_lookup[option]:
            return 1.0
        return prob if self.batch_size == 1 else 1.0 - (1.0 - prob) ** self.batch_size

    def informed(self, arms: Sequence[Arm], weights: Sequence[float], extra_s: Sequence[float]) -> Arm:
        """Of these setups the best for a request of an unknown domain, with what a round of it tells.

        A round is worth its tokens per second and, for the rest of the request, its part of what knowing the domain
        would gain: by how much the expected sum of squared weights grows when it accepts a token or does not.

        Args:
            extra_s: by setup, seconds that changing to it takes.
        """
        rates = [[self.value(arm, ((1.0, domain),)) for domain in range(len(weights))] for arm in arms]
        now = [sum(map(mul, row, weights)) for row in rates]
        best, purity = max(now), sum(map(mul, weights, weights))
        gain = sum(map(mul, weights, map(max, zip(*rates, strict=True)))) - best
        worth = []
        for (option, _), rate, seconds in zip(arms, now, extra_s, strict=True):
            gained = 0.0
            if option:
                some = [weight * model.reach[1] for weight, model in zip(weights, self.models[option], strict=True)]
                none = list(map(sub, weights, some))
                after = sum([sum(map(mul, part, part)) / max(sum(part), 1e-9) for part in (some, none)])
                gained = (after - purity) / (1.0 - purity)
            worth.append(rate + REMAINING_ROUNDS * gained * gain - best * best * seconds / REMAINING_ROUNDS)
        return arms[worth.index(max(worth))]

    def error(self, arm: Arm, shares: Sequence[tuple[float, int]], now: int) -> float:
        """Relative standard error of a value."""
        option, index = arm
        variance = self.times.relative_error(option, now) ** 2
        if option:
            rounds, models = self._domains.rounds, self.models[option]
            tokens = sum(share * models[domain].tokens[index] for share, domain in shares)
            spread = sum(share * models[domain].error(index, rounds[domain]) for share, domain in shares)
            variance += (spread / tokens) ** 2
        return float(variance**0.5)

    def doubt(self, arm: Arm, domain: str) -> float:
        """By how much the best setup exceeds this one on a domain, by the figures so far."""
        if domain not in self._domains.names:
            return 0.0
        number = self._domains.names.index(domain)
        shares = ((1.0, number),)
        return max(0.0, min(MAX_DOUBT, self.value(self.best[number], shares) / self.value(arm, shares) - 1.0))

    def discount(self, arm: Arm, doubt: float) -> float:
        """Factor of the value of a setup that was only forecast.

        Args:
            doubt: by how much a setup must be better by the prior that the policy did not choose.
        """
        option, index = arm
        heard, alike = self.times.drafts[option].rounds, self.times.lengths[option][index].rounds
        unheard = UNHEARD_DISCOUNT * HEARD_ROUNDS / (HEARD_ROUNDS + heard)
        doubt = 0.0 if arm in self.chosen else doubt * DOUBT_ROUNDS / (DOUBT_ROUNDS + alike)
        return 1.0 - unheard - doubt

    def peak_index(self, option: int, domain: int) -> int:
        """The index of an option's best length on a domain."""
        return self._peaks[domain][option][1]

    def refresh(self, option: int, domain: int) -> None:
        """Recomputes an option's costs and its best length on a domain."""
        draft, seconds = self.times.drafts[option].log, self.times.seconds[option]
        self._factors[option] = factors = [exp(draft + length.log) for length in self.times.lengths[option]]
        self.costs[option] = costs = [
            seconds[length] * factor for length, factor in zip(self.lengths[option], factors, strict=True)
        ]
        if not option:
            peak = 1.0 / costs[0], 0
        else:
            model = self.models[option][domain]
            proposes = self._proposes(option, model.reach[0])
            idle_s = (1.0 - proposes) * self.round_s((option, 0), 0)
            rates = [tokens / (idle_s + proposes * cost) for tokens, cost in zip(model.tokens, costs, strict=False)]
            rate = max(rates)
            peak = rate, rates.index(rate)
        peaks = self._peaks[domain]
        peaks[option] = peak
        best = max(peaks)
        option = peaks.index(best)
        self.best[domain] = option, best[1]

    def refresh_after(self, option: int, domain: int) -> None:
        """After a round of an option on text of a domain: recomputes a part of its figures, or of others in turn."""
        turn = self._turn = (self._turn + 1) % (4 * len(self.lengths) * len(self.best))
        if turn % 4 > 1:
            option, domain = divmod(turn // 4, len(self.best))
        if turn % 2:
            self.refresh(option, domain)
        elif option:
            self.models[option][domain].update()
        else:
            self.times.update()

    def update(self) -> None:
        """Recomputes everything."""
        self._turn = 0
        self.times.update()
        for option, models in enumerate(self.models):
            for domain in range(len(self.best)):
                if models:
                    models[domain].update()
                self.refresh(option, domain)
