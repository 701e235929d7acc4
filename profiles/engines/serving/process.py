"""Child processes that leave nothing behind: a command with its log, a server on a free port, a pool of them.

Every command runs under `supervisor.py`, which ends it and all it started when it is stopped, when this process ends,
and when this process is killed.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Generic, Self, TypeVar

import httpx2
import psutil

from profiles.engines.serving import supervisor
from profiles.engines.serving.logs import error_of, hide_secrets, is_port_taken, last_error_line
from profiles.engines.serving.redaction import redacted, server_environment
from profiles.records.errors import EngineError, InputError

GRACES_S = (10.0, 5.0)  # after SIGINT and after SIGTERM
POLL_S = 0.05
HEALTH_TIMEOUT_S = 5.0
DEATH_S = 2 * supervisor.LEFTOVER_GRACE_S  # within which a server that no longer answers is seen as ended
LOCALHOST = "127.0.0.1"
OK = 200


class Process:
    """One running command; a context manager.

    `environment` is added to this process's own, without what `server_environment` removes. Output goes to the log;
    with `piped` only stderr does, and `pipes` are the command's stdin and stdout, bytes. `graces_s`: seconds to end
    after SIGINT, and after SIGTERM. Raises InputError: no such command, or a log that cannot be written.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        *,
        environment: Mapping[str, str] | None = None,
        piped: bool = False,
        graces_s: tuple[float, float] = GRACES_S,
    ) -> None:
        variables = {**server_environment(os.environ), **(environment or {})}
        if shutil.which(command[0], path=variables.get("PATH")) is None:
            raise InputError(f"command {command[0]!r}: there is no such program, or it may not be run")
        self.name, self.log_path = _name(command), log_path
        supervised = [sys.executable, "-P", supervisor.__file__]
        reading, lifeline = os.pipe()
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with open(log_path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
                self._log_start = log.tell()
                self._popen = subprocess.Popen(
                    [*supervised, str(reading), ",".join(map(str, graces_s)), *command],
                    env=variables,
                    stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if piped else log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(reading,),
                )
        except BaseException as error:
            os.close(lifeline)
            if isinstance(error, OSError):
                raise InputError(f"log {log_path} cannot be written: {error.strerror}") from error
            raise
        finally:
            os.close(reading)
        # at exit, when garbage collected, or when called; only once
        self._end = weakref.finalize(self, _end, self._popen, lifeline, sum(graces_s), hide=(log_path, self._log_start))

    @property
    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        return self._popen.stdin, self._popen.stdout

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def pids(self) -> tuple[int, ...]:
        """All processes of this command that run now, its supervisor first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.alive:
                process = psutil.Process(self._popen.pid)
                return process.pid, *(child.pid for child in process.children(recursive=True))
        return ()

    def stop(self) -> None:
        """Ends it and all it started; safe to call again."""
        self._end()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most `timeout_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)
        return not self.alive

    def last_error_line(self) -> str:
        """The last line of its log about an error; empty where the log is."""
        return last_error_line(self.log_path, self._log_start)

    def failure(self, what: str | None = None) -> EngineError:
        """The error to raise, with the last error line of its log: `what` went wrong, by default that it ended."""
        return error_of(f"{self.name} {what or _ending(self._popen.poll())}", self.log_path, self._log_start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _name(command: Sequence[str]) -> str:
    """The program, or the module or script that Python runs."""
    first, *others = [argument for argument in command if argument not in ("-P", "-m", "-u")]
    program = others[0] if others and Path(first).name.startswith("python") else first
    return Path(program).name.rpartition("profiles.engines.")[2]


def _end(popen: subprocess.Popen[bytes], lifeline: int, graces_s: float, *, hide: tuple[Path, int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(lifeline, b".")  # a process that was forked off this one may hold the pipe open
    os.close(lifeline)
    try:
        popen.wait(graces_s + 10 * supervisor.LEFTOVER_GRACE_S)
    except subprocess.TimeoutExpired:
        popen.kill()  # and with it the command, which is tied to its supervisor
        popen.wait()
    finally:
        hide_secrets(*hide)
        for pipe in (popen.stdin, popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "failed"
    number = -code if code < 0 else code - supervisor.SIGNALLED
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with exit code {code}"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind((LOCALHOST, 0))
        return int(listener.getsockname()[1])


class Server(Process):
    """A command that serves HTTP at `url`, on a free port. `warm`: the batch sizes that it has run.

    `{host}` and `{port}` in the command are filled in. Raises InputError as `Process`, and where there is no `{port}`.
    """

    def __init__(self, command: Sequence[str], log_path: Path, **options: Any) -> None:
        if not any("{port}" in word for word in command):
            raise InputError(f"command {redacted(' '.join(command))!r}: a {{port}} to fill in is needed")
        self._port = free_port()
        self.url = f"http://{LOCALHOST}:{self._port}"
        self.warm: set[int] = set()
        filled = [word.replace("{host}", LOCALHOST).replace("{port}", str(self._port)) for word in command]
        super().__init__(filled, log_path, **options)

    def trouble(self, deadline_s: float) -> str:
        """Waits until it is healthy, dead or out of time; empty when it is healthy."""
        trouble = "no time"
        while self.alive and (left_s := deadline_s - time.monotonic()) > 0.0:
            status = _health(self.url, min(HEALTH_TIMEOUT_S, left_s))
            if status == OK and self._listens():
                return ""
            trouble = {None: "no answer", OK: "another program answers on its port"}.get(status, f"status {status}")
            self.wait(POLL_S)
        return trouble

    def _listens(self) -> bool:
        """Whether this server answers, not another that was quicker to take the port."""
        try:
            sockets = [sock for pid in self.pids for sock in psutil.Process(pid).net_connections("tcp")]
        except psutil.NoSuchProcess:
            return False  # tried again
        except psutil.AccessDenied:
            return True
        return any(sock.status == psutil.CONN_LISTEN and sock.laddr.port == self._port for sock in sockets)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Replaces an EngineError of the block by the server's last error line where the server has died."""
        try:
            yield
        except EngineError as error:
            if _health(self.url, HEALTH_TIMEOUT_S) is None and self.wait(DEATH_S):
                raise self.failure() from error
            raise


def start_server(command: Sequence[str], log_path: Path, timeout_s: float, **options: Any) -> Server:
    """A healthy server; another port is tried once where the first was taken. Options are those of `Process`.

    Raises InputError as `Server`, and EngineError with its last error line: it ended (OutOfMemoryError where memory ran
    out), or was not healthy in time. It is stopped then.
    """
    deadline_s = time.monotonic() + timeout_s
    for is_last in (False, True):
        server = Server(command, log_path, **options)
        try:
            trouble = server.trouble(deadline_s)
            if server.alive and not trouble:
                return server
            if server.alive:
                raise server.failure(f"was not healthy after {timeout_s:g} s ({trouble})")
            if is_last or not is_port_taken(server.last_error_line()):
                raise server.failure()
        except BaseException:
            server.stop()
            raise
        server.stop()
    raise AssertionError


def _health(url: str, timeout_s: float) -> int | None:
    """The status of its health check; None for no answer."""
    try:
        return httpx2.get(f"{url}/health", timeout=timeout_s, trust_env=False).status_code
    except httpx2.HTTPError:
        return None


Key = TypeVar("Key", bound=Hashable)
Member = TypeVar("Member", bound=Process)


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
