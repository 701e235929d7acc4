"""Watches a GPU during a timing: was it slowed down, and did another process compute on it?

Where NVML or the GPU is missing nothing is measured and nothing counts as disturbed; nothing here raises.
"""

import os
import threading
from typing import Any, Self

from profiles.hardware.nvml import UUID_PREFIX, device_handle, query

_SAMPLE_EVERY_S = 0.05
_MAX_OTHERS_PERCENT = 5  # a desktop that redraws itself stays below
# NVML's bits of what slows a GPU down. The power cap is no fault; it counts because clocks then follow the work.
_SLOWDOWNS = {
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
}


class GpuWatch:
    """Samples a GPU at both ends of a `with` block and every 0.05 s within. Reusable, one block at a time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._handle: Any = None
        self.samples: list[tuple[str, ...]] = []  # what slowed the GPU down at each; empty where nothing is measured
        self.others_percent: int | None = None  # of its time, by other processes; None where NVML does not tell
        self._since_us = 0
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.samples, self.others_percent = [], None
        self._ended.clear()
        if not self._device.startswith(("cuda", UUID_PREFIX)):
            return self
        query("nvmlInit")
        self._handle = device_handle(self._device)
        if self._handle is None:
            query("nvmlShutdown")
            return self
        self._since_us = max((sample.timeStamp for sample in self._process_samples()), default=0)
        self.samples.append(_slowdowns(self._handle))
        self._thread = threading.Thread(target=self._sample, name="gpu-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._handle is None:
            return
        self._thread.join()
        self.samples.append(_slowdowns(self._handle))
        self.others_percent = self._measure_others()
        self._handle = None
        query("nvmlShutdown")

    @property
    def disturbed(self) -> bool:
        """Whether the GPU was slowed down, or others computed on it for more than 5 % of the time."""
        return self.worst is not None

    @property
    def worst(self) -> str | None:
        """One sentence that names what disturbed; None when nothing did."""
        causes = []
        if slowdowns := sorted({name for sample in self.samples for name in sample}):
            causes.append(f"was slowed by {' and '.join(slowdowns)}")
        if (self.others_percent or 0) > _MAX_OTHERS_PERCENT:
            causes.append(f"was {self.others_percent} % busy with other processes")
        return f"GPU {self._device} {' and '.join(causes)}" if causes else None

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            self.samples.append(_slowdowns(self._handle))

    def _process_samples(self) -> list[Any]:
        """Multiprocessor use per process since `_since_us`; empty where nothing computed."""
        samples = query("nvmlDeviceGetProcessUtilization", self._handle, self._since_us) or []
        # entries of processes that have ended can hold any number
        return [sample for sample in samples if sample.timeStamp > self._since_us and sample.smUtil <= 100]

    def _measure_others(self) -> int | None:
        """Percent taken by all processes but this one.

        In a container NVML may name processes by the host's numbers: then the busiest is taken to be this one.
        """
        percents: dict[int, int] = {}
        for sample in self._process_samples():
            percents[sample.pid] = max(percents.get(sample.pid, 0), sample.smUtil)
        if not percents:
            return None
        this_pid = os.getpid()
        running = {process.pid for process in query("nvmlDeviceGetComputeRunningProcesses", self._handle) or []}
        if this_pid not in percents and not (this_pid in running and percents.keys() <= running):
            this_pid = max(percents, key=lambda pid: percents[pid])
        return sum(percent for pid, percent in percents.items() if pid != this_pid)


def _slowdowns(handle: Any) -> tuple[str, ...]:
    mask = query("nvmlDeviceGetCurrentClocksEventReasons", handle) or 0
    return tuple(name for bit, name in _SLOWDOWNS.items() if mask & bit)
