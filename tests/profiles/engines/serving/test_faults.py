"""Servers that fail in one way each: the error line says how, no process is left, and the next run works.

The tuner that is killed itself, ports that are taken and records that are no answers are in the tests beside this one.
"""

import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from profiles.engines.serving.http_load import drive
from profiles.engines.serving.process import GRACES_S, Process, start_server
from profiles.records.core import PLAIN, Setup
from profiles.records.errors import EngineError, InputError, OutOfMemoryError
from tests.profiles.engines.openai.test_engine import NGRAM, PROMPTS, WORKLOAD, engine_at
from tests.profiles.engines.serving.test_process import FAKE, gone

GRANDCHILD = re.compile(r"^grandchild (\d+)$", re.MULTILINE)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(autouse=True)
def _no_orphans() -> Iterator[None]:
    """After every test this process has no more children than before."""
    before = set(children())
    yield
    assert set(children()) <= before


# the server's flags, what is raised, and what its one line says
BEFORE_READY: dict[str, tuple[str, type[EngineError], str]] = {
    "exits at once with a message": (
        "--fault exits",
        EngineError,
        r"ended with exit code 1: ValueError: the draft has another vocabulary \(log: .*\)$",
    ),
    "exits at once and says nothing": ("--fault silent", EngineError, "ended with exit code 5: its log is empty"),
    "wrong flag": (
        "--nonsense 3",
        EngineError,
        "exit code 2: fake_server.py: error: unrecognized arguments: --nonsens",
    ),
    "out of memory": ("--fault out-of-memory", OutOfMemoryError, "torch.OutOfMemoryError: CUDA out of memory"),
    "crashes": ("--fault crashes", EngineError, "was ended by SIGSEGV"),
    "huge log": ("--fault huge-log", EngineError, "RuntimeError: after much talk"),
    "health check hangs": ("--fault health-hangs", EngineError, r"was not healthy after 6 s \(no answer\)"),
    "health says 500 for ever": ("--fault health-500", EngineError, r"was not healthy after 6 s \(status 500\)"),
    "never listens": (
        "--fault never-ready",
        EngineError,
        r"was not healthy after 6 s \(no answer\): loading weights takes long",
    ),
    "leaves a process": ("--fault grandchild-and-exits", EngineError, "RuntimeError: worker failed"),
}
UNDER_LOAD: dict[str, tuple[str, str]] = {
    "killed under load": ("dies-under-load", "ended with exit code 7: RuntimeError: the engine loop died"),
    "refuses with a message": ("answers-400", "answers 400: this model's maximum context length is 8 tokens"),
    "answers a page": ("answers-html", "'text/event-stream', got 'text/html'"),
    "garbage in the stream": ("garbage", "sent '{not json': a JSON object is needed"),
    "error in the stream": ("error-event", "says: EngineCore encountered an issue"),
    "stream ends early": ("ends-early", "ended its answer in the middle, after 3 events"),
    "connection cut": ("cut", "cannot be reached: "),
    "stream stalls": ("stalls", "was silent for 2 s"),
}


@pytest.mark.parametrize("case", BEFORE_READY)
def test_a_server_that_does_not_come_up(tmp_path: Path, case: str) -> None:
    """The draft's server fails with its own last words; plain decoding beside it goes on and nothing is left."""
    flags, kind, said = BEFORE_READY[case]
    ready_s = 6.0 if "not healthy" in said else 60.0  # plain decoding beside it must be ready in it too
    with engine_at(tmp_path, ready_s=ready_s, flags_of=lambda setup: flags.split()) as engine:
        with pytest.raises(kind, match=said) as raised:
            engine.run_together(WORKLOAD, PROMPTS[:2], (Setup(draft=NGRAM, length=2),), "race 0")
        assert "\n" not in str(raised.value)
        assert len(engine.run_together(WORKLOAD, PROMPTS[:2], (PLAIN,), "race 0")) == 2
    for log in tmp_path.iterdir():
        assert gone(tuple(int(pid) for pid in GRANDCHILD.findall(log.read_text())))


