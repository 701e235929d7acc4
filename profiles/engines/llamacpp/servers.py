"""The llama.cpp servers of an engine: their commands, and the few of them that are kept alive.

Knows no workload beyond its rows and its context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.engines.llamacpp import responses
from profiles.engines.llamacpp.binary import Program, Weights
from profiles.engines.llamacpp.flags import args_for
from profiles.engines.llamacpp.responses import Generated
from profiles.engines.serving.http_load import drive
from profiles.engines.serving.pool import ServerPool
from profiles.engines.serving.process import RunningServer, Server
from profiles.records.core import Setup, Workload
from profiles.records.errors import InputError

START_TIMEOUT_S = 600.0
SPARE_TOKENS = 80  # a row's cache beside its context: llama.cpp drafts less where it nears the end
# in float32, where tokens are held against the torch engine's, caches are float32 too
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
ON_GPU, ON_CPU = ("-ngl", "99"), ("-dev", "none")
DRAFT_ON_GPU, DRAFT_ON_CPU = ("-ngld", "99"), ("-devd", "none")
EXACT_DRAFT = ("-ctkd", "f32", "-ctvd", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How every server is started; on a GPU with all layers there.

    `more`: arguments added as they are (`-b 512`). `most_alive` servers are kept, by default one on a GPU, else four.
    """

    threads: int
    log_folder: Path
    more: tuple[str, ...] = ()
    most_alive: int | None = None
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


class LlamaServer:
    """A server and what was already run on it, as a fleet keeps it."""

    def __init__(self, server: Server | RunningServer) -> None:
        self.server = server
        self.is_warm = False

    @property
    def alive(self) -> bool:
        return self.server.alive

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def pids(self) -> tuple[int, ...]:
        return self.server.pids

    @property
    def last_error_line(self) -> str:
        """What its log says of an error; empty where it says nothing, or where somebody else keeps the log."""
        return self.server.process.last_error_line() if isinstance(self.server, Server) else ""

    def stop(self) -> None:
        """Ends it; safe to call again."""
        self.server.stop()

    def ask(self, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[Generated]:
        """The answers, in order. Raises EngineError, with the server's last words where it died."""
        with self.server.watched():
            answers = drive(self.url, responses.PATH, bodies, concurrency)
            return [responses.read(answer, self.url) for answer in answers]

    def tokens_of(self, body: dict[str, Any], run: Generated) -> list[int]:
        """Tokens of a run, asked again where parts of characters were not streamed."""
        found = run.token_ids
        if found is None:
            with self.server.watched():
                found = responses.tokens_again(self.url, body)
        return found


class LlamaServers:
    """The servers of one target, kept in `pool`.

    `weights` are the drafts' by digest; rows are never longer than `max_positions`.
    Every method that gives a server raises EngineError where it cannot be started, with its last words.
    """

    def __init__(
        self,
        program: Program,
        options: Options,
        target: Weights,
        weights: Mapping[str, Weights | None],
        max_positions: int,
    ) -> None:
        self._program, self._options = program, options
        self._target, self._weights, self._max_positions = target, weights, max_positions
        self._exact = EXACT if target.float_type == "float32" else ()
        self._where = ON_GPU if options.on_gpu else ON_CPU
        self.pool: ServerPool[tuple[str, ...], LlamaServer] = ServerPool(
            self._start, options.most_alive or (1 if options.on_gpu else 4)
        )

    @property
    def told(self) -> dict[str, Any]:
        """What times depend on beside threads: the arguments of every server, and the type of the weights."""
        return {"more": [*self._where, *self._exact, *self._options.more], "weights": self._target.float_type}

    def of(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> LlamaServer:
        """The server of a setup for so many rows; `more` arguments make it another one.

        Raises InputError: a server that was running serves another setup, or fewer requests at a time.
        """
        return self.pool.ask(self._key(setup, workload, more))

    def anew(self, setup: Setup, workload: Workload) -> LlamaServer:
        """As `of`, freshly started: one that remembers no request."""
        self.pool.stop(self._key(setup, workload))
        return self.of(setup, workload)

    def scoring(self, weights: Weights, workload: Workload) -> LlamaServer:
        """A draft as a target of its own. Raises InputError: only a server that was running may be used."""
        if self._program.running is not None:
            raise InputError(f"{weights.path.name}: a server that is running already does not tell what it would draft")
        return self.pool.ask(self._command(weights.path, workload, ()))

    def _key(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The command of a setup's server, which is also its key in the fleet; the URL of one that was running."""
        running = self._program.running
        if running is not None:
            if setup != running.serves or more:
                raise InputError(f"{setup.name}: the server at {running.url} serves {running.serves.name} alone")
            if workload.batch_size > running.num_rows:
                raise InputError(
                    f"batch size {workload.batch_size}: the server at {running.url} has {running.num_rows} slots"
                )
            return (running.url,)
        if setup.draft is None:
            return self._command(self._target.path, workload, more)
        weights = self._weights.get(setup.draft.digest)
        words = args_for(setup, self._program.spelling, None if weights is None else str(weights.path))
        if weights is not None:
            words += ["-td", str(self._options.threads), "-tbd", str(self._options.threads)]
            words += DRAFT_ON_GPU if self._options.on_gpu else DRAFT_ON_CPU
            words += EXACT_DRAFT if self._exact else ()
        return self._command(self._target.path, workload, [*words, *more])

    def _command(self, path: Path, workload: Workload, words: Sequence[str]) -> tuple[str, ...]:
        row = min(workload.context_length + SPARE_TOKENS, self._max_positions)
        options = {
            "-m": str(path),
            "--host": "{host}",
            "--port": "{port}",
            "-c": str(row * workload.batch_size),
            "-np": str(workload.batch_size),
            "-t": str(self._options.threads),
            "-tb": str(self._options.threads),
        }
        own = [word for pair in options.items() for word in pair]
        return (*self._program.command, *own, *self._where, *self._exact, "--metrics", *words, *self._options.more)

    def _start(self, command: tuple[str, ...]) -> LlamaServer:
        server: Server | RunningServer
        if self._program.running is not None:
            server = RunningServer(self._program.running.url)
        else:
            server = Server(command, self._options.log_folder / f"llama-server-{self.pool.num_starts}.log")
        server.wait_ready(START_TIMEOUT_S)
        return LlamaServer(server)
