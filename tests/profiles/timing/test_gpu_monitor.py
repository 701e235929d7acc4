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

UUID, BUS = "11111111-2222-3333-4444-555555555555", "00000000:3b:00.0"
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

    def nvmlDeviceGetHandleByPciBusId(self, place: str) -> str:
        if place != BUS:
            raise FakeError(place)
        return "by bus"

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
    properties = SimpleNamespace(uuid=UUID, pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    """Every watch has stopped its thread when its block has ended."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "gpu-watch"]


def install(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> Any:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def watched(monkeypatch: pytest.MonkeyPatch, *masks: int) -> GpuWatch:
    """A short block on a GPU that tells these reasons."""
    install(monkeypatch, FakeNvml(*masks))
    with GpuWatch("cuda:0") as watch:
        pass
    return watch


def used_by(monkeypatch: pytest.MonkeyPatch, processes: dict[int, int], running: list[int]) -> GpuWatch:
    """A short block in which these processes used the GPU (percent by pid)."""
    nvml = install(monkeypatch, FakeNvml())
    nvml.processes, nvml.running = processes, running
    with GpuWatch("cuda") as watch:
        pass
    return watch


def test_a_quiet_gpu_is_sampled_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short block has two samples, and nothing to say."""
    watch = watched(monkeypatch)
    assert watch.samples == ((), ())
    assert not watch.disturbed
    assert watch.worst is None


def test_a_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that another Python computes on is watched although torch knows none here."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    install(monkeypatch, FakeNvml(POWER_CAP))
    with GpuWatch(f"GPU-{UUID}") as watch:
        pass
    assert watch.disturbed


@pytest.mark.parametrize("mask", [IDLE, CLOCKS_SET, BOOST, 0x100, 0x200, 0x400, IDLE | CLOCKS_SET, 0x8000])
def test_idling_and_chosen_clocks_do_not_disturb(monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    """Reasons that are a state or a setting do not disturb."""
    assert not watched(monkeypatch, mask).disturbed


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (POWER_CAP, "software power cap"),
        (HARDWARE, "hardware slowdown"),
        (SOFT_HEAT, "software thermal slowdown"),
        (HARD_HEAT, "hardware thermal slowdown"),
        (BRAKE, "hardware power brake"),
    ],
)
def test_a_slowdown_disturbs(monkeypatch: pytest.MonkeyPatch, mask: int, name: str) -> None:
    """Each reason that lowers clocks under work disturbs, also among harmless ones, and is named."""
    watch = watched(monkeypatch, mask | CLOCKS_SET)
    assert watch.disturbed
    assert watch.samples[0] == (name,)
    assert watch.worst == f"GPU cuda:0 was slowed by {name}"


@pytest.mark.parametrize("masks", [(HARDWARE, 0), (0, HARDWARE)])
def test_one_slow_sample_is_enough(monkeypatch: pytest.MonkeyPatch, masks: tuple[int, int]) -> None:
    """A slowdown at either end only disturbs the whole block."""
    assert watched(monkeypatch, *masks).disturbed


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
    """A second block starts afresh, and the library is closed as often as it was opened."""
    nvml = install(monkeypatch, FakeNvml(HARDWARE, HARDWARE, 0))
    watch = GpuWatch("cuda:0")
    with watch:
        assert nvml.num_open == 1
    assert watch.disturbed
    with watch:
        pass
    assert not watch.disturbed
    assert len(watch.samples) == 2
    assert nvml.num_open == 0


def test_an_error_in_the_block_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the block raises is not held back, and the GPU is judged all the same."""
    install(monkeypatch, FakeNvml(BRAKE))
    watch = GpuWatch("cuda:0")
    with pytest.raises(ValueError, match="planted"), watch:
        raise ValueError("planted")
    assert watch.disturbed


def test_older_libraries_tell_throttle_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver does not know event reasons, the older name is asked."""

    class Older(FakeNvml):
        def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
            raise FakeError("function not found")

        def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
            return HARD_HEAT

    install(monkeypatch, Older())
    with GpuWatch("cuda:0") as watch:
        pass
    assert watch.samples[0] == ("hardware thermal slowdown",)


