"""The watch on a GPU, over a made-up NVML: what it samples, what counts as disturbed, and that nothing raises."""

# ruff: noqa: N802, N815 -- the names are those of NVML

import os
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from profiles.timing.gpu_monitor import GpuWatch

UUID = "11111111-2222-3333-4444-555555555555"
IDLE, CLOCKS_SET, POWER_CAP, HARDWARE, BOOST, SOFT_HEAT, HARD_HEAT, BRAKE = (1 << bit for bit in range(8))


class FakeError(Exception):
    """Stands in for NVMLError."""


class FakeNvml:
    """A GPU that answers with `masks` in turn (the last one stays) and is used by `processes` (pid -> percent)."""

    def __init__(self, *masks: int) -> None:
        self.masks = list(masks) or [0]
        self.processes: dict[int, int] = {}
        self.running: list[int] = []
        self.now_us = 1000
        self.num_open = 0
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise FakeError(uuid)
        return "by uuid"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self.asked.append(handle)
        return self.masks.pop(0) if len(self.masks) > 1 else self.masks[0]

    def nvmlDeviceGetProcessUtilization(self, handle: str, since_us: int) -> list[SimpleNamespace]:
        self.now_us += 1000
        if not self.processes:
            raise FakeError("not found")
        return [SimpleNamespace(pid=pid, smUtil=used, timeStamp=self.now_us) for pid, used in self.processes.items()]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in self.running]


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch sees one GPU under that UUID."""
    properties = SimpleNamespace(uuid=UUID)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """Every watch has stopped its thread when its block has ended."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-watch"]


def install(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def watched(monkeypatch: pytest.MonkeyPatch, nvml: Any, device: str = "cuda:0") -> GpuWatch:
    """The watch on a short block."""
    install(monkeypatch, nvml)
    with GpuWatch(device) as watch:
        pass
    return watch


def used_by(processes: dict[int, int], running: tuple[int, ...] = ()) -> FakeNvml:
    """A GPU that these processes use (percent by pid)."""
    nvml = FakeNvml()
    nvml.processes, nvml.running = processes, list(running)
    return nvml


class Stale(FakeNvml):
    """Tells of use before the block too, and arbitrary numbers of processes that ended."""

    def nvmlDeviceGetProcessUtilization(self, handle: str, since_us: int) -> list[SimpleNamespace]:
        samples = super().nvmlDeviceGetProcessUtilization(handle, since_us)
        before = SimpleNamespace(pid=4_000_001, smUtil=80, timeStamp=2000)
        return [*samples, before, SimpleNamespace(pid=4_000_002, smUtil=2**31, timeStamp=2**63)]


class Mute:
    """Answers no question."""

    nvmlInit = nvmlShutdown = staticmethod(lambda: None)
    nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: "handle")

    def __getattr__(self, name: str) -> Any:
        raise (AttributeError if name.startswith("__") else OSError)(name)  # pytest asks for a name


