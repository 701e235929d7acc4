"""Keeps a few of the servers that were started alive, each for what it was started for.

Knows no engine: how one is started it is told.
"""

import time
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Stoppable(Protocol):
    """What a fleet keeps."""

    @property
    def alive(self) -> bool: ...

    @property
    def pids(self) -> tuple[int, ...]: ...

    def stop(self) -> None: ...


Member = TypeVar("Member", bound=Stoppable)


class ServerPool(Generic[Key, Member]):
    """At most `most_alive` members at a time; the one not asked for the longest is stopped first.

    `start` makes the member for a key, ready for use; what it raises goes through. `num_starts` counts its calls, and
    `starting_s` are the seconds that they took.
    """

    def __init__(self, start: Callable[[Key], Member], most_alive: int) -> None:
        self._start, self._most_alive = start, most_alive
        self._members: dict[Key, Member] = {}  # the last asked for stands last
        self.num_starts = 0
        self.starting_s = 0.0

    def ask(self, key: Key) -> Member:
        """The member for `key`, started where there is none or where it was found dead."""
        member = self._members.pop(key, None)
        if member is None or not member.alive:
            if member is not None:
                member.stop()
            while len(self._members) >= self._most_alive:
                self.stop(next(iter(self._members)))
            self.num_starts += 1
            began = time.monotonic()
            try:
                member = self._start(key)
            finally:
                self.starting_s += time.monotonic() - began
        self._members[key] = member
        return member

    def stop(self, key: Key) -> None:
        """Stops the member for `key` where there is one: the next ask starts it anew."""
        member = self._members.pop(key, None)
        if member is not None:
            member.stop()

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def close(self) -> None:
        """Stops all of them; safe to call again."""
        for key in tuple(self._members):
            self.stop(key)
