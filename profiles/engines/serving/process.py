"""Child processes that leave nothing behind: a command with its log, and a server on a free port.

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx2
import psutil

from profiles.engines.serving import supervisor
from profiles.engines.serving.logs import error_of, is_port_taken, last_error_line
from profiles.records.errors import EngineError, InputError

GRACES_S = (10.0, 5.0)  # after SIGINT and after SIGTERM
POLL_S = 0.05
HEALTH_TIMEOUT_S = 5.0
DEATH_S = 2 * supervisor.LEFTOVER_GRACE_S  # within which a server that no longer answers is seen as ended
LOCALHOST = "127.0.0.1"
OK, NOT_FOUND = 200, 404


class Process:
    """One running command; a context manager.

    `environment` is added to this process's own. Its output goes to the end of the log; with `piped` only stderr does,
    and `stdin` and `stdout` are pipes. `graces_s`: how long it may take to end after SIGINT, and after SIGTERM. Raises
    InputError: no such command, or a log that cannot be written.
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
        variables = {**os.environ, **(environment or {})}
        if shutil.which(command[0], path=variables.get("PATH")) is None:
            raise InputError(f"command {command[0]!r}: there is no such program, or it may not be run")
        self.name = _name(command)
        self.log_path = log_path
        reading, lifeline = os.pipe()
        try:
            with _opened(log_path) as log:
                self._log_start = log.tell()
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", supervisor.__file__, str(reading), ",".join(map(str, graces_s)), *command],
                    env=variables,
                    stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if piped else log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(reading,),
                )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(reading)
        # at exit, when forgotten, or when asked; only once
        self._end = weakref.finalize(self, _end, self._popen, lifeline, sum(graces_s))

    @property
    def stdin(self) -> Any:
        """The command's standard input, bytes, when piped."""
        return self._popen.stdin

    @property
    def stdout(self) -> Any:
        """The command's standard output, bytes, when piped."""
        return self._popen.stdout

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

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most `timeout_s` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)
        return not self.alive

    def stop(self) -> None:
        """Ends it and all it started; safe to call again."""
        self._end()

    def last_error_line(self) -> str:
        """The last line of its log about an error; empty where the log is."""
        return last_error_line(self.log_path, self._log_start)

    def failure(self, what: str | None = None) -> EngineError:
        """The error to raise, with the last error line of its log: `what` went wrong, by default that it ended."""
        code = self._popen.poll()
        return error_of(f"{self.name} {what or _ending(code)}", self.log_path, self._log_start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _name(command: Sequence[str]) -> str:
    """The program, or the module or script that Python runs."""
    words = [word for word in command if word not in ("-P", "-m", "-u")]
    program = words[1] if len(words) > 1 and Path(words[0]).name.startswith("python") else words[0]
    return Path(program).name.rpartition("profiles.engines.")[2]


@contextlib.contextmanager
def _opened(log_path: Path) -> Iterator[Any]:
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
    except OSError as error:
        raise InputError(f"log {log_path} cannot be written: {error.strerror}") from error
    with log:
        yield log


def _end(popen: subprocess.Popen[bytes], lifeline: int, graces_s: float) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(lifeline, b".")  # a process that was forked off this one may hold the pipe open
    os.close(lifeline)
    try:
        popen.wait(graces_s + 10 * supervisor.LEFTOVER_GRACE_S)
    except subprocess.TimeoutExpired:
        popen.kill()  # and with it the command, which is tied to its supervisor
        popen.wait()
    finally:
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


def free_port(host: str = LOCALHOST) -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


class Server:
    """A command that serves HTTP; a context manager.

    `{host}` and `{port}` in the command's words are filled in, with a free port. Raises InputError as `Process`, and
    where no word has `{port}`.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        *,
        environment: Mapping[str, str] | None = None,
        graces_s: tuple[float, float] = GRACES_S,
    ) -> None:
        if not any("{port}" in word for word in command):
            raise InputError(f"command {' '.join(command)!r}: a {{port}} to fill in is needed")
        self._command, self._log_path = tuple(command), log_path
        self._environment, self._graces_s = environment, graces_s
        self._start()

    def _start(self) -> None:
        port = free_port()
        self.url = f"http://{LOCALHOST}:{port}"
        self._port = port
        words = [word.replace("{host}", LOCALHOST).replace("{port}", str(port)) for word in self._command]
        self.process = Process(words, self._log_path, environment=self._environment, graces_s=self._graces_s)

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def pids(self) -> tuple[int, ...]:
        return self.process.pids

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until it is healthy; another port is tried once where the first was taken.

        Raises EngineError with its last error line: it ended (OutOfMemoryError where memory ran out), or was not
        healthy in time. It is stopped then.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            trouble = self._trouble(deadline_s)
            if not self.alive and is_port_taken(self.process.last_error_line()):
                self.process.stop()
                self._start()
                trouble = self._trouble(deadline_s)
            if not self.alive:
                raise self.process.failure()
            if trouble:
                raise self.process.failure(f"was not healthy after {timeout_s:g} s ({trouble})")
        except BaseException:
            self.stop()
            raise

    def _trouble(self, deadline_s: float) -> str:
        """Waits until it is healthy, dead or out of time; empty when it is healthy."""
        trouble = "no time"
        while self.alive and (left_s := deadline_s - time.monotonic()) > 0.0:
            status = _health(self.url, min(HEALTH_TIMEOUT_S, left_s))
            if status == OK and self._listens():
                return ""
            trouble = {None: "no answer", OK: "another program answers on its port"}.get(status, f"status {status}")
            self.process.wait(POLL_S)
        return trouble

    def _listens(self) -> bool:
        """Whether it is this server that answers, not another that was quicker to take the port."""
        for pid in self.pids:
            try:
                sockets = psutil.Process(pid).net_connections("tcp")
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                return True
            if any(sock.status == psutil.CONN_LISTEN and sock.laddr.port == self._port for sock in sockets):
                return True
        return False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Replaces an EngineError of the block by the server's last error line where the server has died."""
        try:
            yield
        except EngineError as error:
            if _health(self.url, HEALTH_TIMEOUT_S) is None and self.process.wait(DEATH_S):
                raise self.process.failure() from error
            raise

    def stop(self) -> None:
        """Ends it and all it started; safe to call again."""
        self.process.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _health(url: str, timeout_s: float) -> int | None:
    """The status of its health check, or of its list of models without such a check; None for no answer."""
    try:
        status = httpx2.get(f"{url}/health", timeout=timeout_s, trust_env=False).status_code
        if status == NOT_FOUND:
            status = httpx2.get(f"{url}/v1/models", timeout=timeout_s, trust_env=False).status_code
    except httpx2.HTTPError:
        return None
    return status


class RunningServer:
    """A server that others started, used like `Server` but never stopped. Raises InputError: no such URL."""

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"server {url!r}: a URL that starts with http:// or https:// is needed")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.pids: tuple[int, ...] = ()

    @property
    def alive(self) -> bool:
        return True

    def wait_ready(self, timeout_s: float) -> None:
        """Raises EngineError: it does not answer its health check with 200 within `timeout_s` seconds."""
        status = _health(self.url, timeout_s)
        if status != OK:
            detail = "no answer" if status is None else f"status {status}"
            raise EngineError(f"server {self.url} is not healthy: {detail}")

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Only its answers are known."""
        return contextlib.nullcontext()

    def stop(self) -> None:
        """Others started it; it stays up."""
