"""The llama.cpp program that is run, the models' files, and the completions that its server gives."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.engines import rules
from profiles.engines.llamacpp import responses, xllamacpp_server
from profiles.engines.llamacpp.flags import FIRST_BUILD, is_known
from profiles.engines.llamacpp.responses import LlamaCompletion
from profiles.engines.releases import EngineRelease
from profiles.engines.serving.http_load import drive
from profiles.engines.serving.process import Server
from profiles.hardware import software
from profiles.hardware.software import XLLAMACPP
from profiles.models import sources
from profiles.records.core import Model
from profiles.records.errors import InputError, ModelError

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How a server is started; `has_synthetic_rates`: it can accept drafts by given rates."""

    command: tuple[str, ...]
    version: str
    has_synthetic_rates: bool

    @property
    def release(self) -> EngineRelease:
        return EngineRelease(engine="llamacpp", version=self.version)


def find_program(path: str | None = None) -> Program:
    """The `llama-server` at `path` or by that name on the PATH; None: $DRAFTPICK_LLAMA_SERVER, else xllamacpp.

    Raises InputError: it cannot be run, or its flags are not known.
    """
    path = path or software.llama_server_path()
    if path is not None:
        command, version = [path], software.server_version([path])
    else:
        installed = software.installed_version(XLLAMACPP)
        if installed is None:
            raise InputError(
                "llama.cpp is not installed: install its llama-server and name it with --engine-command, or the "
                "package xllamacpp (pip install 'draftpick[llamacpp]')"
            )
        command, version = [sys.executable, "-P", xllamacpp_server.__file__], f"{XLLAMACPP} {installed}"
    text = software.server_help(command)
    if text is None or version is None:
        raise InputError(f"llama-server {path!r}: it cannot be run, or does not report its version")
    if not is_known(text):
        raise InputError(f"llama-server {path!r}: its flags are not known; b{FIRST_BUILD} or newer is needed")
    return Program(command=tuple(command), version=version, has_synthetic_rates="--spec-synth-rates" in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's GGUF file, and the type of its weights: float32, float16, bfloat16, or a quantised one's name."""

    path: str
    float_type: str


def weights_of(model: Model) -> Weights:
    """The GGUF file of a model. Raises ModelError: it has none."""
    source = sources.find(model.name)
    if source.gguf is not None:
        float_type = source.gguf.float_type
        return Weights(path=str(source.gguf.path), float_type=_FLOAT_TYPES.get(float_type, float_type))
    path = rules.gguf_path(model.name)
    if path is None:
        raise ModelError(
            f"model {model.name!r}: llama.cpp reads GGUF files only; convert it with llama.cpp's convert_hf_to_gguf.py "
            "and give the .gguf file"
        )
    if model.dtype != "float32":
        raise ModelError(f"model {model.name!r}: its GGUF file is float32; {model.dtype} was given")
    return Weights(path=path, float_type=model.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How every server is started, on a GPU with all layers there."""

    threads: int
    log_folder: Path
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def complete(server: Server, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[LlamaCompletion]:
    """The completions, in order. Raises EngineError, with the server's last error line where it died."""
    with server.watched():
        answers = drive(server.url, responses.PATH, bodies, concurrency)
        return [responses.read(answer, server.url, body) for answer, body in zip(answers, bodies, strict=True)]
