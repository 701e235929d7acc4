"""What the adapters share: target and drafts, a fleet of processes and its end, and timing while others are watched.

Knows no engine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Self, TypeVar

from profiles.engines.serving.pool import Key, Member, ServerPool
from profiles.records.core import Draft, Model
from profiles.records.errors import InputError
from profiles.timing.clock import quietest

Measurement = TypeVar("Measurement")


class Served(ABC, Generic[Key, Member]):
    """An engine as far as its processes go; a context manager, which ends them."""

    def __init__(self, target: Model, drafts: Sequence[Draft], pool: ServerPool[Key, Member]) -> None:
        self._model, self._drafts, self._fleet = target, tuple(drafts), pool

    @property
    def target(self) -> Model:
        return self._model

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return self._drafts

    @property
    def num_starts(self) -> int:
        """Processes started so far."""
        return self._fleet.num_starts

    @property
    def starting_s(self) -> float:
        """Seconds that the starts took."""
        return self._fleet.starting_s

    @property
    def pids(self) -> tuple[int, ...]:
        """All processes that live now."""
        return tuple(pid for member in self._fleet.members for pid in member.pids)

    def close(self) -> None:
        """Ends all of them; safe to call again, and a later question starts what it needs."""
        self._fleet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self, draft: Draft) -> None:
        """Raises InputError: a draft that is not one of these."""
        if draft not in self._drafts:
            known = ", ".join(one.name for one in self._drafts) or "none"
            raise InputError(f"draft {draft.name} is not one of this engine's; they are {known}")

    @property
    @abstractmethod
    def _watched(self) -> Sequence[str] | None:
        """The GPUs to watch while something is timed; None where the processes are not ours to tell from others'."""

    def _quietest(self, measure: Callable[[], Measurement]) -> tuple[Measurement, bool]:
        """As `clock.quietest`; nothing is watched where others cannot be told."""
        watched = self._watched
        return (measure(), False) if watched is None else quietest(measure, watched)
