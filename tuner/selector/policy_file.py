"""A policy file that may be replaced while serving code answers from it."""

import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from profiles.records.errors import DraftpickError
from tuner.policy.policy import Policy, read
from tuner.selector.selector import Selector


class PolicyFile:
    """One selector that goes on with what it learned when the file is replaced. Threads may share it.

    `error` says why the newest file could not be used; the policy before it then stays in force.

    Args:
        drafts_of: names of a policy's drafts that the engine has loaded, asked for every new policy; it raises
            InputError where that cannot be used. None: it can run all of them.
        options: of the selector, by name.

    Raises:
        PolicyError: the first file cannot be read.
        InputError: `drafts_of` refuses it.
    """

    def __init__(
        self, path: str | Path, *, drafts_of: Callable[[Policy], Collection[str]] | None = None, **options: Any
    ) -> None:
        self.path = Path(path)
        self.error: Exception | None = None
        self._drafts_of, self._options = drafts_of, options
        self._stamp = self._read_stamp()
        policy = read(self.path)
        self._drafts = self._loaded(policy)
        self._selector = Selector(policy, drafts=self._drafts, **options)
        self._reading = threading.Lock()

    @property
    def selector(self) -> Selector:
        """The selector, by the newest policy; costs one `stat`. Replace the file in one step (`policy.write`)."""
        stamp = self._read_stamp()
        if stamp != self._stamp:
            with self._reading:
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._reload()
        return self._selector

    def _reload(self) -> None:
        try:
            policy = read(self.path)
            drafts = self._loaded(policy)
            if drafts == self._drafts:
                self._selector.replace(policy)
            else:
                self._selector, self._drafts = Selector(policy, drafts=drafts, **self._options), drafts
            self.error = None
        except (DraftpickError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            self.error = error  # a server must go on, whatever the file holds

    def _loaded(self, policy: Policy) -> frozenset[str] | None:
        return None if self._drafts_of is None else frozenset(self._drafts_of(policy))

    def _read_stamp(self) -> tuple[int, int, int] | None:
        """What changes when the file does; None where there is none."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
