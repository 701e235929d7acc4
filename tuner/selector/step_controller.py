"""The rounds of a server's batch under a selector: each step verifies one decision's drafts and drafts for the next."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiles.engines.base import RequestInfo, RoundDecision, RoundReport
from profiles.records.core import Setup
from profiles.records.evidence import RoundCount
from tuner.selector.policy_file import PolicyFile
from tuner.selector.selector import SelectorStats


class Plan(NamedTuple):
    """How many drafted tokens of a request its next round verifies, and the decision that says so."""

    decision: RoundDecision
    length: int


@dataclass(slots=True)
class Step:
    """A scheduled step: the rows whose drafts it verifies, with the tokens proposed.

    `prefills`: it also reads text. `drafts_for`: the setup that its rows draft for, and how many tokens.
    """

    started_s: float
    rows: Mapping[str, tuple[Plan, int]]
    prefills: bool
    drafts_for: tuple[Setup, int] | None = None


class StepController:
    """Pairs decisions with the steps that verify their drafts, whatever joined or left the batch between.

    Args:
        policy_file: re-read when it is replaced.
        per_request: requests of a batch may get lengths of their own.
    """

    def __init__(self, policy_file: PolicyFile, *, per_request: bool) -> None:
        self.policy_file = policy_file
        self.per_request = per_request
        self.plans: dict[str, Plan] = {}
        self._busy_since_s: float | None = None  # the end of the latest step; None: nothing was left to do

    @property
    def stats(self) -> SelectorStats:
        return self.policy_file.selector.stats()

    @property
    def is_stale(self) -> bool:
        """Whether the newest policy file could not be read, so that the one before it holds."""
        return self.policy_file.error is not None

    def verify(self, num_drafted: Mapping[str, int], *, started_s: float, prefills: bool) -> Step:
        """The step that verifies so many drafted tokens of each decoding request; those without a plan are left out."""
        rows = {name: (self.plans.pop(name), count) for name, count in num_drafted.items() if name in self.plans}
        return Step(started_s=started_s, rows=rows, prefills=prefills)

    def decide(self, step: Step, requests: Sequence[RequestInfo]) -> int:
        """Plans the next round of these requests, which `step` drafts for. Returns the most tokens of any of them."""
        if not requests:
            return 0
        decision = self.policy_file.selector.choose(requests=requests, per_request=self.per_request)
        lengths = decision.lengths or (decision.setup.length,) * len(requests)
        self.plans |= {
            str(request.id): Plan(decision, length) for request, length in zip(requests, lengths, strict=True)
        }
        step.drafts_for = decision.setup, max(lengths)
        return max(lengths)

    def forget(self, names: Iterable[str]) -> None:
        """Drops requests that ended."""
        names = tuple(names)
        for name in names:
            self.plans.pop(name, None)
        if names:
            self.policy_file.selector.finish(names)

    def report(self, step: Step, num_emitted: Mapping[str, int], ended_s: float, *, idle: bool) -> None:
        """Reports a step's rows that emitted tokens.

        Its seconds are those of a round where its rows share one decision and draft for the next as that one did: it
        verifies one decision's tokens and drafts another's. They count from the end of the step before, where that did
        not leave the server `idle`.
        """
        seconds = ended_s - (step.started_s if self._busy_since_s is None else self._busy_since_s)
        self._busy_since_s = None if idle else ended_s
        groups: dict[int, list[tuple[str, Plan, RoundCount]]] = {}
        for name, (plan, proposed) in step.rows.items():
            if emitted := num_emitted.get(name, 0):
                counted = RoundCount(proposed, min(proposed, emitted - 1))
                groups.setdefault(id(plan.decision), []).append((name, plan, counted))
        for group in groups.values():
            names, plans, counts = zip(*group, strict=True)
            decision = plans[0].decision
            verifies = decision.setup, max(decision.lengths, default=decision.setup.length)
            is_timed = len(groups) == 1 and not step.prefills and step.drafts_for == verifies
            self.policy_file.selector.observe(RoundReport(decision, counts, seconds if is_timed else None, ids=names))
