"""Split from profiles.timing.gpu_monitor."""

import os
import sys
from pathlib import Path
from typing import Any

import pynvml
import torch

from profiles.models.footprint import GIB

UUID = "GPU-"  # how NVML's UUIDs begin


def _ask(name: str, *arguments: object) -> Any:
    """What a function of NVML answers; None where it is missing or fails, whatever it is that it raises."""
    try:
        return getattr(pynvml, name)(*arguments)
    except Exception:
        return None


def device_handle(device: str) -> Any:
    """NVML's handle of torch's device, by UUID or bus address: NVML's numbers ignore CUDA_VISIBLE_DEVICES.

    Or of the device whose UUID is given.
    """
    if device.startswith(UUID):
        return _ask("nvmlDeviceGetHandleByUUID", device)
    try:
        properties = torch.cuda.get_device_properties(device)
        uuid = str(getattr(properties, "uuid", "")).removeprefix(UUID)
        place = [int(getattr(properties, f"pci_{part}_id", -1)) for part in ("domain", "bus", "device")]
    except Exception:  # no such GPU, or a CUDA that does not start: there is nothing to watch
        return None
    handle = _ask("nvmlDeviceGetHandleByUUID", f"{UUID}{uuid}") if uuid else None
    if handle is None and min(place) >= 0:
        handle = _ask("nvmlDeviceGetHandleByPciBusId", "{:08x}:{:02x}:{:02x}.0".format(*place))
    return handle


def driver_version() -> str | None:
    """The GPU driver's version; None where NVIDIA's management library is not there."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def memory_bandwidth(handle: Any) -> int | None:
    """Bytes per second of a GPU's memory: its highest clock, two transfers a cycle, times its bus; None if not told.

    `handle` is NVML's, None where there is none.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        mhz = pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        return int(mhz * 1_000_000 * 2 * pynvml.nvmlDeviceGetMemoryBusWidth(handle) // 8)
    except (pynvml.NVMLError, TypeError):  # a library or driver too old to know the question
        return None


def round_to_gib(num_bytes: int) -> int:
    """To the nearest GiB, and at least one: a kernel or driver update moves a memory's size by megabytes."""
    return max(1, round(num_bytes / GIB)) * GIB


def _gpu() -> dict[str, Any] | None:
    """The first GPU that this process may see, None where there is none; without a name where that cannot be told."""
    if sys.platform == "linux" and not any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/dxg")):
        return None  # without the driver's file the library need not be loaded
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = _visible(pynvml)
        if handles == []:
            return None
        driver = driver_version()
        names = {str(pynvml.nvmlDeviceGetName(handle)) for handle in handles or ()}
        # CUDA counts from the fastest card unless told otherwise, NVML by bus: unlike cards could be taken for others
        if handles is None or (len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"):
            return {"driver": driver}
        first = handles[0]
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(first)
        return {
            "device": str(pynvml.nvmlDeviceGetName(first)),
            "device_count": len(handles),
            "memory_bytes": round_to_gib(pynvml.nvmlDeviceGetMemoryInfo(first).total),
            "driver": driver,
            "compute_capability": f"{major}.{minor}",
            "memory_bandwidth_bytes_s": memory_bandwidth(first),
        }
    except pynvml.NVMLError:
        return None


def _visible(nvml: Any) -> list[Any] | None:
    """NVML's handles of the GPUs that $CUDA_VISIBLE_DEVICES leaves, read as CUDA does: up to the first that is none.

    None where it names slices of a card, which NVML's names do not tell.
    """
    count = int(nvml.nvmlDeviceGetCount())
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    handles = []
    for word in (one.strip() for one in named.split(",")):
        if word.upper().startswith("MIG"):
            return None
        if word.upper().startswith("GPU-"):
            try:
                handles.append(nvml.nvmlDeviceGetHandleByUUID(word))
            except nvml.NVMLError:
                break
        elif word.isdecimal() and int(word) < count:
            handles.append(nvml.nvmlDeviceGetHandleByIndex(int(word)))
        else:
            break
    return handles
