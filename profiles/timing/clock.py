"""Reads time: synchronises the device before every reading, and watches for other load while something is timed."""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self, TypeVar

import psutil

from profiles.timing.gpu_monitor import GpuWatch

_LOG = logging.getLogger(__name__)

_SHORTEST_S = 0.2  # the kernel counts processor time in ticks of 10 ms: a shorter block cannot be judged
_MAX_CORES = 0.35
_MAX_HOST_SHARE = 0.25  # of a GPU's host, which needs a core only to launch work: large hosts are never idle
MAX_REPEATS = 2
_MAX_VAIN_S = 60.0  # spent on repeats that were disturbed too, since the last quiet measurement
_SECONDS_BETWEEN_LINES = 30.0
_PAUSE_S = 1.0  # in which what has just ended at the start may end
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how OpenMP's threads wait for each other

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


def max_other_cores(devices: Iterable[str]) -> float:
    """Cores that other processes may use beside a timing: 0.35, and where a GPU computes a quarter of the host's."""
    on_gpu = any(device.startswith("cuda") for device in devices)
    return max(_MAX_CORES, _MAX_HOST_SHARE * (psutil.cpu_count() or 1)) if on_gpu else _MAX_CORES


class Disturbance:
    """Measures how many cores other processes used inside a `with` block, and watches every GPU among `devices`.

    Reusable, one block at a time. `max_cores`: what others may use, by default `max_other_cores`.
    """

    def __init__(
        self,
        *devices: str,
        now: Callable[[], float] = time.perf_counter,
        machine_s: Callable[[], float] = _machine_s,
        process_s: Callable[[], float] = _process_s,
        max_cores: float | None = None,
    ) -> None:
        self._max_cores = max_other_cores(devices) if max_cores is None else max_cores
        self._readers = (now, machine_s, process_s)
        self._gpus = [GpuWatch(device) for device in devices]
        self._wall_s = self._others_s = 0.0

    def __enter__(self) -> Self:
        for gpu in self._gpus:
            gpu.__enter__()
        self._start = [read() for read in self._readers]
        return self

    def __exit__(self, *error: object) -> None:
        wall_s, machine_s, process_s = (read() - start for read, start in zip(self._readers, self._start, strict=True))
        self._wall_s, self._others_s = wall_s, max(0.0, machine_s - process_s)
        for gpu in self._gpus:
            gpu.__exit__(*error)

    @property
    def cores(self) -> float | None:
        """Mean number of cores busy with other work; None when the block was too short to tell."""
        return self._others_s / self._wall_s if self._wall_s > _SHORTEST_S else None

    @property
    def disturbed(self) -> bool:
        """Whether others used the processor too much, or a GPU was slowed down or used by others."""
        is_busy = self.cores is not None and self.cores > self._max_cores
        return is_busy or any(gpu.disturbed for gpu in self._gpus)

    @property
    def worst(self) -> str | None:
        """What disturbed the GPUs, in one line; None when nothing did."""
        return "; ".join(gpu.worst for gpu in self._gpus if gpu.worst is not None) or None


def other_programs(seconds: float = 0.4, *, max_cores: float = _MAX_CORES) -> str | None:
    """What other programs use of the processor now; None where it is too little to disturb."""
    with Disturbance(max_cores=max_cores) as load:
        time.sleep(seconds)
    return f"other programs use {load.cores:.1f} of {psutil.cpu_count()} cores" if load.disturbed else None


@dataclass(slots=True)
class Patience:
    """How long disturbed measurements of a process are repeated, and when what disturbs them was last named."""

    is_busy: bool = False  # since the start: everything is labelled disturbed, and nothing is repeated
    vain_s: float = 0.0
    named_at_s: float = -math.inf

    def check_start(self, max_cores: float = _MAX_CORES, tries: int = 3) -> str | None:
        """What is to be said where other programs use the processor all the time before anything is measured.

        OpenMP's threads then sleep while they wait for each other. By default they spin, which costs most where a core
        is shared and least where it is not, so sleeping is no default; what is timed in a process whose threads sleep
        is labelled disturbed, also when the others have ended.
        """
        for number in range(tries):
            time.sleep(_PAUSE_S if number else 0.0)
            if (load := other_programs(max_cores=max_cores)) is None:
                return None
        self.is_busy = True
        if "torch" not in sys.modules and not any(name in os.environ for name in _WAIT_VARIABLES):
            os.environ["OMP_WAIT_POLICY"] = "passive"
        return f"{load}: timings are labelled disturbed and prove nothing; run again when they have ended"

    def name_disturbance(self, load: Disturbance) -> None:
        """Logs what disturbed, at most every 30 s."""
        if self.is_busy or time.monotonic() - self.named_at_s < _SECONDS_BETWEEN_LINES:
            return
        cores = f"other programs use {load.cores or 0.0:.1f} of {psutil.cpu_count()} cores"
        _LOG.warning("%s: what is timed meanwhile is labelled disturbed", load.worst or cores)
        self.named_at_s = time.monotonic()


PATIENCE = Patience()  # of this process


def quietest(
    measure: Callable[[], Measurement], gpus: Iterable[str] = (), patience: Patience = PATIENCE
) -> tuple[Measurement, bool]:
    """The first undisturbed of up to three measurements, else the quietest; and whether it was disturbed.

    Repeating ends where it would cost more than a minute in vain: a machine that stays busy is not waited for.
    """
    disturbed: list[tuple[float, Measurement]] = []
    for number in range(MAX_REPEATS + 1):
        started_s = time.monotonic()
        with Disturbance(*gpus) as load:
            measurement = measure()
        if not load.disturbed and not patience.is_busy:
            patience.vain_s = 0.0
            return measurement, False
        elapsed_s = time.monotonic() - started_s
        disturbed.append((load.cores or 0.0, measurement))
        patience.name_disturbance(load)
        patience.vain_s += elapsed_s if number else 0.0
        if patience.is_busy or patience.vain_s + elapsed_s > _MAX_VAIN_S:
            break
    return min(disturbed, key=lambda entry: entry[0])[1], True


def cores_used(
    run: Callable[[], Measurement], processor_s: Callable[[], float] = _process_s
) -> tuple[Measurement, float]:
    """What `run` returns, and the processor seconds that it took per second of wall time."""
    started_s, busy_s = time.perf_counter(), processor_s()
    result = run()
    return result, (processor_s() - busy_s) / (time.perf_counter() - started_s)
