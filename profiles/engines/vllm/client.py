"""The client of one vLLM worker process (`worker.py`): commands as JSON lines, and its end in every case."""

import contextlib
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

from profiles.engines.serving.logs import is_out_of_memory, one_line
from profiles.engines.serving.process import DEATH_S, Process
from profiles.records.errors import EngineError, OutOfMemoryError
from profiles.records.files import user_folder

WORKER = Path(__file__).with_name("worker.py")
HELLO_TIMEOUT_S = 60.0
GOODBYE_S = 20.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are folders here
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class WorkerClient(Process):
    """A worker run by `python`, which reports its versions first.

    Any failure ends it and is raised as EngineError, or OutOfMemoryError where memory ran out. Raises InputError: no
    such Python, or a log that cannot be written.
    """

    def __init__(self, python: str, log_path: Path, *, worker: Path = WORKER) -> None:
        scratch = tempfile.mkdtemp(prefix="draftpick-vllm-")  # an engine leaves a file behind
        self._clean_up = weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)
        compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{user_folder('cache')}/torchinductor")
        variables = {**ENVIRONMENT, "TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": compiled}
        if threads := os.environ.get("OMP_NUM_THREADS"):
            variables["NUMBA_NUM_THREADS"] = threads  # else the n-gram drafter's numba raises torch's threads
        super().__init__([python, "-P", str(worker)], log_path, environment=variables, piped=True)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read_lines, args=(self.pipes[1],), daemon=True).start()
        self.facts: dict[str, Any] = self._answer("the start", HELLO_TIMEOUT_S)
        self.warm: set[tuple[str, int]] = set()  # (setup digest, batch size) that ran here before

    def call(self, command: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """The worker's answer to one command, within `timeout_s` seconds."""
        request = json.dumps({"command": command, **arguments})
        with contextlib.suppress(OSError):  # a dead worker is seen when its answer does not come
            stdin, _ = self.pipes
            stdin.write(request.encode() + b"\n")
            stdin.flush()
        return self._answer(command, timeout_s)

    def stop(self) -> None:
        """Ends it, by its own exit where it listens; safe to call again."""
        with contextlib.suppress(OSError):
            self.pipes[0].close()
        self.wait(GOODBYE_S)
        self._kill()

    def _kill(self) -> None:
        super().stop()
        self._clean_up()

    def _read_lines(self, stdout: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed when the process is stopped
            for line in stdout:
                self._lines.put(line)
        self._lines.put(b"")

    def _answer(self, command: str, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._kill()
            raise self.failure(f"with vLLM did not answer {command!r} within {timeout_s:g} s") from None
        except BaseException:  # Ctrl-C: the answer that is still to come must not be taken for another's
            self._kill()
            raise
        if not line:
            self.wait(DEATH_S)
            self._kill()
            raise self.failure()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._kill()
            raise EngineError(f"vLLM's worker answered {command!r} with what is no answer: {one_line(str(line))}")
        if "error" in answer:
            self.stop()
            message = one_line(str(answer["error"]))
            kind = OutOfMemoryError if answer.get("memory") or is_out_of_memory(message) else EngineError
            raise kind(f"vLLM failed at {command!r}: {message} (log: {self.log_path})")
        return answer


def find_python(path: str | None) -> str:
    """The Python that has vLLM: the one given, else $DRAFTPICK_VLLM_PYTHON, else this one."""
    return path or os.environ.get("DRAFTPICK_VLLM_PYTHON") or sys.executable
