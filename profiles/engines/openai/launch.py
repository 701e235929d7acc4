"""The kinds of servers, and how a setup's is started: from a launch template, as in a shell."""

import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.engines.llamacpp.flags import release_of_build
from profiles.engines.llamacpp.responses import SERVER as LLAMA_CPP
from profiles.engines.releases import EngineRelease, release_of
from profiles.engines.serving.http_load import TIMEOUT_S
from profiles.engines.serving.redaction import redacted, without_paths
from profiles.engines.serving.server_kind import ServerKind
from profiles.engines.sglang.flags import SERVER as SGLANG
from profiles.engines.vllm.responses import SERVER as VLLM
from profiles.records.core import PLAIN, Setup, digest_of
from profiles.records.errors import InputError, require

SPECULATIVE = "{speculative}"
MODEL = "{model}"
READY_S = 900.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
SERVER_KINDS = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA_CPP}


def server_kind(name: str) -> ServerKind:
    """Raises InputError: no such kind."""
    require(name in SERVER_KINDS, f"kind of server {name!r}: allowed are {', '.join(SERVER_KINDS)}")
    return SERVER_KINDS[name]


def release_for(kind: str, version: str | None) -> EngineRelease:
    """The release whose flags a server of a kind takes. Raises InputError: not a version of it."""
    return release_of_build(version) if kind == "llamacpp" else release_of(kind, version)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a setup's server is started."""

    kind: str
    log_folder: Path
    template: str  # as in a shell, with variables before, `{port}`, `{model}`, and `{speculative}` for the flags
    model_path: str = ""
    flags_of: Callable[[Setup], Sequence[str]] = lambda _: ()
    ready_s: float = READY_S  # how long a start may take
    silent_s: float = TIMEOUT_S  # how long a server may be silent under load

    def __post_init__(self) -> None:
        server_kind(self.kind)
        self.command(PLAIN)

    @property
    def server_kind(self) -> ServerKind:
        return server_kind(self.kind)

    @property
    def shown(self) -> str:
        """The template without secrets; it may change what the server computes."""
        return redacted(self._filled)

    @property
    def identity(self) -> str:
        """What of the start is part of a machine's identity: without secrets and paths, the model still `{model}`."""
        return without_paths(redacted(self.template))

    @property
    def _filled(self) -> str:
        """The template with the model's path."""
        return self.template.replace(MODEL, shlex.quote(self.model_path)) if self.model_path else self.template

    def command(self, setup: Setup) -> tuple[dict[str, str], list[str]]:
        """The variables and the command that start the server of a setup. Raises InputError: a bad template."""
        try:
            parts = shlex.split(self._filled)
        except ValueError as error:
            raise InputError(f"launch template {self.shown!r}: {error}") from error
        assignments = list(itertools.takewhile(_VARIABLE.match, parts))
        parts = parts[len(assignments) :]
        if not any("{port}" in part for part in parts):
            raise InputError(f"launch template {self.shown!r}: {{port}} is needed, where the server's port goes")
        if setup.draft is not None and SPECULATIVE not in parts:
            raise InputError(f"launch template {self.shown!r}: {SPECULATIVE} is needed, where a draft's flags go")
        flags = list(self.flags_of(setup)) if setup.draft is not None else []
        command = [argument for part in parts for argument in (flags if part == SPECULATIVE else [part])]
        return dict(assignment.split("=", 1) for assignment in assignments), command

    @property
    def digest(self) -> str:
        """Of what is shown: another key is the same server."""
        return digest_of(self.shown)[:12]

    def log_path(self, setup: Setup) -> Path:
        """The log of a setup's server."""
        name = re.sub(r"[^A-Za-z0-9.=-]+", "-", setup.name)[-60:].strip("-")
        return self.log_folder / f"{name}-{setup.digest[:8]}.log"
