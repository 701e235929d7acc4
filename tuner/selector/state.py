"""What a selector holds of one policy: its choices, their operating points, the domains of its prior; as JSON values.

What learns names its learned attributes in `LEARNED`, and has a key.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from profiles.records.core import PLAIN, Setup, digest_of
from tuner.policy.policy import Policy, to_json
from tuner.policy.prior import RoundTimes
from tuner.policy.query import OperatingPoint, check_query
from tuner.selector.acceptance import Domains
from tuner.selector.point import PLAIN_ARM, Arm, Point

FIRST_ROUNDS = 4.0  # of the policy's choice, which rests on real runs, before estimates may say otherwise
MAX_QUERIES = 4096  # whose answers are remembered


class Stream:
    """The setup in use for queries that one choice of the policy answers.

    `setup`: the policy's choice, the only one where the prior does not cover it (`point` None). `arm`: the setup in
    use. `dwell`: rounds before the next look for a better one.
    """

    LEARNED = ("arm", "dwell")

    def __init__(self, operating_point: OperatingPoint, setup: Setup, point: Point | None, domains: Domains | None):
        self.operating_point, self.point, self.setup = operating_point, point, setup
        self.arm: Arm = (point and point.find(setup)) or PLAIN_ARM
        self.dwell = FIRST_ROUNDS
        self.label = 0 if domains is None else domains.labels.get(operating_point.domain, 0)
        self.probe, self.probe_left = PLAIN_ARM, 0  # the setup that is tried, for so many rounds
        self.key = digest_of([*operating_point, setup.digest, None if point is None else point.times.key])


class SelectorState:
    """A policy's streams, their operating points and the domains of its prior."""

    def __init__(
        self, policy: Policy, drafts: Collection[str] | None, *, max_length: int | None, baseline: str
    ) -> None:
        self.policy, self.digest = policy, digest_of(to_json(policy))
        self._temperatures = sorted({choice.temperature for choice in policy.choices})
        self._contexts = sorted({choice.context_length for choice in policy.choices})
        self._answer = lru_cache(MAX_QUERIES)(self._look_up)  # callers may put anything into the label
        prior = policy.prior
        self.domains = None if prior is None or not prior.acceptance else Domains(prior)
        times: dict[tuple[int, int, float], dict[int | None, RoundTimes]] = {}
        for row in () if prior is None else prior.round_times:
            times.setdefault((row.batch_size, row.context_length, row.temperature), {})[row.draft] = row
        self.points: dict[tuple[int, int, float], Point] = {}
        self.streams: dict[OperatingPoint, Stream] = {}
        for choice in policy.choices:
            where = choice.batch_size, choice.context_length, choice.temperature
            if prior and self.domains and where not in self.points and None in times.get(where, ()):
                self.points[where] = Point(
                    prior,
                    self.domains,
                    times[where],
                    usable=drafts,
                    max_length=max_length,
                    baseline=baseline,
                )
            setup = choice.setup
            if setup.draft is not None and drafts is not None and setup.draft.name not in drafts:
                setup = PLAIN
            if max_length is not None and setup.length > max_length:
                setup = PLAIN
            point = self.points.get(where)
            if point is not None and point.find(setup) is None:
                point = None  # the prior does not cover the policy's choice, which is applied as it stands
            self.streams[choice.point] = Stream(choice.point, setup, point, self.domains)

    def find(
        self, batch_size: int, context_length: int | None, domain: str | None, temperature: float
    ) -> Stream | None:
        """The stream of a query; None: its batch is beyond the largest measured. Raises InputError."""
        if type(context_length) is int and context_length >= 1:  # between two measured ones the answer does not change
            longer = bisect_left(self._contexts, context_length)
            context_length = self._contexts[longer] if longer < len(self._contexts) else None
        return self._answer(batch_size, context_length, domain, temperature)

    def _look_up(
        self, batch_size: int, context_length: int | None, domain: str | None, temperature: float
    ) -> Stream | None:
        check_query(batch_size, context_length, temperature)
        nearest = min(self._temperatures, key=lambda value: abs(value - temperature))
        for context in dict.fromkeys((context_length, None)):  # beyond the longest: that one is the nearest
            answer = self.policy.look_up(
                batch_size=batch_size, context_length=context, domain=domain, temperature=nearest
            )
            if answer.matched:
                return self.streams[answer.choice.point]
        return None

    def parts(self) -> Iterator[Any]:
        """What learns."""
        yield from () if self.domains is None else self.domains.parts()
        yield from (point.times for point in self.points.values())
        yield from self.streams.values()

    def check(self) -> None:
        """Raises IndexError: a setup in use is none of its point's."""
        for stream in self.streams.values():
            if stream.point is not None and min(stream.arm) >= 0:
                stream.point.setups[stream.arm[0]][stream.arm[1]]
            elif stream.arm != PLAIN_ARM:
                raise IndexError(f"a setup of {stream.arm}")

    def update(self) -> None:
        """Recomputes all figures."""
        for point in self.points.values():
            point.update()


def save(parts: Iterable[Any]) -> dict[str, list[Any]]:
    """The learned values of parts, by key, as JSON values."""
    return {part.key: [_copy(getattr(part, name)) for name in part.LEARNED] for part in parts}


def load(parts: Iterable[Any], values: Mapping[str, Any], *, strict: bool = True) -> None:
    """Takes over what `save` gave of parts with these keys; unless `strict` others stay as they are.

    Raises LookupError, ValueError or TypeError: of other parts, or not finite.
    """
    for part in parts:
        if strict or part.key in values:
            for name, value in zip(part.LEARNED, values[part.key], strict=True):
                setattr(part, name, _alike(getattr(part, name), value))


def _copy(value: Any) -> Any:
    return [_copy(each) for each in value] if isinstance(value, list | tuple) else value


def _alike(present: Any, value: Any) -> Any:
    """The value in the form of the present one."""
    if isinstance(present, list | tuple):
        return type(present)([_alike(old, new) for old, new in zip(present, value, strict=True)])
    if not math.isfinite(value):
        raise ValueError(f"a value of {value}")
    return type(present)(value)
