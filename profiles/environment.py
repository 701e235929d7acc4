"""Says what machine and software a time is true for, and which device to use.

Times taken under one fingerprint are never used under another. This module loads no model and reads no clock.
"""

import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

import psutil
import pynvml
import torch

from profiles.errors import InputError
from profiles.sizes import GIB
from profiles.terms import Environment

ENGINE = "draftpick-torch"


def pick_device(asked: str | None) -> str:
    """The device to run on; None and `auto` take the GPU when there is one.

    Raises: InputError: an unknown device, or a GPU that is not there.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked in (None, "auto"):
        return "cuda" if num_gpus else "cpu"
    allowed = ["auto", "cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{index}" for index in range(num_gpus))]
    if asked in allowed:
        return asked
    reason = f"{num_gpus} GPUs found" if re.fullmatch(r"cuda(:\d+)?", asked) else "not known"
    raise InputError(f"device {asked!r}: {reason}; allowed are {', '.join(allowed)}")


def free_bytes(device: str) -> int:
    """Memory that can still be allocated on `device`, in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def free_bytes_of_all(device: str) -> int:
    """As `free_bytes`; of all GPUs together where `device` names none of them."""
    if device == "cuda":
        return sum(int(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count()))
    return free_bytes(device)


def fingerprint(device: str) -> Environment:
    """What the times measured on `device` are true for.

    `memory_bytes` is the device's whole memory to the nearest GiB: a kernel or driver update moves it by megabytes.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        name, count, memory_bytes = properties.name, torch.cuda.device_count(), properties.total_memory
    else:
        name, count, memory_bytes = _processor_name(), 1, psutil.virtual_memory().total
    return Environment(
        device=name,
        device_count=count,
        memory_bytes=max(1, round(memory_bytes / GIB)) * GIB,
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        engine=ENGINE,
        engine_version=f"{_own_version()}+transformers-{importlib.metadata.version('transformers')}",
    )


def _processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name; where the kernel tells none (ARM, other systems), the architecture."""
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _driver() -> str | None:
    """The GPU driver's version; None where NVIDIA's management library is not there."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def _own_version() -> str:
    try:
        return importlib.metadata.version("draftpick")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        project = Path(__file__).parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
