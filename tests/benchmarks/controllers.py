"""Controllers to compare a selector with: look-ups, the rule that one would write first, and an oracle."""

from collections.abc import Callable, Hashable, Iterable, Sequence

from profiles.engines.base import RoundDecision, RoundReport
from profiles.records.core import PLAIN, Setup
from tuner.policy.policy import Policy
from tuner.policy.query import MIXED
from tuner.selector.acceptance import AcceptanceModel


def picked(setup: Setup) -> RoundDecision:
    """A pick that rests on no measured point: these controllers have none."""
    return RoundDecision(setup, True, 1, 1, MIXED, 0.0)


class Controller:
    """Learns nothing of requests that end."""

    def observe(self, report: RoundReport) -> bool:
        return True

    def finish(self, requests: Iterable[Hashable]) -> None: ...


class Fixed(Controller):
    """Always the same setup."""

    def __init__(self, setup: Setup) -> None:
        self._decision = picked(setup)

    def choose(self, **_: object) -> RoundDecision:
        return self._decision


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
