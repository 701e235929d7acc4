"""What a selector holds of one policy: its operating points, with the acceptance and times that they share."""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from profiles.engines.base import RoundDecision
from profiles.records.core import PLAIN, Draft, Setup, digest_of
from tuner.policy.policy import Choice, Policy, to_json
from tuner.policy.prior import Prior
from tuner.policy.query import MIXED
from tuner.selector.acceptance_model import AcceptanceModel
from tuner.selector.index import PolicyIndex
from tuner.selector.operating_point import DraftOption, PointState
from tuner.selector.round_time import RoundTimeModel

CACHED_QUERIES = 4096


class SelectorState:
    """The operating points of a policy.

    Acceptance belongs to (draft, domain, temperature), times to (draft, batch size, context, temperature). A choice
    that the policy's prior does not cover is applied as it stands: its point has no options.

    Args:
        drafts: names of the drafts that may be used; None: all.
    """

    def __init__(self, policy: Policy, drafts: Collection[str] | None) -> None:
        self.policy = policy
        self.drafts = drafts
        self.digest = digest_of(to_json(policy))
        self.uncovered = RoundDecision(PLAIN, False, 1, 1, MIXED, 0.0)
        self._index = PolicyIndex(policy)
        self.find = lru_cache(CACHED_QUERIES)(self._find)
        self._draft_digests: tuple[str, ...] = ()
        self._acceptance: dict[tuple[str, str, float], AcceptanceModel] = {}
        self._times: dict[tuple[str | None, int, int, float], RoundTimeModel] = {}
        if policy.prior is not None:
            self._take_prior(policy.prior)
        self.points: dict[tuple[int, int, str, float], PointState] = {
            choice.point: self._point_state(choice) for choice in policy.choices
        }

    def _find(
        self, batch_size: int, context_length: int | None, domain: str | None, temperature: float
    ) -> PointState | None:
        """The point that covers a query; None: plain decoding. Raises InputError."""
        point = self._index.find(batch_size, context_length, domain, temperature)
        return None if point is None else self.points[point]

    def take_over(self, earlier: "SelectorState", now: int) -> None:
        """Goes on from what was learned of the same drafts on the same domains at the same lengths."""
        for key, model in self._acceptance.items():
            learned = earlier._acceptance.get(key)
            if learned is not None and learned.lengths == model.lengths:
                model.restore(learned.snapshot())
        for point in self.points.values():
            for option in point.options:
                option.last_probe = now
        self._update(now)

    def snapshot(self, now: int) -> dict[str, Any]:
        """What was learned and what is in use, as JSON values. All figures are recomputed first, as by `restore`."""
        self._update(now)
        return {
            "acceptance": [model.snapshot() for model in self._acceptance.values()],
            "times": [model.snapshot() for model in self._times.values()],
            "points": [point.snapshot() for point in self.points.values()],
        }

    def restore(self, snapshot: Mapping[str, Any], now: int) -> None:
        """Takes over a snapshot made under the same policy. Raises ValueError, TypeError or LookupError: damaged."""
        for model, values in zip(self._acceptance.values(), snapshot["acceptance"], strict=True):
            model.restore(values)
        for times, values in zip(self._times.values(), snapshot["times"], strict=True):
            times.restore(values)
        for point, values in zip(self.points.values(), snapshot["points"], strict=True):
            point.restore(values)
        self._update(now)

    def _update(self, now: int) -> None:
        for point in self.points.values():
            point.update(now)

    def _take_prior(self, prior: Prior) -> None:
        digests = self._draft_digests = tuple(draft.digest for draft in prior.drafts)
        for stored in prior.acceptance:
            key = digests[stored.draft], stored.domain, stored.temperature
            self._acceptance[key] = AcceptanceModel(stored, prior.lengths)
        for times in prior.round_times:
            point = times.batch_size, times.context_length, times.temperature
            if times.draft is None:
                self._times[None, *point] = RoundTimeModel(times.seconds, 1)
            else:
                num_lengths = sum(length <= times.max_length for length in prior.lengths)
                catch_up_s = times.catch_up_s * times.context_length / 2
                self._times[digests[times.draft], *point] = RoundTimeModel(times.seconds, num_lengths, catch_up_s)

    def _point_state(self, choice: Choice) -> PointState:
        plain = self._times.get((None, choice.batch_size, choice.context_length, choice.temperature))
        options = [] if plain is None else self._options(choice)
        setup = choice.setup if self._may_use(choice.setup.draft) else PLAIN
        starts = (
            (option, index)
            for option in options
            for index, decision in enumerate(option.decisions)
            if decision.setup == setup
        )
        start = next(starts, None)
        if plain is None or (start is None and setup != PLAIN):
            return PointState(_decision(choice, setup), RoundTimeModel((1.0,), 1), (), None)
        return PointState(_decision(choice, PLAIN), plain, options, start)

    def _may_use(self, draft: Draft | None) -> bool:
        return draft is None or self.drafts is None or draft.name in self.drafts

    def _options(self, choice: Choice) -> list[DraftOption]:
        """Every draft with acceptance and times at the choice's point; one that broke a limit there has none."""
        drafts = () if self.policy.prior is None else self.policy.prior.drafts
        options = []
        for draft, digest in zip(drafts, self._draft_digests, strict=True):
            acceptance = self._acceptance.get((digest, choice.domain, choice.temperature))
            times = self._times.get((digest, choice.batch_size, choice.context_length, choice.temperature))
            if acceptance is not None and times is not None and times.factors and self._may_use(draft):
                lengths = acceptance.lengths[: len(times.factors)]
                decisions = tuple(_decision(choice, Setup(draft=draft, length=length)) for length in lengths)
                options.append(DraftOption(decisions, acceptance, times, choice.batch_size))
        return options


def _decision(choice: Choice, setup: Setup) -> RoundDecision:
    return RoundDecision(setup, True, *choice.point)
