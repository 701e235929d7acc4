"""Runs one command for its parent and sees that nothing of it outlives either; started as a script by `process`.

The parent holds the other end of a pipe. When that closes, because the parent says so or because it is gone, even by
`kill -9`, the command's process group gets SIGINT, SIGTERM and SIGKILL in turn. When the command has ended, whatever it
started and left behind is ended too: on Linux the keeper inherits orphans, whatever group they moved to. Imports
nothing of draftpick.
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


def keep(lifeline: int, graces_s: Sequence[float], command: Sequence[str]) -> int:
    """Runs the command until it ends or the lifeline closes; its exit code, 128 and the number for a signal.

    `graces_s`: what it has to end by itself after SIGINT, and after SIGTERM.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a handler, unlike "ignore", is not passed on to the command
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    keeper = os.getpid()

    def tie_to_keeper() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(NOT_STARTED)

    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=tie_to_keeper)  # noqa: PLW1509 -- no thread yet
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"error: {command[0]} cannot be started: {error}\n")
        return NOT_STARTED
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # the command alone holds its pipes, so that their ends are seen
    os.dup2(nothing, 1)
    threading.Thread(target=_stop_at_end_of, args=(lifeline, child, graces_s), daemon=True).start()
    code = child.wait()
    _end_leftovers()
    return code if code >= 0 else SIGNALLED - code


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _stop_at_end_of(lifeline: int, child: subprocess.Popen[bytes], graces_s: Sequence[float]) -> None:
    os.read(lifeline, 1)  # a word from the parent, or its end
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
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        psutil.wait_procs(left, timeout=grace_s)
        number = signal.SIGKILL


if __name__ == "__main__":
    lifeline_text, graces_text, *words = sys.argv[1:]
    sys.exit(keep(int(lifeline_text), [float(one) for one in graces_text.split(",")], words))
