"""A policy file that may be replaced while serving code answers from it.

`tuner.selector.selector` does no I/O; this does the little there is. It must not know how a policy is made.
"""

import os
import threading
from pathlib import Path

from profiles.records.errors import PolicyError
from tuner.policy.policy import read
from tuner.selector.selector import Selector


class PolicyFile:
    """Answers with one selector, which goes on with what it learned when the file changes; threads may share it.

    `seed` and `scores` are the selector's. `error` is why the newest file could not be used; the one before it then
    stays in force. Raises PolicyError when the first cannot be read.
    """

    def __init__(self, path: str | Path, *, seed: int = 0, scores: bool = False) -> None:
        self.path = Path(path)
        self.error: PolicyError | None = None
        self._stamp = self._read_stamp()
        self._selector = Selector(read(self.path), seed=seed, scores=scores)
        self._reading = threading.Lock()

    @property
    def selector(self) -> Selector:
        """One `stat` a call, a few microseconds; a file replaced in one step (`policy.write`) is read anew."""
        stamp = self._read_stamp()
        if stamp != self._stamp:
            with self._reading:
                if stamp != self._stamp:
                    self._reload()
                    self._stamp = stamp
        return self._selector

    def _reload(self) -> None:
        try:
            self._selector.replace(read(self.path))
            self.error = None
        except PolicyError as error:
            self.error = error

    def _read_stamp(self) -> tuple[int, int, int] | None:
        """What changes when the file does; None where there is none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
