"""Reads time: the only module that synchronises the device and looks at a clock.

A figure taken while other programs use the processor, or while a GPU is slowed down, is worth nothing, so this module
also watches for both. It knows nothing of models or of what is being timed.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Self, TypeVar

import psutil
import torch

from profiles.timing.gpu_monitor import GpuWatch

_SHORTEST_S = 0.2  # the kernel counts processor time in ticks of 10 ms: a shorter unit cannot be judged
_MOST_CORES = 0.35
MAX_REPEATS = 2

Measurement = TypeVar("Measurement")


class Clock:
    """Seconds that mean finished work: queued device work is waited for before every reading.

    `now` and `wait` stand in for the real clock and the device in tests.
    """

    def __init__(
        self, device: str, *, now: Callable[[], float] = time.perf_counter, wait: Callable[[], None] | None = None
    ) -> None:
        self._now = now
        self._wait = wait
        if wait is None and device.startswith("cuda"):
            self._wait = lambda: torch.cuda.synchronize(device)

    def read(self) -> float:
        """Seconds since an arbitrary start; never runs backwards."""
        if self._wait is not None:
            self._wait()
        return self._now()


def _machine_s() -> float:
    """Processor seconds the whole machine has spent busy since it started, stolen time of a virtual one included.

    In a container this may be the host's figure: then the load of its other containers counts too, as it should.
    """
    times = psutil.cpu_times()
    # user and nice already contain the time of guests
    not_busy = (times.idle, *(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice")))
    return float(sum(times) - sum(not_busy))


def _own_s() -> float:
    """Processor seconds of this process and all its threads, and of its children, those still running included."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            total += sum(child.cpu_times()[:4])
    return total


class OtherLoad:
    """Measures how many cores other processes used inside a `with` block; one object serves one block at a time."""

    def __init__(
        self,
        *,
        now: Callable[[], float] = time.perf_counter,
        machine_s: Callable[[], float] = _machine_s,
        own_s: Callable[[], float] = _own_s,
    ) -> None:
        self._readers = (now, machine_s, own_s)
        self._wall_s = self._others_s = 0.0

    def __enter__(self) -> Self:
        self._start = [read() for read in self._readers]
        return self

    def __exit__(self, *_: object) -> None:
        wall_s, machine_s, own_s = (read() - start for read, start in zip(self._readers, self._start, strict=True))
        self._wall_s, self._others_s = wall_s, max(0.0, machine_s - own_s)

    @property
    def cores(self) -> float | None:
        """Mean number of cores busy with other work; None when the block took 0.2 s or less: too short to tell."""
        return self._others_s / self._wall_s if self._wall_s > _SHORTEST_S else None

    @property
    def disturbed(self) -> bool:
        """Whether others used more than 0.35 cores; False when the block was too short to tell."""
        return self.cores is not None and self.cores > _MOST_CORES


class Disturbance:
    """Watches the processor and every GPU among `devices` inside a `with` block; one object serves one block at a time.

    `load` stands in for the watch on the processor in tests.
    """

    def __init__(self, *devices: str, load: OtherLoad | None = None) -> None:
        self._load = load or OtherLoad()
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
        """What disturbed the GPUs, in one line; None when nothing did. The processor's part is `cores`."""
        return "; ".join(gpu.worst for gpu in self._gpus if gpu.worst is not None) or None


def quietest(measure: Callable[[], Measurement], gpus: Iterable[str] = ()) -> tuple[Measurement, bool]:
    """The quietest of at most three tries, ended by the first undisturbed one, and whether it was disturbed."""
    tries: list[tuple[float, Measurement]] = []
    for _ in range(MAX_REPEATS + 1):
        with Disturbance(*gpus) as load:
            found = measure()
        if not load.disturbed:
            return found, False
        tries.append((load.cores or 0.0, found))
    return min(tries, key=lambda one: one[0])[1], True
