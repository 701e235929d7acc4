"""Child processes and servers, a load on them, and a pool of them: with a server without a model."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from profiles.engines.serving import process as processes
from profiles.engines.serving.http_load import Answer, drive
from profiles.engines.serving.logs import last_error_line, one_line
from profiles.engines.serving.process import Process, ServerPool, free_port, start_server
from profiles.records.errors import EngineError
from tests import ROOT
from tests.support.fake_server import following

FAKE = (sys.executable, str(ROOT / "tests/support/fake_server.py"), "--port", "{port}", "--host", "{host}")
BODY = {"prompt": [5], "max_tokens": 6, "return_token_ids": True}


def tokens_of(answer: Answer) -> list[int]:
    return [token for event in answer.events for choice in event["choices"] for token in choice["token_ids"]]


def expected(first: int, count: int) -> list[int]:
    tokens = [first]
    for _ in range(count):
        tokens.append(following(tokens[-1]))
    return tokens[1:]


def gone(pids: tuple[int, ...]) -> bool:
    """Whether none of them lives, after ten seconds at most."""
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return not psutil.wait_procs(left, timeout=10.0)[1]


def test_a_process_and_its_pipes(tmp_path: Path) -> None:
    """What is written to its input comes back; its input's end is seen; its stderr is in the log."""
    code = "import sys; [print(line.strip()[::-1], flush=True) for line in sys.stdin]; sys.stderr.write('bye\\n')"
    with Process([sys.executable, "-c", code], tmp_path / "log", piped=True) as child:
        stdin, stdout = child.pipes
        stdin.write(b"abc\n")
        stdin.flush()
        assert stdout.readline() == b"cba\n"
        assert len(child.pids) == 2
        stdin.close()
        assert child.wait(10.0)
    assert (tmp_path / "log").read_text() == "bye\n"
    child.stop()


def test_a_process_ends_when_forgotten(tmp_path: Path) -> None:
    """Nothing lives on when the object is gone."""
    child = Process(["sleep", "1000"], tmp_path / "log")
    pids = child.pids
    del child
    assert gone(pids)


def test_output_grows_at_the_end_of_a_log(tmp_path: Path) -> None:
    """The log of the start before is kept, and its words are not taken for those of this start."""
    log = tmp_path / "folder" / "log"
    for words in ("Error: one", ""):
        with Process(["sh", "-c", f"echo {words}; exit 4"], log) as child:
            assert child.wait(10.0)
            failure = str(child.failure())
    assert failure == f"sh ended with exit code 4: its log is empty (log: {log})"
    assert "one" in log.read_text()


def test_a_server_under_load(tmp_path: Path) -> None:
    """Every request is answered in its place; rows overlap up to the concurrency asked for, and no more."""
    with start_server(FAKE, tmp_path / "log", 20.0) as server:
        bodies = [{**BODY, "prompt": [first]} for first in range(10)]
        answers = drive(server.url, "/v1/completions", bodies, 4)
        assert [tokens_of(answer) for answer in answers] == [expected(first, 6) for first in range(10)]
        spans = [(answer.started_s, answer.chunks[-1][0]) for answer in answers]
        in_flight = [sum(start <= at < end for start, end in spans) for at, _ in spans]
        assert max(in_flight) == 4
        pids = server.pids
    assert gone(pids)


def test_a_load_is_kept_up(tmp_path: Path) -> None:
    """Five requests, the last a long one, two in flight: others keep it company to its end and are thrown away."""
    with start_server([*FAKE, "--step-s", "0.02"], tmp_path / "log", 20.0) as server:
        bodies = [{**BODY, "max_tokens": size} for size in (3, 3, 3, 3, 30)]
        answers = drive(server.url, "/v1/completions", bodies, 2)
        assert len(answers) == 5
        assert answers[-1].refills >= 3
        alone = drive(server.url, "/v1/completions", bodies[-2:], 2)
        assert alone[-1].refills == 0


