"""Controllers to compare a selector with: look-ups, the obvious rule, a published adaptive rule, and an oracle.

`Simple` is the rule one would write first. `Ema` is written from a description of SGLang's adaptive speculation: an
exponential average of accepted tokens with hysteresis over one draft's step counts.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from profiles.engines.base import RoundDecision, RoundReport
from profiles.records.core import PLAIN, Draft, Setup
from tuner.policy.policy import Policy
from tuner.policy.query import MIXED
from tuner.selector.acceptance import AcceptanceModel

EMA_STEPS: Mapping[int, tuple[int, ...]] = {1: (1, 3, 5, 7), 8: (0, 1, 3), 32: (0, 1), 64: (0,)}  # SGLang's defaults
EMA_WEIGHT, EMA_INTERVAL, EMA_WARM_UP = 0.2, 5, 10
EMA_DOWN, EMA_UP = -0.25, 0.0  # moves the thresholds half a token under a step count


def picked(setup: Setup) -> RoundDecision:
    """A pick that rests on no measured point: these controllers have none."""
    return RoundDecision(setup, True, 1, 1, MIXED, 0.0)


class Controller:
    """Learns nothing of requests that end."""

    def observe(self, report: RoundReport) -> bool:
        return True

    def finish(self, requests: Iterable[Hashable]) -> None: ...


class Table(Controller):
    """Looks the setup up by (rows, domain); learns nothing."""

    def __init__(self, look_up: Callable[[int, str | None], Setup]) -> None:
        self._look_up = look_up

    def choose(self, *, batch_size: int | None = None, domain: str | None = None, **_: object) -> RoundDecision:
        return picked(self._look_up(batch_size or 1, domain))


class Simple(Controller):
    """The obvious rule: acceptance by draft and labelled domain with a stored prior, a factor for every setup's time.

    The setup of the highest expected goodput, when it is 2 % above the present one, at most every 8 rounds; one plain
    round in 256. It has no bound, no probes, and no notion of a request.
    """

    def __init__(self, policy: Policy) -> None:
        prior = policy.prior
        self._policy, self._lengths = policy, prior.lengths
        self._models = {
            (prior.drafts[row.draft], row.domain): AcceptanceModel(row, prior.lengths) for row in prior.acceptance
        }
        self._seconds = {
            (None if row.draft is None else prior.drafts[row.draft], row.batch_size): row.seconds
            for row in prior.round_times
        }
        self._batches = sorted({row.batch_size for row in prior.round_times})
        self._setups = [PLAIN, *(Setup(draft=draft, length=k) for draft in prior.drafts for k in prior.lengths)]
        self._factors: dict[tuple[Setup, int], float] = {}
        self._in_use: dict[tuple[int, str], Setup] = {}
        self._num_rounds = 0

    def choose(self, *, batch_size: int | None = None, domain: str | None = None, **_: object) -> RoundDecision:
        size = min(size for size in self._batches if size >= (batch_size or 1))
        point = size, domain or MIXED
        if point not in self._in_use:
            self._in_use[point] = self._policy.look_up(batch_size=size, domain=domain).choice.setup
        self._num_rounds += 1
        if self._num_rounds % 8 == 0:
            present = self._in_use[point]
            best = max(self._setups, key=lambda setup: self._rate(setup, *point))
            if self._rate(best, *point) > 1.02 * self._rate(present, *point):
                self._in_use[point] = best
        setup = PLAIN if self._num_rounds % 256 == 0 else self._in_use[point]
        return RoundDecision(setup, True, size, 1, point[1], 0.0)

    def observe(self, report: RoundReport) -> bool:
        decision, seconds = report.decision, report.seconds
        setup, size = decision.setup, decision.batch_size
        stored_s = self._seconds[setup.draft, size][max(proposed for proposed, _ in report.rows)]
        factor = self._factors.get((setup, size), 1.0)
        self._factors[setup, size] = factor + ((seconds or stored_s) / stored_s - factor) / 32.0
        if setup.draft is not None:
            model = self._models[setup.draft, decision.domain]
            for proposed, accepted in report.rows:
                model.observe(proposed, accepted, 1.0, model.last + 1.0)
            model.update()
        return True

    def _rate(self, setup: Setup, size: int, domain: str) -> float:
        seconds, factor = self._seconds[setup.draft, size], self._factors.get((setup, size), 1.0)
        if setup.draft is None:
            return 1.0 / (seconds[0] * factor)
        model = self._models[setup.draft, domain]
        proposes = 1.0 - (1.0 - model.reach[0]) ** size
        round_s = factor * (proposes * seconds[setup.length] + (1.0 - proposes) * seconds[0])
        return model.tokens[self._lengths.index(setup.length)] / round_s


class Ema(Controller):
    """SGLang's rule on one draft: one more step than the average round keeps, by batch size; no notion of cost."""

    def __init__(self, draft: Draft, first_length: int, steps: Mapping[int, tuple[int, ...]] = EMA_STEPS) -> None:
        self._draft = draft
        self._slots = {size: _Slot(candidates, first_length) for size, candidates in steps.items()}

    def choose(self, *, batch_size: int | None = None, **_: object) -> RoundDecision:
        length = self._slot(batch_size or 1).steps
        setup = Setup(draft=self._draft, length=length) if length else PLAIN
        return picked(setup)

    def observe(self, report: RoundReport) -> bool:
        self._slot(len(report.rows)).update([accepted for _, accepted in report.rows])
        return True

    def _slot(self, batch_size: int) -> "_Slot":
        return self._slots[max(size for size in self._slots if size <= max(batch_size, min(self._slots)))]


class _Slot:
    """The step count for one batch size."""

    def __init__(self, candidates: Sequence[int], first: int) -> None:
        self._candidates = sorted(candidates)
        self.steps = first if first in candidates else self._candidates[len(candidates) // 2]
        self._average = self.steps - 1.0
        self._rounds = 0

    def update(self, accepted: Sequence[int]) -> None:
        if self.steps > 0:
            self._average += EMA_WEIGHT * (sum(accepted) / len(accepted) - self._average)
        self._rounds += 1
        if self._rounds > EMA_WARM_UP and (self._rounds - EMA_WARM_UP) % EMA_INTERVAL == 0:
            self.steps = self._next()

    def _next(self) -> int:
        index = first_index = self._candidates.index(self.steps)
        if self.steps == 0 and len(self._candidates) > 1:  # the smallest count is tried again
            self._average = max(self._average, self._candidates[1] - 1.0) if self._average < 0.0 else self._average
            return self._candidates[1]
        while index > 0 and self._average <= max(0.5, self._candidates[index - 1] - 0.5) + EMA_DOWN:
            index -= 1
        if index == first_index:
            while index < len(self._candidates) - 1 and self._average > self._candidates[index] - 0.5 + EMA_UP:
                index += 1
        return self._candidates[index]


class Oracle(Controller):
    """At batch 1, of every request of a stream the setup that is best for it, known beforehand.

    `requests`: (setup, tokens its rounds will emit) in the order of the stream.
    """

    def __init__(self, requests: Sequence[tuple[Setup, int]]) -> None:
        self._ahead = [(setup, tokens) for setup, tokens in reversed(requests) if tokens > 0]
        self._left = self._ahead[-1][1] if self._ahead else 0

    def choose(self, **_: object) -> RoundDecision:
        return picked(self._ahead[-1][0])

    def observe(self, report: RoundReport) -> bool:
        ((_, accepted),) = report.rows
        self._left -= accepted + 1
        if self._left <= 0:
            self._ahead.pop()
            self._left = self._ahead[-1][1] if self._ahead else 0
        return True
