"""Reads time: synchronises the device before every reading, and watches for other load while something is timed."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Self, TypeVar

import psutil

from profiles.timing.gpu_monitor import GpuWatch

_SHORTEST_S = 0.2  # the kernel counts processor time in ticks of 10 ms: a shorter block cannot be judged
_MAX_CORES = 0.35
_MAX_HOST_SHARE = 0.25  # of a GPU's host, which needs a core only to launch work: large hosts are never idle
MAX_REPEATS = 2

Measurement = TypeVar("Measurement")


class Clock:
    """Seconds that mean finished work: every reading waits for queued device work first.

    `now` and `wait` stand in for the real clock and device in tests.
    """

    def __init__(
        self, device: str, *, now: Callable[[], float] = time.perf_counter, wait: Callable[[], None] | None = None
    ) -> None:
        self._now = now
        self._wait = wait
        if wait is None and device.startswith("cuda"):
            import torch  # only where there is a GPU: what reads the times of a server needs no torch

            self._wait = lambda: torch.cuda.synchronize(device)

    def read(self) -> float:
        """Seconds since an arbitrary start; never runs backwards."""
        if self._wait is not None:
            self._wait()
        return self._now()


def _machine_s() -> float:
    """Busy processor seconds of the whole machine since it started, stolen time included.

    In a container this may be the host's figure: then the load of its other containers counts too, as it should.
    """
    times = psutil.cpu_times()
    # user and nice already contain the time of guests
    not_busy = (times.idle, *(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice")))
    return float(sum(times) - sum(not_busy))


def _process_s() -> float:
    """Processor seconds of this process and its children, those still running included."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            total += sum(child.cpu_times()[:4])
    return total


class OtherLoad:
    """Measures how many cores other processes used inside a `with` block. Reusable, one block at a time."""

    def __init__(
        self,
        *,
        now: Callable[[], float] = time.perf_counter,
        machine_s: Callable[[], float] = _machine_s,
        process_s: Callable[[], float] = _process_s,
        max_cores: float = _MAX_CORES,
    ) -> None:
        self._max_cores = max_cores
        self._readers = (now, machine_s, process_s)
        self._wall_s = self._others_s = 0.0

    def __enter__(self) -> Self:
        self._start = [read() for read in self._readers]
        return self

    def __exit__(self, *_: object) -> None:
        wall_s, machine_s, process_s = (read() - start for read, start in zip(self._readers, self._start, strict=True))
        self._wall_s, self._others_s = wall_s, max(0.0, machine_s - process_s)

    @property
    def cores(self) -> float | None:
        """Mean number of cores busy with other work; None when the block was too short to tell."""
        return self._others_s / self._wall_s if self._wall_s > _SHORTEST_S else None

    @property
    def disturbed(self) -> bool:
        """Whether others used more than `max_cores`."""
        return self.cores is not None and self.cores > self._max_cores


def max_other_cores(devices: Iterable[str]) -> float:
    """Cores that other processes may use beside a timing: 0.35, and where a GPU computes a quarter of the host's."""
    on_gpu = any(device.startswith("cuda") for device in devices)
    return max(_MAX_CORES, _MAX_HOST_SHARE * (psutil.cpu_count() or 1)) if on_gpu else _MAX_CORES


class Disturbance:
    """Watches the processor and every GPU among `devices` inside a `with` block. Reusable, one block at a time."""

    def __init__(self, *devices: str, load: OtherLoad | None = None) -> None:
        self._load = load or OtherLoad(max_cores=max_other_cores(devices))
        self._gpus = [GpuWatch(device) for device in devices]

    def __enter__(self) -> Self:
        for gpu in self._gpus:
            gpu.__enter__()
        self._load.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._load.__exit__(*error)
        for gpu in self._gpus:
            gpu.__exit__(*error)

    @property
    def cores(self) -> float | None:
        """Mean number of cores busy with other work; None when the block was too short to tell."""
        return self._load.cores

    @property
    def disturbed(self) -> bool:
        """Whether others used the processor too much, or a GPU was slowed down or used by others."""
        return self._load.disturbed or any(gpu.disturbed for gpu in self._gpus)

    @property
    def worst(self) -> str | None:
        """What disturbed the GPUs, in one line; None when nothing did."""
        return "; ".join(gpu.worst for gpu in self._gpus if gpu.worst is not None) or None


def quietest(measure: Callable[[], Measurement], gpus: Iterable[str] = ()) -> tuple[Measurement, bool]:
    """The first undisturbed of up to three measurements, else the quietest; and whether it was disturbed."""
    disturbed: list[tuple[float, Measurement]] = []
    for _ in range(MAX_REPEATS + 1):
        with Disturbance(*gpus) as load:
            measurement = measure()
        if not load.disturbed:
            return measurement, False
        disturbed.append((load.cores or 0.0, measurement))
    return min(disturbed, key=lambda entry: entry[0])[1], True