@pytest.mark.parametrize("case", UNDER_LOAD)
def test_a_server_that_fails_under_load(tmp_path: Path, case: str) -> None:
    """Each fails with a line that says how, is stopped, and is started afresh for the next question."""
    fault, said = UNDER_LOAD[case]
    faulty = iter([["--fault", fault], []])
    silent_s = 2.0 if fault == "stalls" else 60.0
    with engine_at(tmp_path, silent_s=silent_s, flags_of=lambda setup: next(faulty)) as engine:
        setup = Setup(draft=NGRAM, length=2)
        with pytest.raises(EngineError, match=re.escape(said)):
            engine.run_together(WORKLOAD, PROMPTS[:2], (setup,), "race 0")
        [sample] = engine.run_together(WORKLOAD, PROMPTS[:1], (setup,), "race 0")
        assert sample.output_tokens == WORKLOAD.max_new_tokens


def test_a_server_killed_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    """`kill -9` of a server from outside, while it answers, is told as that; the next run has a new one."""
    slow = iter([["--step-s", "0.4"], []])
    setup = Setup(draft=NGRAM, length=2)
    with engine_at(tmp_path, flags_of=lambda _: next(slow)) as engine:

        def kill() -> None:
            [_supervisor, server] = [child for child in children() if "--step-s" in child.cmdline()]
            server.kill()

        killer = threading.Timer(3.0, kill)
        killer.start()
        with pytest.raises(EngineError, match="was ended by SIGKILL"):
            engine.run_together(WORKLOAD, PROMPTS[:4], (setup,), "race 0")
        killer.join()
        assert len(engine.run_together(WORKLOAD, PROMPTS[:4], (setup,), "race 0")) == 4


def test_a_server_killed_between_two_questions(tmp_path: Path) -> None:
    """It is found dead and started again, its pieces are gone, and the restart is counted."""
    with engine_at(tmp_path) as engine:
        engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN,), "race 0")
        killed = children()
        for child in killed:
            child.kill()
        assert gone(tuple(child.pid for child in killed))
        engine.run_together(WORKLOAD, PROMPTS[:1], (PLAIN,), "race 1")
        assert engine.num_starts == 2


@pytest.mark.parametrize(("fault", "num_pids"), [("deaf", 2), ("grandchild", 3), ("", 2)])
def test_a_server_that_does_not_want_to_end(tmp_path: Path, fault: str, num_pids: int) -> None:
    """One that ignores SIGINT and SIGTERM is killed, and so is what left its process group; by Ctrl-C too."""
    server = start_server((*FAKE, "--fault", fault), tmp_path / "log", 20.0, graces_s=(0.3, 0.3))
    pids = server.pids
    assert len(pids) == num_pids
    with pytest.raises(KeyboardInterrupt), server:
        raise KeyboardInterrupt
    server.stop()
    assert gone(pids)
    assert not server.alive


@pytest.mark.parametrize("command", ["no-such-program", str(Path(__file__).parent), ""])
def test_a_command_that_is_none(tmp_path: Path, command: str) -> None:
    """A program that is not there, a folder and an empty word are refused before anything is started."""
    with pytest.raises(InputError, match=f"command {command!r}: there is no such program"):
        Process([command, "--port"], tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_program_or_log_that_is_none(tmp_path: Path) -> None:
    """A file that may be run but is no program says so in the log; a log's folder that is a file is named."""
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    with Process([str(broken)], tmp_path / "log") as child:
        assert child.wait(10.0)
        assert re.search("exit code 127: error: .*broken cannot be started", str(child.failure()))
    with pytest.raises(InputError, match=r"log .*broken/log cannot be written: "):
        Process([sys.executable], broken / "log")


def test_a_keeper_that_is_killed(tmp_path: Path) -> None:
    """The command goes with its keeper, and the process is seen as ended."""
    with Process(["sleep", "1000"], tmp_path / "log", graces_s=GRACES_S) as child:
        keeper, *commands = child.pids
        while not commands:
            keeper, *commands = child.pids
        os.kill(keeper, 9)
        assert gone(tuple(commands))
        assert child.wait(10.0)
        assert "was ended by SIGKILL" in str(child.failure())


def test_nobody_is_there(tmp_path: Path) -> None:
    """A load on a port without a server is an error that names the URL."""
    body: dict[str, Any] = {"prompt": [1]}
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/v1/completions cannot be reached"):
        drive("http://127.0.0.1:9", "/v1/completions", [body] * 3, 2)
