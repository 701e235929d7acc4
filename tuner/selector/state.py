"""Everything a selector holds of one policy: its places, with the beliefs and times that they share.

Beliefs belong to (draft, domain, temperature), times to (draft, batch, context, temperature); a place joins them. Built
once per policy; what happens at run time it must not know.
"""

from __future__ import annotations

from profiles.engines.base import RoundDecision
from tuner.policy.query import MIXED
from tuner.selector.acceptance_model import AcceptanceModel
from tuner.selector.index import Table
from tuner.selector.operating_point import Option, Place, Times

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from profiles.records.core import Setup
    from tuner.policy.policy import Choice, Policy
    from tuner.policy.prior import Prior


class Places:
    """The places of a policy, found by question (`find`) or by what a pick rests on (`by_key`).

    `digest` is the policy's, its prior included.

    A choice that the policy's prior does not cover, or that a limit took all drafts from, is applied as it stands: its
    place has no options.
    """

    def __init__(self, policy: Policy) -> None:
        from profiles.records.core import PLAIN, digest_of
        from tuner.policy.policy import to_json

        self.policy = policy
        self.digest = digest_of(to_json(policy))
        self.uncovered = RoundDecision(PLAIN, False, 1, 1, MIXED, 0.0)
        self._table = Table(policy)
        self.acceptance_model: dict[tuple[str, str, float], AcceptanceModel] = {}
        self.times: dict[tuple[str | None, int, int, float], Times] = {}
        if policy.prior is not None:
            self._take_prior(policy.prior)
        self.by_key = {choice.point: self._place(choice) for choice in policy.choices}

    def find(self, question: tuple[int, int | None, str | None, float]) -> Place | None:
        """The place that covers a question; None: plain decoding. Raises InputError: an impossible value."""
        choice = self._table.find(*question)
        return None if choice is None else self.by_key[choice.point]

    def take_over(self, earlier: Places, now: int) -> None:
        """Goes on from what was learned of the same drafts on the same domains at the same lengths."""
        for key, learned in earlier.acceptance_model.items():
            if key in self.acceptance_model and self.acceptance_model[key].lengths == learned.lengths:
                self.acceptance_model[key].restore(learned.snapshot())
        for place in self.by_key.values():
            for option in place.options:
                option.last_probe = now
        self._weigh(now)

    def snapshot(self, now: int) -> dict[str, Any]:
        """What was learned and what is in use, as JSON values; all figures are worked out first, as `restore` does."""
        self._weigh(now)
        return {
            "beliefs": [one.snapshot() for one in self.acceptance_model.values()],
            "times": [one.snapshot() for one in self.times.values()],
            "places": [one.snapshot() for one in self.by_key.values()],
        }

    def restore(self, learned: Mapping[str, Any], now: int) -> None:
        """Takes up what `snapshot` told, of the same policy."""
        for acceptance_model, one in zip(self.acceptance_model.values(), learned["beliefs"], strict=True):
            acceptance_model.restore(one)
        for times, one in zip(self.times.values(), learned["times"], strict=True):
            times.restore(one)
        for place, one in zip(self.by_key.values(), learned["places"], strict=True):
            place.restore(one)
        self._weigh(now)

    def _weigh(self, now: int) -> None:
        for place in self.by_key.values():
            place.weigh(now)

    def _take_prior(self, prior: Prior) -> None:
        digests = [draft.digest for draft in prior.drafts]
        for kept in prior.kept:
            self.acceptance_model[digests[kept.draft], kept.domain, kept.temperature] = AcceptanceModel(
                kept, prior.lengths
            )
        for one in prior.times:
            digest = None if one.draft is None else digests[one.draft]
            num_lengths = 1 if one.draft is None else sum(length <= one.max_length for length in prior.lengths)
            catch_up_s = one.catch_up_s * one.context_length / 2
            point = one.batch_size, one.context_length, one.temperature
            self.times[digest, *point] = Times(one.seconds, num_lengths, catch_up_s)

    def _place(self, choice: Choice) -> Place:
        from profiles.records.core import PLAIN

        plain = self.times.get((None, choice.batch_size, choice.context_length, choice.temperature))
        options = [] if plain is None else self._options(choice)
        start = next(
            (
                (number, place)
                for number, option in enumerate(options)
                for place, pick in enumerate(option.picks)
                if pick.setup == choice.setup
            ),
            None,
        )
        if plain is None or (start is None and choice.setup != PLAIN):
            return Place(_pick(choice, choice.setup), Times((1.0,), 1), (), None)
        return Place(_pick(choice, PLAIN), plain, options, start)

    def _options(self, choice: Choice) -> list[Option]:
        from profiles.records.core import Setup

        prior = self.policy.prior
        options = []
        for draft in () if prior is None else prior.drafts:
            acceptance_model = self.acceptance_model.get((draft.digest, choice.domain, choice.temperature))
            times = self.times.get((draft.digest, choice.batch_size, choice.context_length, choice.temperature))
            if acceptance_model is not None and times is not None and times.paces:
                lengths = acceptance_model.lengths[: len(times.paces)]
                picks = [_pick(choice, Setup(draft=draft, length=length)) for length in lengths]
                options.append(Option(picks, acceptance_model, times, choice.batch_size))
        return options


def _pick(choice: Choice, setup: Setup) -> RoundDecision:
    return RoundDecision(setup, True, *choice.point)