def test_a_taken_port_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose port another program took is started once more on another."""
    with start_server(FAKE, tmp_path / "first", 20.0) as first:
        taken = int(first.url.rpartition(":")[2])
        ports = iter([taken, free_port()])
        monkeypatch.setattr(processes, "free_port", lambda: next(ports))
        with start_server(FAKE, tmp_path / "second", 20.0) as second:
            assert second.url != first.url
            assert "Address already in use" in (tmp_path / "second").read_text()


class Member:
    """Something to keep; `alive` is set by hand."""

    def __init__(self, key: str, stopped: list[str]) -> None:
        self.key, self.alive, self._stopped = key, True, stopped

    def stop(self) -> None:
        self._stopped.append(self.key)


def test_a_pool() -> None:
    """So many live at most, the least recently used goes first; a dead one is started again."""
    stopped: list[str] = []
    pool = ServerPool(lambda key: Member(key, stopped), 2)
    first = pool.get("a")
    pool.get("b")
    assert pool.get("a") is first
    pool.get("c")
    assert stopped == ["b"]
    first.alive = False
    assert pool.get("a") is not first
    assert (stopped, pool.num_starts) == (["b", "a"], 4)
    pool.close()
    pool.close()
    assert stopped == ["b", "a", "c", "a"]


def test_a_pool_whose_start_fails() -> None:
    """The error goes through, the failed start is counted and nothing is kept of it."""

    def fail(key: str) -> Member:
        raise EngineError(key)

    pool = ServerPool(fail, 1)
    for _ in range(2):
        with pytest.raises(EngineError):
            pool.get("a")
    assert (pool.num_starts, pool.members) == (2, ())


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("loading\nready\n", "ready"),
        ("ValueError: bad\nINFO shutting down\n", "ValueError: bad"),
        (
            "ValueError: bad\nRuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: bad",
        ),
        (
            "(W pid=1) ERROR 11-22 12:53:48 [a.py:1]     raise ValueError(\n"
            "(W pid=1) ERROR 11-22 12:53:48 [a.py:1] ValueError: too little memory\n"
            "(W pid=1) ERROR 11-22 12:53:48 [a.py:1] W failed to start.\n    raise RuntimeError(\n",
            "ValueError: too little memory",
        ),
        ("1 validation error for Config\n  Value error, too long\n", "Value error, too long"),
        ("RuntimeError: See root cause above.\n", "RuntimeError: See root cause above."),
        ("(EngineCore pid=12) ERROR 11-22 12:53:48 [core.py:1] ValueError: bad\n", "ValueError: bad"),
        ("ERROR: no weights\nINFO: bye\n", "no weights"),
        ("\x1b[31merror\x1b[0m: a\tb\x07c\r\n", "error: a b c"),
        ("error: " + "x" * 1000, "error: " + "x" * 293),
        ("error: \xff\xfe", "error: \xff\xfe"),
    ],
)
def test_last_error_line(tmp_path: Path, log: str, words: str) -> None:
    """The line that tells the cause, without prefixes, colours and what cannot be printed, and not too long."""
    (tmp_path / "log").write_text(log)
    assert last_error_line(tmp_path / "log") == words
    assert last_error_line(tmp_path / "none") == ""
    assert one_line("a\nb") == "a b"


KILLED = """
import sys, time
from pathlib import Path
from profiles.engines.serving.process import start_server
server = start_server(sys.argv[2:], Path(sys.argv[1]), 20.0, graces_s=(0.5, 0.5))
print(*server.pids, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("fault", ["", "deaf", "grandchild"])
def test_nothing_outlives_a_killed_tuner(tmp_path: Path, fault: str) -> None:
    """After `kill -9` of the process that started it, a server goes away with all it started, willing or not."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "log"), *FAKE, "--fault", fault]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as tuner:
        pids = tuple(int(word) for word in tuner.stdout.readline().split())
        assert len(pids) == (3 if fault == "grandchild" else 2)
        tuner.kill()
    assert gone(pids)
