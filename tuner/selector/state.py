"""What a selector holds of one policy: its choices, their operating points, and the domains of its prior."""

from collections.abc import Collection, Iterator
from typing import Any

from profiles.records.core import PLAIN, Setup, digest_of
from tuner.policy.policy import Policy, to_json
from tuner.policy.prior import RoundTimes
from tuner.policy.query import OperatingPoint, check_query
from tuner.selector.acceptance import Domains
from tuner.selector.index import PolicyIndex
from tuner.selector.point import PLAIN_ARM, Arm, Point
from tuner.selector.snapshot import load, save

FIRST_ROUNDS = 4.0  # of the policy's choice, which rests on real runs, before estimates may say otherwise
PROVEN_ROUNDS = 40.0  # that a setup counts as run, which the policy chose


class Stream:
    """The setup in use for queries that one choice of the policy answers."""

    LEARNED = ("arm", "dwell")
    __slots__ = ("arm", "doubt", "dwell", "fixed", "key", "point")

    def __init__(self, key: OperatingPoint, point: Point | None, arm: Arm, fixed: Setup) -> None:
        self.key, self.point, self.arm, self.fixed = key, point, arm, fixed
        self.dwell, self.doubt = FIRST_ROUNDS, 0.0
        if point is not None and self.arm[0]:
            self.doubt = point.doubt(arm, key.domain)


class SelectorState:
    """A policy's streams, their operating points and the domains of its prior."""

    def __init__(
        self, policy: Policy, drafts: Collection[str] | None, *, max_length: int | None, baseline: str
    ) -> None:
        self.policy, self.digest, self.index = policy, digest_of(to_json(policy)), PolicyIndex(policy)
        self.temperatures = sorted({choice.temperature for choice in policy.choices})
        self.domains = None if policy.prior is None else Domains(policy.prior)
        self.points: dict[tuple[int, int, float], Point] = {}
        self.streams: dict[OperatingPoint, Stream] = {}
        plain: dict[tuple[int, int, float], RoundTimes] = {}
        times: dict[tuple[int, int, float], dict[int, RoundTimes]] = {}
        for row in () if policy.prior is None else policy.prior.round_times:
            where = row.batch_size, row.context_length, row.temperature
            if row.draft is None:
                plain[where] = row
            else:
                times.setdefault(where, {})[row.draft] = row
        for choice in policy.choices:
            where = choice.batch_size, choice.context_length, choice.temperature
            if where in plain and where not in self.points:
                assert policy.prior is not None
                assert self.domains is not None
                self.points[where] = Point(
                    policy.prior,
                    self.domains,
                    plain[where],
                    times.get(where, {}),
                    usable=drafts,
                    max_length=max_length,
                    baseline=baseline,
                )
            point = self.points.get(where)
            draft = choice.setup.draft
            setup = choice.setup if draft is None or drafts is None or draft.name in drafts else PLAIN
            setup = setup if setup.length <= (max_length or setup.length) else PLAIN
            arm = None if point is None else point.find(setup)
            if arm is None:  # the prior does not cover the policy's choice, which is applied as it stands
                point = None
            elif point is not None:
                point.times.drafts[arm[0]].rounds = PROVEN_ROUNDS
                point.chosen.add(arm)
            self.streams[choice.point] = Stream(choice.point, point, arm or PLAIN_ARM, setup)

    def find(
        self, batch_size: int, context_length: int | None, domain: str | None, temperature: float
    ) -> Stream | None:
        """The stream of a query; None: its batch is beyond the largest measured. Raises InputError."""
        check_query(batch_size, context_length, temperature)
        nearest = min(self.temperatures, key=lambda value: abs(value - temperature))
        point = self.index.find(batch_size, context_length, domain, nearest)
        if point is None and context_length is not None:  # beyond the longest: that one is the nearest
            point = self.index.find(batch_size, None, domain, nearest)
        return None if point is None else self.streams[point]

    def parts(self) -> Iterator[Any]:
        """What learns, for snapshots."""
        yield from () if self.domains is None else self.domains.parts()
        for point in self.points.values():
            yield from point.times.parts()
        yield from self.streams.values()

    def update(self) -> None:
        """Recomputes all figures."""
        for point in self.points.values():
            point.update()

    def take_over(self, earlier: "SelectorState") -> None:
        """What was learned of the same drafts on the same domains at the same lengths, and of times stored alike."""
        new, old, new_prior, old_prior = self.domains, earlier.domains, self.policy.prior, earlier.policy.prior
        if (
            new is None
            or old is None
            or new_prior is None
            or old_prior is None
            or new_prior.lengths != old_prior.lengths
        ):
            return
        for temperature in set(new.temperatures) & set(old.temperatures):
            for number, draft in enumerate(new_prior.drafts):
                if draft in old_prior.drafts:
                    learned = old.models[temperature][old_prior.drafts.index(draft)]
                    for name, model in zip(new.names, new.models[temperature][number], strict=True):
                        if name in old.names:
                            load([model], save([learned[old.names.index(name)]]))
                    load([new.models[temperature][number][0].shift], save([learned[0].shift]))
        for where, point in self.points.items():
            before = earlier.points.get(where)
            if before is not None and (before.setups, before.times.seconds) == (point.setups, point.times.seconds):
                load(point.times.parts(), save(before.times.parts()))
        if new.names == old.names:
            new.mixes = old.mixes
        new.rounds = [old.rounds[old.names.index(name)] if name in old.names else 0.0 for name in new.names]
        self.update()
