"""Says what machine this is and what is installed on it without loading torch: what a look-up on a serving host needs.

A field that cannot be told is left out, so that "not known" never passes for "equal". The fingerprint under which times
are measured is `profiles.hardware.fingerprint`'s; here the same fields are read by lighter means.
"""

import errno
import importlib.util
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import psutil

from profiles.hardware.device import ENGINE, Machine, drop_unknown, parse_machine
from profiles.hardware.nvml import _gpu, round_to_gib
from profiles.hardware.software import (
    XLLAMACPP,
    draftpick_version,
    installed_version,
    installed_version_in,
    llama_server_path,
    server_version,
)
from profiles.records.errors import InputError
from profiles.records.files import open_file

OVERRIDE = "DRAFTPICK_ENVIRONMENT"


MOST_BYTES = 1_000_000


def this_machine(engine: str = ENGINE, device: str | None = None) -> Machine:
    """What can be told of the machine and of `engine` on it; the file that $DRAFTPICK_ENVIRONMENT names goes first.

    That file is a JSON object with fields of `Environment`; a field it does not have is not known. `device`: `cpu` for
    the processor although there is a GPU. Of a serving engine neither threads nor torch are told. Raises InputError.
    """
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device!r}: allowed are cpu and cuda")
    named = os.environ.get(OVERRIDE)
    if named:
        return read_machine(Path(named), engine)
    found: dict[str, Any] = {"engine": engine}
    on_gpu = _gpu() if device != "cpu" else None
    if device == "cuda" and on_gpu is None:
        raise InputError("device 'cuda': no GPU was found that this process may see")
    found |= _cpu() if on_gpu is None else on_gpu
    found |= _torch(on_gpu=on_gpu is not None)
    if engine == ENGINE:
        return drop_unknown({**found, "threads": num_threads(), "engine_version": torch_engine_version()})
    found.pop("torch", None)  # a serving engine brings its own, and takes what threads it takes
    return drop_unknown({**found, "engine_version": serving_engine_version(engine)})


def read_machine(path: Path, engine: str = ENGINE) -> Machine:
    """The machine that a JSON file describes, asked for `engine`; what it says of another engine does not count.

    Raises InputError: unreadable, or a field or value not allowed.
    """
    found = dict(_read(path))
    if found.get("engine", engine) != engine:
        found.pop("engine_version", None)
    return {**found, "engine": engine}


def _read(path: Path) -> Machine:
    try:
        with open_file(path) as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        raw = json.loads(text)
    except OSError as error:
        needed = f"a file of at most {MOST_BYTES} bytes is needed"
        raise InputError(f"environment {path} cannot be read: {error.strerror}: {needed}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"environment {path} cannot be read: {error}") from error
    try:
        return parse_machine(raw)
    except InputError as error:
        raise InputError(f"environment {path}: {error}") from error


def torch_engine_version() -> str | None:
    """Of the engine that ships with draftpick; None without transformers, which is a part of it."""
    transformers = installed_version("transformers")
    return None if transformers is None else f"{draftpick_version()}+transformers-{transformers}"


def serving_engine_version(engine: str) -> str | None:
    """Of a serving engine as a run on it here would find it, spelled as its adapter does; None where there is none.

    vLLM's is asked of the Python that $DRAFTPICK_VLLM_PYTHON names, llama.cpp's of what $DRAFTPICK_LLAMA_SERVER names,
    if they do.
    """
    if engine == "llamacpp":
        named = llama_server_path()
        program = named or shutil.which("llama-server")
        package = installed_version(XLLAMACPP)
        if package is not None and named is None:
            return f"{XLLAMACPP} {package}"
        return None if program is None else server_version([program])
    python = os.environ.get("DRAFTPICK_VLLM_PYTHON")
    return installed_version_in(python, engine) if engine == "vllm" and python else installed_version(engine)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name; where the kernel tells none (ARM, other systems), the architecture."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cpu() -> dict[str, Any]:
    return {
        "device": processor_name(),
        "device_count": 1,
        "memory_bytes": round_to_gib(psutil.virtual_memory().total),
        "driver": None,
        "cuda": None,
    }


def _torch(on_gpu: bool) -> dict[str, str]:
    """Versions as the installed torch's own file states them; it is not imported, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    folders = [] if spec is None else spec.submodule_search_locations or []
    stated = "".join((Path(folder) / "version.py").read_text() for folder in folders[:1])
    asked = {"torch": r"^__version__ = '([^']+)'", "cuda": r"^cuda\b.*= '([^']+)'"}
    found = {name: re.search(pattern, stated, re.MULTILINE) for name, pattern in asked.items()}
    return {name: match[1] for name, match in found.items() if match and (on_gpu or name == "torch")}


def num_threads() -> int | None:
    """The number torch would use on its own: the variables of MKL and OpenMP, else the cores this process may use."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    cores: int | None = psutil.cpu_count(logical=False)
    if cores is None or not hasattr(os, "sched_getaffinity"):
        return cores
    return min(cores, len(os.sched_getaffinity(0)))
