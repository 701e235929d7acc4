"""The machine and software that times are measured under, and the device to use."""

import re

import psutil
import torch

from profiles.hardware import container, machine, nvml
from profiles.hardware.device import ENGINE
from profiles.records.core import Environment
from profiles.records.errors import InputError


def pick_device(name: str | None) -> str:
    """The device to run on; None and `auto` take the GPU when there is one.

    Raises InputError: an unknown device, or a GPU that is not there.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "auto"):
        return "cuda" if num_gpus else "cpu"
    allowed = ["auto", "cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{index}" for index in range(num_gpus))]
    if name in allowed:
        return name
    reason = f"{num_gpus} GPUs found" if re.fullmatch(r"cuda(:\d+)?", name) else "unknown"
    raise InputError(f"device {name!r}: {reason}; allowed are {', '.join(allowed)}")


def limit_threads() -> None:
    """Lowers torch's threads to a container's CPU quota, which torch does not read."""
    threads = machine.num_threads()
    if threads is not None and threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def free_bytes(device: str) -> int:
    """Memory that can still be allocated on `device`, in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    in_container = container.free_memory()
    return available if in_container is None else min(available, in_container)


def fingerprint(device: str) -> Environment:
    """What times measured on `device` with the torch engine are true for."""
    on_gpu = device.startswith("cuda")
    driver = capability = bandwidth = None
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        name, count, memory_bytes = properties.name, torch.cuda.device_count(), properties.total_memory
        capability = f"{properties.major}.{properties.minor}"
        driver = nvml.driver_version()  # initialises NVML, which the handle needs
        bandwidth = nvml.memory_bandwidth(nvml.device_handle(device))
    else:
        name, count, memory_bytes = machine.processor_name(), 1, machine.total_memory()
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
