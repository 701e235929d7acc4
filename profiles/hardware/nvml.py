"""NVIDIA's management library (NVML), asked without torch wherever possible; what it cannot tell is None."""

import os
import sys
from pathlib import Path
from typing import Any

from profiles.models.footprint import GIB

UUID_PREFIX = "GPU-"
MEMORY_CLOCK = 2


def query(function: str, *arguments: object) -> Any:
    """The result of an NVML function; None where the library or function is missing or fails."""
    try:
        import pynvml

        return getattr(pynvml, function)(*arguments)
    except Exception:  # a broken driver raises more than NVMLError
        return None


def device_handle(device: str) -> Any:
    """NVML's handle of a torch device (`cuda:1`) or GPU UUID; None where there is none.

    Looked up by UUID: NVML's numbers ignore CUDA_VISIBLE_DEVICES.
    """
    uuid = device.removeprefix(UUID_PREFIX)
    if uuid == device:
        import torch

        try:
            uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix(UUID_PREFIX)
        except Exception:  # no such GPU, or CUDA does not start
            return None
    return query("nvmlDeviceGetHandleByUUID", f"{UUID_PREFIX}{uuid}")


def driver_version() -> str | None:
    """Version of the GPU driver; leaves NVML initialised."""
    query("nvmlInit")
    version = query("nvmlSystemGetDriverVersion")
    return None if version is None else str(version)


def memory_bandwidth(handle: Any) -> int | None:
    """Bytes per second of a GPU's memory: highest clock x two transfers a cycle x bus width."""
    query("nvmlInit")
    mhz = query("nvmlDeviceGetMaxClockInfo", handle, MEMORY_CLOCK)
    bits = query("nvmlDeviceGetMemoryBusWidth", handle)
    return None if mhz is None or bits is None else int(mhz * 1_000_000 * 2 * bits // 8)


def round_to_gib(num_bytes: int) -> int:
    """Bytes rounded to a whole number of GiB, at least one: a driver update moves a memory's size by megabytes."""
    return max(1, round(num_bytes / GIB)) * GIB


def first_gpu() -> dict[str, Any] | None:
    """`Environment` fields of the first GPU that this process may use; None without one.

    Only the driver where it cannot be told which card is first.
    """
    if sys.platform == "linux" and not any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/dxg")):
        return None  # without the driver's file the library need not be loaded
    driver = driver_version()
    handles = visible_gpus()
    if driver is None or handles == []:
        return None
    names = {str(query("nvmlDeviceGetName", handle)) for handle in handles or ()}
    # CUDA counts from the fastest card unless told otherwise, NVML by bus: of unlike cards the first is not certain
    if handles is None or (len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"):
        return {"driver": driver}
    capability = query("nvmlDeviceGetCudaComputeCapability", handles[0])
    memory = query("nvmlDeviceGetMemoryInfo", handles[0])
    return {
        "device": query("nvmlDeviceGetName", handles[0]),
        "device_count": len(handles),
        "memory_bytes": None if memory is None else round_to_gib(memory.total),
        "driver": driver,
        "compute_capability": None if capability is None else "{}.{}".format(*capability),
        "memory_bandwidth_bytes_s": memory_bandwidth(handles[0]),
    }


def visible_gpus() -> list[Any] | None:
    """NVML handles of the GPUs in $CUDA_VISIBLE_DEVICES, read as CUDA does: up to the first unknown entry.

    None where it names slices of a card (MIG), which NVML's names do not tell.
    """
    count = query("nvmlDeviceGetCount") or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = map(str, range(count)) if visible is None else (entry.strip() for entry in visible.split(","))
    handles = []
    for entry in entries:
        if entry.upper().startswith("MIG"):
            return None
        if entry.upper().startswith(UUID_PREFIX):
            handle = query("nvmlDeviceGetHandleByUUID", entry)
        else:
            handle = query("nvmlDeviceGetHandleByIndex", int(entry)) if entry.isdecimal() else None
        if handle is None:
            break
        handles.append(handle)
    return handles
