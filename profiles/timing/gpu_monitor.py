"""Watches a GPU while something is timed on it: was it slowed down, and did another process compute on it?

Asks NVIDIA's management library (NVML). Where there is no such GPU, no library or no answer, nothing is measured and
nothing counts as disturbed; nothing here raises. Knows nothing of what is being timed.
"""

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import Any, Self

from profiles.hardware.nvml import UUID, _ask, device_handle

_EVERY_S = 0.05


_MOST_OTHERS_PERCENT = 5  # a desktop that redraws itself stays below


_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0


# NVML renamed "throttle reasons" to "event reasons"; the bits stayed, so they are spelled here
_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability limit",
}


# The power cap is the board's own limit under full load, not a fault; it counts because clocks then follow the work.
_SLOWING = frozenset(name for bit, name in _REASONS.items() if bit in (0x004, 0x008, 0x020, 0x040, 0x080))


_ASKS_REASONS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One sample; None where NVML does not tell. `reasons`: why clocks are below their highest, idling included."""

    clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    reasons: tuple[str, ...]

    @property
    def slowed_by(self) -> tuple[str, ...]:
        """The reasons that distort a timing: power cap, power brake, thermal and hardware slowdown."""
        return tuple(reason for reason in self.reasons if reason in _SLOWING)


class GpuWatch:
    """Samples a GPU at both ends of a `with` block and every 0.05 s within; one object serves one block at a time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._handle: Any = None
        self._samples: list[GpuState] = []
        self._others_percent: int | None = None
        self._asked_us = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._samples, self._others_percent, self._thread = [], None, None
        self._ended.clear()
        if not self._device.startswith(("cuda", UUID)):
            return self
        _ask("nvmlInit")
        self._handle = device_handle(self._device)
        if self._handle is None:
            _ask("nvmlShutdown")
            return self
        self._asked_us = max((sample.timeStamp for sample in self._process_samples(0)), default=0)
        self._samples.append(_state(self._handle))
        thread = threading.Thread(target=self._sample, name="gpu-watch", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads to be had: the two ends must do
            thread.start()
            self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._handle is None:
            return
        if self._thread is not None:
            self._thread.join()
        self._samples.append(_state(self._handle))
        self._others_percent = self._others()
        self._handle = None
        _ask("nvmlShutdown")

    @property
    def samples(self) -> tuple[GpuState, ...]:
        """What was seen, in order; empty where nothing can be measured."""
        return tuple(self._samples)

    @property
    def others_percent(self) -> int | None:
        """Share of the GPU's multiprocessor time that other processes took; None where NVML does not tell."""
        return self._others_percent

    @property
    def disturbed(self) -> bool:
        """Whether a sample was slowed down (a power cap counts) or others computed for more than 5 % of the time."""
        return self.worst is not None

    @property
    def worst(self) -> str | None:
        """One sentence that names what disturbed; None when nothing did."""
        said = []
        if reasons := sorted({reason for state in self._samples for reason in state.slowed_by}):
            said.append(f"was slowed by {' and '.join(reasons)}{self._extremes()}")
        if (self._others_percent or 0) > _MOST_OTHERS_PERCENT:
            said.append(f"was {self._others_percent} % busy with other processes")
        return f"GPU {self._device} {' and '.join(said)}" if said else None

    def _sample(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._samples.append(_state(self._handle))

    def _extremes(self) -> str:
        """The lowest clock, highest power and highest temperature of the slowed samples, as far as they are known."""
        slowed = [state for state in self._samples if state.slowed_by]
        clocks = [state.clock_mhz for state in slowed if state.clock_mhz is not None]
        powers = [state.power_w for state in slowed if state.power_w is not None]
        temperatures = [state.temperature_c for state in slowed if state.temperature_c is not None]
        told = [f"down to {min(clocks)} MHz"] if clocks else []
        told += [f"up to {max(powers):.0f} W"] if powers else []
        told += [f"up to {max(temperatures)} C"] if temperatures else []
        return f" ({', '.join(told)})" if told else ""

    def _process_samples(self, since_us: int) -> list[Any]:
        """Every process's use of the multiprocessors since then; NVML fails where none computed: an empty list here."""
        samples = _ask("nvmlDeviceGetProcessUtilization", self._handle, since_us) or []
        # entries of processes that have ended can hold any number
        return [sample for sample in samples if sample.timeStamp > since_us and sample.smUtil <= 100]

    def _others(self) -> int | None:
        """Percent taken by all processes but this one.

        In a container NVML can name processes by the host's numbers, of which none is known to be ours: then the
        busiest is taken to be us.
        """
        used: dict[int, int] = {}
        for sample in self._process_samples(self._asked_us):
            used[sample.pid] = max(used.get(sample.pid, 0), sample.smUtil)
        if not used:
            return None
        own = os.getpid()
        running = {process.pid for process in _ask("nvmlDeviceGetComputeRunningProcesses", self._handle) or []}
        if own not in used and not (own in running and used.keys() <= running):
            own = max(used, key=lambda pid: used[pid])
        return sum(percent for pid, percent in used.items() if pid != own)


def _state(handle: Any) -> GpuState:
    power_mw = _ask("nvmlDeviceGetPowerUsage", handle)
    masks = (_ask(name, handle) for name in _ASKS_REASONS)  # the second is only asked where the first has no answer
    mask = next((mask for mask in masks if mask is not None), 0)
    return GpuState(
        clock_mhz=_ask("nvmlDeviceGetClockInfo", handle, _SM_CLOCK),
        memory_clock_mhz=_ask("nvmlDeviceGetClockInfo", handle, _MEMORY_CLOCK),
        power_w=None if power_mw is None else power_mw / 1000,
        temperature_c=_ask("nvmlDeviceGetTemperature", handle, _GPU_TEMPERATURE),
        reasons=tuple(name for bit, name in _REASONS.items() if mask & bit),
    )
