"""What every setup yields at one batch size, context and temperature."""

from collections.abc import Collection, Mapping, Sequence
from operator import mul, sub, truediv

from profiles.records.core import PLAIN, Setup, digest_of
from tuner.policy.prior import Prior, RoundTimes
from tuner.selector.acceptance import Domains, DraftModels
from tuner.selector.round_time import RoundTimeModel

Arm = tuple[int, int]  # option, index of its length
PLAIN_ARM: Arm = (0, 0)
REMAINING_ROUNDS = 16.0  # of a request
REFRESH_ROWS = 4  # between two parts of the figures that are recomputed
MIN_SHARE = 0.02  # of a domain in a batch, under which it says nothing


class Point:
    """Expected tokens per second of a row, by option and length; option 0 is plain decoding.

    Seconds are those of the machine when it was measured: its factor is common to all options. `costs[option][index]`:
    seconds of a round that proposes. `best[c]`: the best setup for text of domain c, kept up to date in turn.

    Args:
        times: round times of plain decoding (None) and of drafts, by their number in the prior.
        usable: names of the drafts that may be used; None: all.
        baseline: whose time plain decoding takes, see `Selector`.
    """

    def __init__(
        self,
        prior: Prior,
        domains: Domains,
        times: Mapping[int | None, RoundTimes],
        *,
        usable: Collection[str] | None,
        max_length: int | None,
        baseline: str,
    ) -> None:
        plain = times[None]
        self.batch_size, self.temperature, self._baseline = plain.batch_size, plain.temperature, baseline
        self._domains = domains
        self.lengths: list[Sequence[int]] = [(0,)]
        self.drafts = [-1]  # by option: number in the prior
        for number, draft in enumerate(prior.drafts):
            if number in times and (usable is None or draft.name in usable):
                longest = min(times[number].max_length, prior.lengths[-1] if max_length is None else max_length)
                if lengths := [length for length in prior.lengths if length <= longest]:
                    self.lengths.append(lengths)
                    self.drafts.append(number)
        self.setups = [[PLAIN]] + [
            [Setup(draft=prior.drafts[number], length=length) for length in lengths]
            for number, lengths in zip(self.drafts[1:], self.lengths[1:], strict=True)
        ]
        self._arms = [(setup, (o, i)) for o, setups in enumerate(self.setups) for i, setup in enumerate(setups)]
        self._by_id = {id(setup): arm for setup, arm in self._arms}
        # a look-up without a match takes a plain round; a model drafts in every round
        self.is_lookup = [False, *(prior.drafts[number].kind == "ngram" for number in self.drafts[1:])]
        rows = [plain, *(times[number] for number in self.drafts[1:])]
        self.seconds = [row.seconds for row in rows]
        self.catch_up_s = [row.catch_up_s * plain.context_length / 2 for row in rows]
        models = domains.nearest(plain.temperature)
        self.models = [DraftModels(()), *(models[number] for number in self.drafts[1:])]
        where = plain.batch_size, plain.context_length, plain.temperature
        key = digest_of([*where, [setup.digest for setup, _ in self._arms], self.seconds])
        self.times = RoundTimeModel([len(lengths) for lengths in self.lengths], key)
        self.costs = [[0.0] * len(lengths) for lengths in self.lengths]
        # by option: tokens of a mean round by length and domain, and by domain how likely a row proposes any
        self._tokens = [[[1.0] * len(domains.names) for _ in lengths] for lengths in self.lengths]
        self._proposes = [[0.0] * len(domains.names) for _ in self.lengths]
        # by domain and option the highest tokens per second, and its length
        self._peaks = [[(0.0, 0)] * len(self.lengths) for _ in domains.names]
        self.best, self._best_rates = [PLAIN_ARM] * len(domains.names), [0.0] * len(domains.names)
        self.plain_s = self.seconds[0][0]  # of a round of the baseline
        # by domain and option: what its figures rest on, as far as that changes
        self._bases: list[list[tuple[int, float, int] | None]] = []
        self._turn = self._rows = 0
        self.update()

    def find(self, setup: Setup) -> Arm | None:
        """None: it is not an option here."""
        arm = self._by_id.get(id(setup))  # fast for setups that were handed out; others may equal one
        return arm if arm is not None else next((arm for each, arm in self._arms if each == setup), None)

    def round_s(self, arm: Arm, proposed: int) -> float:
        """Seconds of a round whose widest row proposes so many."""
        option, index = arm
        length = self.lengths[option][index]
        if proposed == length:
            return self.costs[option][index]
        seconds = self.seconds[option]
        if not proposed and self.is_lookup[option]:
            return seconds[0] * self.costs[0][0] / self.seconds[0][0]
        return seconds[proposed] * self.costs[option][index] / seconds[length]

    def value(self, arm: Arm, weights: Sequence[float], extra_s: float = 0.0) -> float:
        """Tokens per second of a mean row; `weights`: of domains in its text. `extra_s`: what a round takes besides."""
        option, index = arm
        mean_s = self.costs[option][index]
        if not option:
            return sum(weights) / (mean_s + extra_s)
        tokens: float = sum(map(mul, weights, self._tokens[option][index]))
        if self.is_lookup[option]:
            (mean_s,) = self._mean_s(option, (mean_s,), sum(map(mul, weights, self._proposes[option])))
        return tokens / (mean_s + extra_s)

    def _mean_s(self, option: int, costs: Sequence[float], proposes: float) -> list[float]:
        """Seconds of a look-up's mean rounds by those of rounds that draft, and by how likely a row proposes."""
        nothing = (1.0 - proposes) ** self.batch_size
        nothing_s, drafts = nothing * self.round_s((option, 0), 0), 1.0 - nothing
        return [nothing_s + drafts * cost for cost in costs]

    def informed(self, worth: Mapping[Arm, float], weights: Sequence[float]) -> dict[Arm, float]:
        """The worth of setups for a request of an unknown domain, with that of what a round tells of it.

        For the rest of the request that is its part of what knowing the domain would gain: by how much the expected sum
        of squared weights grows when the round accepts a token or does not.
        """
        purity, answer = sum(map(mul, weights, weights)), dict(worth)
        gain = sum(map(mul, weights, self._best_rates)) - max(worth.values())
        for option, index in worth:
            if option:
                models = self.models[option].models
                accepts = [weight * model.reach[1] for weight, model in zip(weights, models, strict=True)]
                parts = accepts, list(map(sub, weights, accepts))
                after = sum([sum(map(mul, part, part)) / max(sum(part), 1e-9) for part in parts])
                answer[option, index] += REMAINING_ROUNDS * gain * (after - purity) / (1.0 - purity)
        return answer

    def error(self, arm: Arm, domain: int, now: int) -> float:
        """Relative standard error of a value on a domain."""
        option, index = arm
        model = self.models[option].models[domain]
        tokens_error = model.error(index, self._domains.rounds[domain]) / model.tokens[index]
        return float((self.times.relative_error(option, now) ** 2 + tokens_error**2) ** 0.5)

    def peak(self, option: int, domain: int) -> Arm:
        """An option's best length on a domain."""
        return option, self._peaks[domain][option][1]

    def refresh(self, option: int, domain: int) -> None:
        """Recomputes an option's costs, and its figures on a domain, unless nothing they rest on has changed."""
        model = self.models[option].models[domain] if option else None
        basis = self.times.changes[option], self.costs[0][0], 0 if model is None else model.changes
        if self._bases[domain][option] == basis:
            return
        self._bases[domain][option] = basis
        stored, factors, peaks = self.seconds[option], self.times.factors(option), self._peaks[domain]
        costs = [stored[length] * factor for length, factor in zip(self.lengths[option], factors, strict=True)]
        self.costs[option], rates = costs, [1.0 / costs[0]]
        if model is None:
            if self._baseline == "k0":
                self.plain_s = costs[0]
        else:
            self.models[option].update(domain)
            self._proposes[option][domain] = model.reach[0]
            for row, tokens in zip(self._tokens[option], model.tokens, strict=False):  # longer ones are not allowed
                row[domain] = tokens
            if self.is_lookup[option]:
                costs = self._mean_s(option, costs, model.reach[0])
            rates = list(map(truediv, model.tokens, costs))
        rate = max(rates)
        peaks[option] = rate, rates.index(rate)
        best = max(peaks)
        self.best[domain], self._best_rates[domain] = (peaks.index(best), best[1]), best[0]

    def refresh_after(self, option: int, domains: Sequence[int]) -> None:
        """After a round of an option on rows of these domains: recomputes its figures, or others in turn."""
        self._rows += len(domains)
        while self._rows >= REFRESH_ROWS:
            self._rows -= REFRESH_ROWS
            self._turn += 1
            if self._turn % 2:
                self.refresh(option, domains[self._turn // 2 % len(domains)])
            else:
                self.times.update()
                self.refresh(*divmod(self._turn // 2 % (len(self.lengths) * len(self.best)), len(self.best)))

    def update(self) -> None:
        """Recomputes everything."""
        self._turn = self._rows = 0
        self._bases = [[None] * len(self.lengths) for _ in self.best]
        self.times.update()
        for option in range(len(self.lengths)):
            for domain in range(len(self.best)):
                self.refresh(option, domain)