@pytest.mark.parametrize(
    ("changes", "handle"),
    [({}, "by uuid"), ({"uuid": "of a slice"}, "by bus"), ({"uuid": f"GPU-{UUID}"}, "by uuid")],
)
def test_the_gpu_is_found_whatever_its_number(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], handle: str
) -> None:
    """The UUID tells which GPU torch means, else its place on the bus; NVML's own numbers are never used."""
    properties = SimpleNamespace(**{"uuid": UUID, "pci_domain_id": 0, "pci_bus_id": 0x3B, "pci_device_id": 0} | changes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    nvml = install(monkeypatch, FakeNvml())
    with GpuWatch("cuda:1"):
        pass
    assert set(nvml.asked) == {handle}


def test_an_unknown_gpu_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With neither UUID nor place known to NVML nothing is measured, and the library is closed."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="unknown"))
    nvml = install(monkeypatch, FakeNvml(HARDWARE))
    with GpuWatch("cuda:0") as watch:
        pass
    assert (watch.samples, watch.disturbed, nvml.num_open) == ((), False, 0)


def test_our_own_work_is_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process alone on the GPU, however busy, leaves 0 % to others; an idle neighbour does not disturb."""
    assert used_by(monkeypatch, {os.getpid(): 97, 4_000_001: 0}, []).others_percent == 0
    assert not used_by(monkeypatch, {os.getpid(): 97, 4_000_001: 5}, []).disturbed


def test_another_process_that_computes_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are added up, and their share is named."""
    watch = used_by(monkeypatch, {os.getpid(): 60, 4_000_001: 10, 4_000_002: 20}, [])
    assert watch.disturbed
    assert watch.worst == "GPU cuda was 30 % busy with other processes"


def test_others_count_when_we_did_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML lists only who computed: where it names processes as we do, all of them are others."""
    watch = used_by(monkeypatch, {4_000_001: 40}, [os.getpid(), 4_000_001])
    assert watch.others_percent == 40


@pytest.mark.parametrize(("processes", "others"), [({900: 90}, 0), ({900: 90, 901: 30}, 30)])
def test_in_a_container_the_busiest_is_taken_to_be_us(
    monkeypatch: pytest.MonkeyPatch, processes: dict[int, int], others: int
) -> None:
    """Numbers of the host's processes do not make our own work look like another's."""
    assert used_by(monkeypatch, {pid + 4_000_000: used for pid, used in processes.items()}, []).others_percent == others
    watch = used_by(monkeypatch, {pid + 4_000_000: used for pid, used in processes.items()}, [os.getpid()])
    assert watch.others_percent == others


def test_stale_and_impossible_figures_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use from before the block, and the arbitrary numbers of processes that ended, do not count."""

    class Stale(FakeNvml):
        def nvmlDeviceGetProcessUtilization(self, handle: str, since_us: int) -> list[SimpleNamespace]:
            samples = super().nvmlDeviceGetProcessUtilization(handle, since_us)
            before = SimpleNamespace(pid=4_000_001, smUtil=80, timeStamp=2000)
            return [*samples, before, SimpleNamespace(pid=4_000_002, smUtil=2**31, timeStamp=2**63)]

    nvml = install(monkeypatch, Stale())
    nvml.processes = {os.getpid(): 50}
    with GpuWatch("cuda") as watch:
        pass
    assert watch.others_percent == 0


def test_a_gpu_that_tells_nothing_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question may fail on its own; the samples are then empty."""

    class Mute:
        nvmlInit = nvmlShutdown = staticmethod(lambda: None)
        nvmlDeviceGetHandleByUUID = staticmethod(lambda uuid: "handle")

        def __getattr__(self, name: str) -> Any:
            raise OSError(name)

    install(monkeypatch, Mute())
    with GpuWatch("cuda:0") as watch:
        pass
    assert watch.samples == ((), ())
    assert (watch.others_percent, watch.disturbed) == (None, False)


def test_a_cpu_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the library is not even asked."""
    install(monkeypatch, None)
    with GpuWatch("cpu") as watch:
        assert watch.samples == ()
    assert not watch.disturbed
    assert watch.worst is None


def test_without_the_library_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVML or without CUDA runs as if there were no watch."""
    install(monkeypatch, None)
    with GpuWatch("cuda:0") as watch:
        pass
    assert (watch.samples, watch.disturbed) == ((), False)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with GpuWatch("cuda") as watch:
            pass
        assert (watch.samples, watch.disturbed) == ((), False)


def test_without_threads_both_ends_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started the block still has its two samples."""

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert len(watched(monkeypatch).samples) == 2


@pytest.mark.gpu
def test_a_real_gpu_is_sampled() -> None:
    """On a GPU with NVML a block has its two samples."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with GpuWatch("cuda") as watch:
        torch.ones(1000, 1000, device="cuda").square().sum().item()
    assert len(watch.samples) >= 2
