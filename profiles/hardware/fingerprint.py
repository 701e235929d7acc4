"""Says what machine and software a time is true for, and which device to use.

Times taken under one fingerprint are never used under another. This module loads no model and reads no clock.
"""

import re

import psutil
import torch

from profiles.hardware import machine, nvml
from profiles.hardware.device import ENGINE
from profiles.hardware.nvml import device_handle
from profiles.records.core import Environment
from profiles.records.errors import InputError


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


def total_free_bytes(device: str) -> int:
    """As `free_bytes`; of all GPUs together where `device` names none of them."""
    if device == "cuda":
        return sum(int(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count()))
    return free_bytes(device)


def fingerprint(device: str) -> Environment:
    """What the times measured on `device` are true for.

    `memory_bytes` is the device's whole memory to the nearest GiB: a kernel or driver update moves it by megabytes.
    """
    on_gpu = device.startswith("cuda")
    driver = capability = bandwidth = None
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        name, count, memory_bytes = properties.name, torch.cuda.device_count(), properties.total_memory
        capability = f"{properties.major}.{properties.minor}"
        driver = nvml.driver_version()  # and with it NVML is started, of which the handle is asked
        bandwidth = nvml.memory_bandwidth(device_handle(device))
    else:
        name, count, memory_bytes = machine.processor_name(), 1, psutil.virtual_memory().total
    version = machine.torch_engine_version()
    assert version is not None  # transformers is a dependency
    return Environment(
        device=name,
        device_count=count,
        memory_bytes=nvml.round_to_gib(memory_bytes),
        driver=driver,
        cuda=torch.version.cuda if on_gpu else None,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        engine=ENGINE,
        engine_version=version,
        compute_capability=capability,
        memory_bandwidth_bytes_s=bandwidth,
    )
