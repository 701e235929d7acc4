"""Describes this machine and its engines without loading torch, as a look-up on a serving host needs it.

Fields that cannot be told are left out, so that "unknown" never counts as "equal". `fingerprint` reads the same fields
for measurements, with torch.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil

from profiles.hardware import container
from profiles.hardware.device import ENGINE, Machine, drop_unknown, parse_machine
from profiles.hardware.nvml import first_gpu, round_to_gib
from profiles.hardware.software import (
    XLLAMACPP,
    draftpick_version,
    installed_version,
    installed_version_in,
    llama_server_path,
    server_version,
)
from profiles.records.errors import InputError, require
from profiles.records.files import open_file

ENVIRONMENT_VARIABLE = "DRAFTPICK_ENVIRONMENT"
_MAX_FILE_BYTES = 1_000_000


def this_machine(engine: str = ENGINE, device: str | None = None) -> Machine:
    """This machine, and `engine` on it; $DRAFTPICK_ENVIRONMENT may name a file that describes another.

    `device`: `cpu` describes the processor even beside a GPU. Raises InputError: an unknown device, no GPU, or a bad
    file.
    """
    require(device in (None, "cpu", "cuda"), f"device {device!r}: allowed are cpu and cuda")
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if path:
        return read_machine(Path(path), engine)
    gpu = first_gpu() if device != "cpu" else None
    if device == "cuda" and gpu is None:
        raise InputError("device 'cuda': this process sees no GPU")
    cpu = {"device": processor_name(), "device_count": 1, "memory_bytes": round_to_gib(total_memory())}
    fields: dict[str, Any] = {"engine": engine, **(gpu or {**cpu, "driver": None, "cuda": None})}
    fields |= _torch_versions(on_gpu=gpu is not None)
    if engine == ENGINE:
        return drop_unknown({**fields, "threads": num_threads(), "engine_version": torch_engine_version()})
    fields.pop("torch", None)  # a serving engine brings its own torch and chooses its threads
    return drop_unknown({**fields, "engine_version": serving_engine_version(engine)})


def read_machine(path: Path, engine: str = ENGINE) -> Machine:
    """The machine that a JSON file with fields of `Environment` describes, for `engine`.

    The file's engine version is dropped where it is another engine's. Raises InputError: an unreadable file, or a field
    or value that is not allowed.
    """
    try:
        with open_file(path) as file:
            fields = dict(parse_machine(json.loads(file.read(_MAX_FILE_BYTES))))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"environment {path} cannot be read: {error}") from error
    if fields.get("engine", engine) != engine:
        fields.pop("engine_version", None)
    return {**fields, "engine": engine}


def torch_engine_version() -> str | None:
    """Version of the built-in engine; None without transformers."""
    transformers = installed_version("transformers")
    return None if transformers is None else f"{draftpick_version()}+transformers-{transformers}"


def serving_engine_version(engine: str) -> str | None:
    """Version of the serving engine that a run here would use, spelled as its adapter does; None where there is none.

    $DRAFTPICK_VLLM_PYTHON may name the Python that has vLLM, $DRAFTPICK_LLAMA_SERVER a llama-server.
    """
    if engine == "llamacpp":
        named_program = llama_server_path()
        package = installed_version(XLLAMACPP)
        if package is not None and named_program is None:
            return f"{XLLAMACPP} {package}"
        program = named_program or shutil.which("llama-server")
        return None if program is None else server_version([program])
    python = os.environ.get("DRAFTPICK_VLLM_PYTHON")
    return installed_version_in(python, engine) if engine == "vllm" and python else installed_version(engine)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name, else (ARM, other systems) the architecture."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _torch_versions(*, on_gpu: bool) -> dict[str, str]:
    """torch's version, and on a GPU its CUDA's, from the installed package's own file: importing takes seconds."""
    spec = importlib.util.find_spec("torch")
    folders = [] if spec is None else spec.submodule_search_locations or []
    text = "".join((Path(folder) / "version.py").read_text() for folder in folders[:1])
    patterns = {"torch": r"^__version__ = '([^']+)'"}
    if on_gpu:
        patterns["cuda"] = r"^cuda\b.*= '([^']+)'"
    matches = {name: re.search(pattern, text, re.MULTILINE) for name, pattern in patterns.items()}
    return {name: match[1] for name, match in matches.items() if match}


def total_memory() -> int:
    """Bytes of memory, or what a container may use of it."""
    return min(int(psutil.virtual_memory().total), container.memory_limit() or sys.maxsize)


def num_threads() -> int | None:
    """Threads to compute with: $MKL_NUM_THREADS or $OMP_NUM_THREADS, else the usable physical cores or CPU quota."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    cores: int | None = psutil.cpu_count(logical=False)
    if cores is None:
        return None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return min(cores, usable, container.cpu_quota() or cores)
