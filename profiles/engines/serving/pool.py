"""A pool of started processes that keeps the most recently used ones alive."""

import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from profiles.engines.serving.process import Supervised

Key = TypeVar("Key", bound=Hashable)


Member = TypeVar("Member", bound=Supervised)


class ServerPool(Generic[Key, Member]):
    """At most `max_alive` members at a time; the least recently used is stopped first.

    `start` makes the member for a key, ready for use. `num_starts` counts its calls, `starting_s` their seconds.
    """

    def __init__(self, start: Callable[[Key], Member], max_alive: int) -> None:
        self._start, self.max_alive = start, max_alive
        self._members: dict[Key, Member] = {}  # the most recently used last
        self.num_starts = 0
        self.starting_s = 0.0

    def get(self, key: Key) -> Member:
        """The member for `key`, started where there is none or where it has died."""
        member = self._members.pop(key, None)
        if member is None or not member.alive:
            if member is not None:
                member.stop()
            while len(self._members) >= self.max_alive:
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
        """Stops the member for `key` if there is one; the next `get` starts it anew."""
        member = self._members.pop(key, None)
        if member is not None:
            member.stop()

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def close(self) -> None:
        """Stops all members; safe to call again."""
        for key in tuple(self._members):
            self.stop(key)
