"""Which llama.cpp is used: a `llama-server` program or, in its place, the package xllamacpp; and its models' files.

Knows no workload.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from profiles.engines.llamacpp import flags, gguf_export, xllamacpp_server
from profiles.engines.llamacpp.flags import Spelling
from profiles.engines.serving.http_load import fetch
from profiles.engines.serving.process import RunningServer
from profiles.hardware import software
from profiles.hardware.software import XLLAMACPP
from profiles.models import sources
from profiles.records.core import Model, Setup
from profiles.records.errors import EngineError, InputError

_SYNTHETIC = "--spec-synth-rates"
_UNPACKED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that somebody else started: the setup it serves, and how many requests at a time."""

    url: str
    serves: Setup
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How a server is started and told to draft; `has_synthetic`: it can accept drafts by made-up rates."""

    command: tuple[str, ...]
    version: str
    spelling: Spelling
    has_synthetic: bool
    running: Running | None = None

    def check_device(self, device: str) -> None:
        """Raises InputError: a GPU for a build that can use none."""
        if device.startswith("cuda") and self.running is None and not software.server_devices(self.command):
            raise InputError(
                f"device {device!r}: {self.version} finds no GPU; take cpu, or a llama-server built for it"
            )


def program_of(path: str | None = None) -> Program:
    """The `llama-server` at `path` or on the PATH by that name; None is the one named, else the package xllamacpp.

    Raises InputError: it cannot be run, or its flags are not known.
    """
    path = path or software.llama_server_path()
    if path is None:
        version = software.installed_version(XLLAMACPP)
        if version is None:
            raise InputError("llama.cpp: the package xllamacpp is not installed; install it, or name a llama-server")
        command, version = [sys.executable, "-P", xllamacpp_server.__file__], f"{XLLAMACPP} {version}"
    else:
        command, version = [path], software.server_version([path])
    text = software.server_help(command)
    if text is None or version is None:
        raise InputError(f"llama-server {path!r}: it cannot be run, or does not tell its version")
    spelling = flags.spelling_of_help(text)
    if spelling is None:
        known = ", ".join(one.builds for one in flags.SPELLINGS)
        raise InputError(f"llama-server {path!r}: its flags are not known; known are those of {known}")
    return Program(command=tuple(command), version=version, spelling=spelling, has_synthetic=_SYNTHETIC in text)


def program_at(url: str, serves: Setup) -> Program:
    """The server that runs at `url`, started by somebody else for the setup `serves`.

    Raises InputError: no such URL. EngineError: it does not answer as a llama-server does.
    """
    server = RunningServer(url)
    said = fetch(f"{server.url}/props")
    try:
        props = json.loads(said)
        version, num_rows = str(props["build_info"]), int(props["total_slots"])
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"server {url}: no llama-server, its /props lack {error}") from error
    running = Running(url=server.url, serves=serves, num_rows=num_rows)
    newest = flags.SPELLINGS[-1]
    return Program(command=(), version=version, spelling=newest, has_synthetic=False, running=running)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's GGUF file, and the type of the weights in it: float32, float16, bfloat16, or a packed one's name."""

    path: Path
    float_type: str


def weights_of(model: Model) -> Weights:
    """The file that llama.cpp runs of a model: a GGUF as it is, safetensors written as GGUF. Raises ModelError."""
    source = sources.find(model.name)
    path = gguf_export.gguf_of(model.name, model.dtype)
    packed = None if source.gguf is None else source.gguf.float_type
    return Weights(path=path, float_type=model.dtype if packed is None else _UNPACKED.get(packed, packed))
