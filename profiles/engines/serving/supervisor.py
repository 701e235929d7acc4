"""Runs one command for a parent process and ends everything that the command started; run as a script by `process`.

The parent holds the other end of a pipe. When the pipe closes, also because the parent was killed by `kill -9`, the
command's process group gets SIGINT, SIGTERM and SIGKILL in turn. When the command has ended, processes it left behind
are ended too: on Linux the supervisor inherits orphans of any process group. Imports nothing of draftpick.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LEFTOVER_GRACE_S = 2.0
NOT_STARTED = 127  # as a shell says it
SIGNALLED = 128


def supervise(lifeline: int, graces_s: Sequence[float], command: Sequence[str]) -> int:
    """Runs the command until it ends or the lifeline closes; returns its exit code, 128 and the number for a signal.

    `graces_s`: seconds to end by itself after SIGINT, and after SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a handler, unlike "ignore", is not passed on to the command
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor_pid = os.getpid()

    def tie_to_supervisor() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor_pid:
            os._exit(NOT_STARTED)

    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=tie_to_supervisor)  # noqa: PLW1509 -- no thread yet
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"error: {command[0]} cannot be started: {error}\n")
        return NOT_STARTED
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)  # the command alone holds its pipes, so that their ends are seen
    os.dup2(devnull, 1)
    threading.Thread(target=_stop_at_end_of, args=(lifeline, child, graces_s), daemon=True).start()
    code = child.wait()
    _end_leftovers()
    return code if code >= 0 else SIGNALLED - code


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _stop_at_end_of(lifeline: int, child: subprocess.Popen[bytes], graces_s: Sequence[float]) -> None:
    os.read(lifeline, 1)  # a byte from the parent, or its end
    for number, grace_s in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), (*graces_s, 0.0), strict=True):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        time.sleep(grace_s)


def _end_leftovers() -> None:
    grace_s, number = LEFTOVER_GRACE_S, signal.SIGTERM
    for _ in range(10):  # what is killed may have been starting something
        left = psutil.Process().children(recursive=True)
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(left, timeout=grace_s)
        number = signal.SIGKILL


if __name__ == "__main__":
    lifeline_fd, graces, *command = sys.argv[1:]
    sys.exit(supervise(int(lifeline_fd), [float(grace) for grace in graces.split(",")], command))
