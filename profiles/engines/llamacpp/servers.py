"""The llama.cpp program that is run, the models' files, and the pool of servers: one for every setup and batch size."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.engines import rules
from profiles.engines.llamacpp import responses, xllamacpp_server
from profiles.engines.llamacpp.flags import FlagSet, LlamaRelease, args_for, builds_with_flags, flags_of_help
from profiles.engines.llamacpp.responses import LlamaCompletion
from profiles.engines.serving.http_load import drive
from profiles.engines.serving.pool import ServerPool
from profiles.engines.serving.process import Server
from profiles.engines.serving.redaction import redacted, without_paths
from profiles.hardware import software
from profiles.hardware.software import XLLAMACPP
from profiles.models import sources
from profiles.records.core import Model, Setup, Workload
from profiles.records.errors import InputError, ModelError

START_TIMEOUT_S = 600.0
MAX_ALIVE = 4  # servers kept on a CPU; a GPU holds one
SPARE_TOKENS = 80  # a row's cache beside its context: llama.cpp drafts less near the end of it
# float32 models are compared with the torch engine token by token, so caches are float32 too
EXACT, EXACT_DRAFT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32"), ("-ctkd", "f32", "-ctvd", "f32")
ON_GPU, ON_CPU = ("-ngl", "99"), ("-dev", "none")
DRAFT_ON_GPU, DRAFT_ON_CPU = ("-ngld", "99"), ("-devd", "none")
_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """How a server is started; `has_synthetic_rates`: it can accept drafts by given rates."""

    command: tuple[str, ...]
    version: str
    flags: FlagSet
    has_synthetic_rates: bool

    @property
    def release(self) -> LlamaRelease:
        return LlamaRelease(engine="llamacpp", version=self.version, flags=self.flags)

    def check_device(self, device: str) -> None:
        """Raises InputError: a GPU for a build that can use none."""
        if device.startswith("cuda") and not software.server_devices(self.command):
            raise InputError(f"device {device!r}: {self.version} finds no GPU; take cpu, or a llama-server with CUDA")


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
    flags = flags_of_help(text)
    if flags is None:
        raise InputError(f"llama-server {path!r}: its flags are not known; known are those of {builds_with_flags()}")
    has_rates = "--spec-synth-rates" in text
    return Program(command=tuple(command), version=version, flags=flags, has_synthetic_rates=has_rates)


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
    more: tuple[str, ...] = ()  # further arguments (`-b 512`)
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def complete(server: Server, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[LlamaCompletion]:
    """The completions, in order. Raises EngineError, with the server's last error line where it died."""
    with server.watched():
        answers = drive(server.url, responses.PATH, bodies, concurrency)
        return [responses.read(answer, server.url, body) for answer, body in zip(answers, bodies, strict=True)]


class LlamaServers:
    """The servers of one target in a `pool`; `weights` are the drafts' by digest.

    Every method that returns a server raises EngineError where it cannot be started, with its last error line.
    """

    def __init__(
        self,
        program: Program,
        options: Options,
        *,
        target: Weights,
        weights: Mapping[str, Weights | None],
        max_positions: int,
    ) -> None:
        self._program, self._options = program, options
        self._target, self._weights, self._max_positions = target, weights, max_positions
        self._device_args = ON_GPU if options.on_gpu else ON_CPU
        self._exact_args = EXACT if target.float_type == "float32" else ()
        max_alive = 1 if options.on_gpu else MAX_ALIVE
        self.pool: ServerPool[tuple[str, ...], Server] = ServerPool(self._start, max_alive)

    @property
    def engine_options(self) -> dict[str, Any]:
        """What times depend on beside threads: the arguments of every server, and the type of the weights."""
        more = [*self._device_args, *self._exact_args, *self._options.more]
        return {"more": [without_paths(redacted(argument)) for argument in more], "weights": self._target.float_type}

    def get(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> Server:
        """The server of a setup and batch size; other `more` arguments are another server."""
        return self.pool.get(self._command_for(setup, workload, more))

    def restarted(self, setup: Setup, workload: Workload) -> Server:
        """As `get`, freshly started: it has no history of requests."""
        self.pool.stop(self._command_for(setup, workload))
        return self.get(setup, workload)

    def scoring(self, weights: Weights, workload: Workload) -> Server:
        """A server whose target is a draft's model."""
        return self.pool.get(self._command(weights.path, workload))

    def _command_for(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The command of a setup's server, its key in the pool."""
        if setup.draft is None:
            return self._command(self._target.path, workload, more)
        weights = self._weights.get(setup.draft.digest)
        args = args_for(setup, self._program.flags, None if weights is None else weights.path)
        if weights is not None:
            args += ["-td", str(self._options.threads), "-tbd", str(self._options.threads)]
            args += DRAFT_ON_GPU if self._options.on_gpu else DRAFT_ON_CPU
            args += EXACT_DRAFT if self._exact_args else ()
        return self._command(self._target.path, workload, [*args, *more])

    def _command(self, path: str, workload: Workload, args: Sequence[str] = ()) -> tuple[str, ...]:
        row = min(workload.context_length + SPARE_TOKENS, self._max_positions)
        batch_size, threads = str(workload.batch_size), str(self._options.threads)
        command = [*self._program.command, "-m", path, "--host", "{host}", "--port", "{port}"]
        command += ["-c", str(row * workload.batch_size), "-np", batch_size, "-t", threads, "-tb", threads]
        return (*command, *self._device_args, *self._exact_args, "--metrics", *args, *self._options.more)

    def _start(self, command: tuple[str, ...]) -> Server:
        server = Server(command, self._options.log_folder / f"llama-server-{self.pool.num_starts}.log")
        server.wait_ready(START_TIMEOUT_S)
        return server
