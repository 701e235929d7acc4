"""A policy file that may be replaced while serving code answers from it."""

import os
import threading
from pathlib import Path
from typing import Any

from profiles.records.errors import PolicyError
from tuner.policy.policy import read
from tuner.selector.selector import Selector


class PolicyFile:
    """One selector that goes on with what it learned when the file is replaced. Threads may share it.

    `error` says why the newest file could not be used; the policy before it then stays in force.

    Args:
        options: of the selector, by name.

    Raises:
        PolicyError: the first file cannot be read.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.path = Path(path)
        self.error: PolicyError | None = None
        self._stamp = self._read_stamp()
        self._selector = Selector(read(self.path), **options)
        self._reading = threading.Lock()

    @property
    def selector(self) -> Selector:
        """The selector, by the newest policy; costs one `stat`. Replace the file in one step (`policy.write`)."""
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
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
