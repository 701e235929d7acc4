"""Says what machine this is and what is installed on it without loading torch: what a look-up on a serving host needs.

A field that cannot be told is left out, so that "not known" never passes for "equal". The fingerprint under which times
are measured is `profiles.environment`'s; here the same fields are read by lighter means.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pynvml

from profiles.errors import InputError
from profiles.packages import installed
from profiles.sizes import GIB
from profiles.traits import Machine, checked, known

ENGINE = "draftpick-torch"
OVERRIDE = "DRAFTPICK_ENVIRONMENT"


def this_machine(engine: str = ENGINE, device: str | None = None) -> Machine:
    """What can be told of the machine and of `engine` on it; the file that $DRAFTPICK_ENVIRONMENT names goes first.

    That file is a JSON object with fields of `Environment`; a field it does not have is not known. `device`: `cpu` for
    the processor although there is a GPU. Raises InputError.
    """
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device!r}: allowed are cpu and cuda")
    named = os.environ.get(OVERRIDE)
    if named:
        return {"engine": engine, **read_machine(Path(named))}
    found: dict[str, Any] = {"engine": engine, "threads": _threads(), "torch": None, "engine_version": None}
    found |= (_gpu() if device != "cpu" else None) or _cpu()
    found |= _torch(on_gpu="compute_capability" in found)
    found["engine_version"] = own_engine_version() if engine == ENGINE else installed(engine)
    return known(found)


def read_machine(path: Path) -> Machine:
    """The machine that a JSON file describes. Raises InputError: unreadable, or a field or value not allowed."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"environment {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return checked(raw)
    except InputError as error:
        raise InputError(f"environment {path}: {error}") from error


def own_engine_version() -> str | None:
    """Of the engine that ships with draftpick; None without transformers, which is a part of it."""
    transformers = installed("transformers")
    return None if transformers is None else f"{_own_version()}+transformers-{transformers}"


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name; where the kernel tells none (ARM, other systems), the architecture."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def driver_version() -> str | None:
    """The GPU driver's version; None where NVIDIA's management library is not there."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def memory_bandwidth(handle: Any) -> int | None:
    """Bytes per second of a GPU's memory: its highest clock, two transfers a cycle, times its bus; None if not told.

    `handle` is NVML's, None where there is none.
    """
    try:
        pynvml.nvmlInit()
        mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        return int(mhz * 1_000_000 * 2 * pynvml.nvmlDeviceGetMemoryBusWidth(handle) // 8)
    except (pynvml.NVMLError, TypeError):  # a library or driver too old to know the question
        return None


def whole_gib(num_bytes: int) -> int:
    """To the nearest GiB, and at least one: a kernel or driver update moves a memory's size by megabytes."""
    return max(1, round(num_bytes / GIB)) * GIB


def _cpu() -> dict[str, Any]:
    return {
        "device": processor_name(),
        "device_count": 1,
        "memory_bytes": whole_gib(psutil.virtual_memory().total),
        "driver": None,
        "cuda": None,
    }


def _gpu() -> dict[str, Any] | None:
    """The first GPU that this process may see; None where there is none or NVIDIA's library does not answer."""
    try:
        pynvml.nvmlInit()
        visible = _visible(pynvml.nvmlDeviceGetCount())
        if not visible:
            return None
        handle = pynvml.nvmlDeviceGetHandleByIndex(visible[0])
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return {
            "device": str(pynvml.nvmlDeviceGetName(handle)),
            "device_count": len(visible),
            "memory_bytes": whole_gib(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            "driver": driver_version(),
            "compute_capability": f"{major}.{minor}",
            "memory_bandwidth_bytes_s": memory_bandwidth(handle),
        }
    except pynvml.NVMLError:
        return None


def _visible(count: int) -> list[int]:
    """NVML's numbers of the GPUs that $CUDA_VISIBLE_DEVICES leaves; all where it is not set or names them otherwise."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not re.fullmatch(r"(\d+(,\d+)*)?", named):
        return list(range(count))
    return [int(number) for number in named.split(",") if number and int(number) < count]


def _torch(on_gpu: bool) -> dict[str, str]:
    """Versions as the installed torch's own file states them; it is not imported, which would take seconds."""
    spec = importlib.util.find_spec("torch")
    folders = [] if spec is None else spec.submodule_search_locations or []
    stated = "".join((Path(folder) / "version.py").read_text() for folder in folders[:1])
    asked = {"torch": r"^__version__ = '([^']+)'", "cuda": r"^cuda\b.*= '([^']+)'"}
    found = {name: re.search(pattern, stated, re.MULTILINE) for name, pattern in asked.items()}
    return {name: match[1] for name, match in found.items() if match and (on_gpu or name == "torch")}


def _threads() -> int | None:
    """The number torch would use on its own: the variables of MKL and OpenMP, else the cores this process may use."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    cores: int | None = psutil.cpu_count(logical=False)
    if cores is None or not hasattr(os, "sched_getaffinity"):
        return cores
    return min(cores, len(os.sched_getaffinity(0)))


def _own_version() -> str:
    try:
        return importlib.metadata.version("draftpick")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        project = Path(__file__).parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
