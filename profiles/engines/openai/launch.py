"""How the server of a setup is started: a launch template as a shell's user would type it, or a server's URL.

How a setup is spelled for the server it is told. Starts nothing.
"""

import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from profiles.engines.serving.http_load import TIMEOUT_S
from profiles.engines.serving.server_kind import KINDS, Kind
from profiles.records.core import PLAIN, Setup, digest_of
from profiles.records.errors import InputError

SPECULATIVE = "{speculative}"
READY_S = 900.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a setup's server is started.

    `template`: a command as a shell's user would type it, variables before it allowed, with `{port}` and, where
    `flags_of(setup)` shall go, `{speculative}`. Or `url` of a running server, and `running`, the setup it was started
    with. `ready_s`: how long a start may take; `silent_s`: how long a server may be silent under load. `most_alive`:
    servers kept at a time, by default one on a GPU, which a server takes for itself, and else the two with which plain
    decoding and a draft take turns without restarts.
    """

    kind: Kind
    log_folder: Path
    template: str = ""
    flags_of: Callable[[Setup], Sequence[str]] = field(default=lambda _: ())
    url: str | None = None
    running: Setup = PLAIN
    ready_s: float = READY_S
    silent_s: float = TIMEOUT_S
    most_alive: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind of server {self.kind!r}: allowed are {', '.join(KINDS)}")
        if bool(self.template) == (self.url is not None):
            raise InputError("a server needs a launch template or a URL, and not both")
        if self.template:
            self.command(PLAIN)

    def command(self, setup: Setup) -> tuple[dict[str, str], list[str]]:
        """The variables and the words that start the server of a setup. Raises InputError: no such spelling."""
        try:
            words = shlex.split(self.template)
        except ValueError as error:
            raise InputError(f"launch template {self.template!r}: {error}") from error
        num_variables = len(list(itertools.takewhile(_VARIABLE.match, words)))
        variables = dict(word.split("=", 1) for word in words[:num_variables])
        words = words[num_variables:]
        if not any("{port}" in word for word in words):
            raise InputError(f"launch template {self.template!r}: {{port}} is needed, where the server's port goes")
        if setup.draft is not None and SPECULATIVE not in words:
            raise InputError(f"launch template {self.template!r}: {SPECULATIVE} is needed, where a draft's flags go")
        flags = list(self.flags_of(setup)) if setup.draft is not None else []
        return variables, [one for word in words for one in (flags if word == SPECULATIVE else [word])]

    @property
    def digest(self) -> str:
        """Of the template, or of the URL: what stands in them may change what the server computes."""
        return digest_of(self.template or self.url)[:12]

    def log_path(self, setup: Setup) -> Path:
        """Where the output of a setup's server goes."""
        name = re.sub(r"[^A-Za-z0-9.=-]+", "-", setup.name)[-60:].strip("-")
        return self.log_folder / f"{name}-{setup.digest[:8]}.log"