@pytest.mark.parametrize("mask", [0, IDLE, CLOCKS_SET, BOOST, 0x100, 0x200, 0x400, IDLE | CLOCKS_SET, 0x8000])
def test_idling_and_chosen_clocks_do_not_disturb(monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    """Reasons that are a state or a setting do not disturb; a short block has two samples."""
    watch = watched(monkeypatch, FakeNvml(mask))
    assert (watch.samples, watch.disturbed, watch.worst) == ([(), ()], False, None)


@pytest.mark.parametrize(
    ("masks", "name"),
    [
        ((POWER_CAP | CLOCKS_SET,), "software power cap"),
        ((HARDWARE,), "hardware slowdown"),
        ((SOFT_HEAT,), "software thermal slowdown"),
        ((HARD_HEAT,), "hardware thermal slowdown"),
        ((BRAKE,), "hardware power brake"),
        ((HARDWARE, 0), "hardware slowdown"),
        ((0, HARDWARE), "hardware slowdown"),
    ],
)
def test_a_slowdown_disturbs(monkeypatch: pytest.MonkeyPatch, masks: tuple[int, ...], name: str) -> None:
    """Each reason that lowers clocks under work, also among harmless ones and at either end only, is named."""
    watch = watched(monkeypatch, FakeNvml(*masks))
    assert watch.disturbed
    assert watch.worst == f"GPU cuda:0 was slowed by {name}"


def test_a_slowdown_in_the_middle_of_a_long_block_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons that come and go between the ends are found by the thread, all of them named."""
    install(monkeypatch, FakeNvml(0, POWER_CAP, HARD_HEAT, 0))
    with GpuWatch("cuda:0") as watch:
        end = time.monotonic() + 10
        while len(watch.samples) < 4 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(watch.samples) >= 5
    assert watch.worst == "GPU cuda:0 was slowed by hardware thermal slowdown and software power cap"


def test_one_watch_serves_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second block starts afresh, the library is closed as often as it was opened, and errors pass through."""
    nvml = install(monkeypatch, FakeNvml(HARDWARE, HARDWARE, 0))
    watch = GpuWatch("cuda:0")
    with pytest.raises(ValueError, match="planted"), watch:
        raise ValueError("planted")
    assert watch.disturbed
    with watch:
        pass
    assert (watch.disturbed, len(watch.samples), nvml.num_open) == (False, 2, 0)


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])
def test_the_gpu_is_found_whatever_its_number(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    """The UUID tells which GPU torch means; NVML's own numbers are never used."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
    nvml = FakeNvml()
    watched(monkeypatch, nvml, "cuda:1")
    assert set(nvml.asked) == {"by uuid"}


def test_a_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that another Python computes on is watched although torch knows none here."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    assert watched(monkeypatch, FakeNvml(POWER_CAP), f"GPU-{UUID}").disturbed


THIS = os.getpid()


@pytest.mark.parametrize(
    ("nvml", "others", "disturbed"),
    [
        (used_by({THIS: 97, 4_000_001: 0}), 0, False),
        (used_by({THIS: 97, 4_000_001: 5}), 5, False),
        (used_by({THIS: 60, 4_000_001: 10, 4_000_002: 20}), 30, True),
        (used_by({4_000_001: 40}, (THIS, 4_000_001)), 40, True),  # who computed is named as we name processes
        (used_by({4_000_900: 90}), 0, False),  # a container: the busiest is taken to be us
        (used_by({4_000_900: 90, 4_000_901: 30}), 30, True),
        (used_by({4_000_900: 90, 4_000_901: 30}, (THIS,)), 30, True),
        (Mute(), None, False),
    ],
)
def test_others_that_compute_disturb(
    monkeypatch: pytest.MonkeyPatch, nvml: Any, others: int | None, disturbed: bool
) -> None:
    """They are added up and their share is named; every question may fail on its own."""
    watch = watched(monkeypatch, nvml, "cuda")
    assert (watch.samples, watch.others_percent, watch.disturbed) == ([(), ()], others, disturbed)
    assert watch.worst == (f"GPU cuda was {others} % busy with other processes" if disturbed else None)


def test_stale_and_impossible_figures_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Stale()
    nvml.processes = {THIS: 50}
    assert watched(monkeypatch, nvml, "cuda").others_percent == 0


@pytest.mark.parametrize(("nvml", "device"), [(FakeNvml(HARDWARE), "cuda:0"), (None, "cpu"), (None, "cuda:0")])
def test_what_cannot_be_watched_is_not_disturbed(monkeypatch: pytest.MonkeyPatch, nvml: Any, device: str) -> None:
    """A UUID that NVML does not know, a CPU, a machine without the library."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="unknown"))
    watch = watched(monkeypatch, nvml, device)
    assert (watch.samples, watch.disturbed, watch.worst) == ([], False, None)
    assert nvml is None or nvml.num_open == 0


@pytest.mark.gpu
def test_a_real_gpu_is_sampled() -> None:
    """On a GPU with NVML a block has its two samples."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with GpuWatch("cuda") as watch:
        torch.ones(1000, 1000, device="cuda").square().sum().item()
    assert len(watch.samples) >= 2
