"""The fingerprint, the choice of a device, the clock and the watch on other load."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from profiles.hardware import container, fingerprint, machine, nvml
from profiles.hardware.software import draftpick_version
from profiles.records.errors import InputError
from profiles.timing.clock import Clock, Disturbance
from profiles.timing.gpu_monitor import GpuWatch


def readings(*values: float) -> Callable[[], float]:
    """A reader that answers with the values in turn."""
    return iter(values).__next__


def test_the_fingerprint_describes_this_machine() -> None:
    """A CPU fingerprint has a name, whole GiB, no GPU fields, and the versions that times depend on; it is stable."""
    found = fingerprint.fingerprint("cpu")
    assert found.device
    assert found.device_count == 1
    assert found.memory_bytes >= 2**30
    assert found.memory_bytes % 2**30 == 0
    assert (found.driver, found.cuda) == (None, None)
    assert found.threads == torch.get_num_threads()
    assert found.torch == torch.__version__
    assert found.engine == "draftpick-torch"
    assert found.engine_version == f"{draftpick_version()}+transformers-{importlib.metadata.version('transformers')}"
    assert fingerprint.fingerprint("cpu").digest == found.digest
    assert dataclasses.replace(found, threads=found.threads + 1).digest != found.digest
    assert 0 < fingerprint.free_bytes("cpu") < found.memory_bytes + 2**30


def test_nvml_is_started_before_a_handle_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU the bandwidth is asked by a handle that NVML only gives once it was started."""
    events: list[str] = []

    def recorder(name: str, answer: object) -> Callable[..., object]:
        return lambda *_: events.append(name) or answer

    properties = SimpleNamespace(name="NVIDIA X", total_memory=2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(nvml, "driver_version", recorder("start", "580.65"))
    monkeypatch.setattr(nvml, "device_handle", recorder("handle", "handle"))
    monkeypatch.setattr(nvml, "memory_bandwidth", recorder("bandwidth", 10**12))
    found = fingerprint.fingerprint("cuda")
    assert events == ["start", "handle", "bandwidth"]
    assert (found.driver, found.compute_capability, found.memory_bandwidth_bytes_s) == ("580.65", "9.0", 10**12)


def test_the_processor_name_comes_from_the_kernel(tmp_path: Path) -> None:
    """The first `model name` line is taken; without one the architecture stands in."""
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    known.write_text("processor\t: 0\nmodel name\t: Example CPU @ 2.00GHz\nmodel name\t: another\n")
    unknown.write_text("processor\t: 0\n")
    assert machine.processor_name(known) == "Example CPU @ 2.00GHz"
    assert machine.processor_name(unknown)
    assert machine.processor_name(tmp_path / "absent")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up control group of version 2, two levels deep, without limits."""
    monkeypatch.setattr(container, "ROOT", tmp_path)
    monkeypatch.setattr(container, "MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/slice/box\n")
    (tmp_path / "slice" / "box").mkdir(parents=True)
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "slice" / "box"


def test_a_container_s_limits_count_as_the_machine_s(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the groups around the process the tightest counts; file cache can be reclaimed."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert (container.cpu_quota(), container.memory_limit(), container.free_memory()) == (None, None, None)
    assert machine.num_threads() == 64
    (group / "cpu.max").write_text("max 100000")
    (group.parent / "cpu.max").write_text("250000 100000")
    (group / "memory.max").write_text(str(2 * 2**30))
    (group / "memory.current").write_text(str(2**30 + 500))
    (group / "memory.stat").write_text("anon 5\ninactive_file 500\n")
    assert (container.cpu_quota(), container.memory_limit(), container.free_memory()) == (3, 2 * 2**30, 2**30)
    assert machine.num_threads() == 3
    assert (
        fingerprint.fingerprint("cpu").memory_bytes == machine.this_machine(device="cpu")["memory_bytes"] == 2 * 2**30
    )
    assert fingerprint.free_bytes("cpu") <= 2**30


def test_torch_keeps_to_the_quota(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty-four threads on two cores' worth of time would take turns."""
    threads = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    (group / "cpu.max").write_text("200000 100000")
    fingerprint.limit_threads()
    assert threads == [64, 2]


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "num_gpus", "device"),
    [(None, 0, "cpu"), ("auto", 0, "cpu"), (None, 2, "cuda"), ("auto", 2, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_auto_takes_the_gpu_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str | None, num_gpus: int, device: str
) -> None:
    """Without a wish the device is all GPUs, else the CPU; each GPU can be named by its number."""
    with_gpus(monkeypatch, num_gpus)
    assert fingerprint.pick_device(name) == device


@pytest.mark.parametrize(
    ("name", "num_gpus", "message"),
    [
        *((name, 0, "unknown; allowed are auto, cpu") for name in ("tpu", "", "CPU", "cuda:x", "cpu:0")),
        ("cuda", 0, "0 GPUs found; allowed are auto, cpu"),
        ("cuda:99", 0, "0 GPUs found; allowed are auto, cpu"),
        ("cuda:2", 2, "2 GPUs found; allowed are auto, cpu, cuda, cuda:0, cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, num_gpus: int, message: str
) -> None:
    """In one line with the value and every allowed device."""
    with_gpus(monkeypatch, num_gpus)
    with pytest.raises(InputError) as caught:
        fingerprint.pick_device(name)
    assert str(caught.value) == f"device {name!r}: {message}"


@pytest.mark.gpu
def test_the_gpu_is_described() -> None:
    """On a GPU the fingerprint has its driver and CUDA version, and free memory is below all of it."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = fingerprint.fingerprint("cuda")
    assert found.driver
    assert found.cuda
    assert 0 < fingerprint.free_bytes("cuda") < found.memory_bytes + 2**30


def test_the_clock_waits_for_the_device_before_it_reads() -> None:
    """Every reading is preceded by a synchronisation; on a CPU there is nothing to wait for."""
    events: list[str] = []
    clock = Clock("cuda", now=lambda: events.append("now") or 3.0, wait=lambda: events.append("wait"))
    assert (clock.read(), clock.read()) == (3.0, 3.0)
    assert events == ["wait", "now", "wait", "now"]
    assert Clock("cpu", now=readings(1.0, 2.5)).read() == 1.0
    clock = Clock("cpu")
    assert clock.read() <= clock.read()


@pytest.mark.parametrize(
    ("wall_s", "machine_s", "process_s", "cores", "disturbed"),
    [
        (2.0, 3.0, 2.0, 0.5, True),  # busy for 3 core-seconds, 2 of them ours
        (1.0, 0.34, 0.0, 0.34, False),
        (1.0, 0.36, 0.0, 0.36, True),
        (0.2, 9.0, 0.0, None, False),  # one tick of the kernel's accounting would look like load
        (1.0, 0.9, 1.0, 0.0, False),  # ticks can show us busier than the machine
    ],
)
def test_other_load_is_what_the_machine_did_beside_us(
    wall_s: float, machine_s: float, process_s: float, cores: float | None, disturbed: bool
) -> None:
    """Above 0.35 cores of other work a unit counts as disturbed."""
    with Disturbance(
        now=readings(10.0, 10.0 + wall_s), machine_s=readings(0.0, machine_s), process_s=readings(0.0, process_s)
    ) as load:
        pass
    assert load.cores == (None if cores is None else pytest.approx(cores))
    assert load.disturbed is disturbed


def test_another_process_is_seen_by_the_real_readers() -> None:
    """A process that spins beside us and is none of our children is load."""
    if sum(psutil.cpu_times()) == 0.0:
        pytest.skip("this kernel does not tell how busy the machine is")
    spin = "import time; end = time.monotonic() + 5\nwhile time.monotonic() < end: pass"
    # its parent ends at once, so that it is an orphan; it holds neither of the parent's pipes, which are waited for
    started = (
        "import subprocess, sys; nowhere = subprocess.DEVNULL;"
        'print(subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=nowhere, stderr=nowhere).pid)'
    )
    done = subprocess.run([sys.executable, "-c", started, spin], capture_output=True, text=True, check=True)
    other = psutil.Process(int(done.stdout))
    try:
        load = Disturbance()
        with load:
            end = Clock("cpu").read() + 0.6
            while Clock("cpu").read() < end:
                os.sched_yield()
    finally:
        other.kill()
    assert load.cores > 0.0


def test_our_own_children_are_no_load() -> None:
    """A serving engine that we started, and that still runs, is not another program."""
    spin = "import time; end = time.monotonic() + 5\nwhile time.monotonic() < end: pass"
    child = subprocess.Popen([sys.executable, "-c", spin])
    try:
        process = psutil.Process(child.pid)
        with Disturbance(machine_s=lambda: sum(process.cpu_times()[:2])) as load:  # nothing else runs on this machine
            time.sleep(0.6)
        assert sum(process.cpu_times()[:2]) > 0.0
    finally:
        child.kill()
        child.wait()
    assert load.cores < 0.1


def watch_on(*devices: str, cores: float) -> Disturbance:
    """A watch that finds this many cores busy with other work over one second."""
    return Disturbance(*devices, now=readings(0.0, 1.0), machine_s=readings(0.0, cores), process_s=readings(0.0, 0.0))


class FakeGpuWatch(GpuWatch):
    """A watch on a GPU that finds every device with an odd number slowed down, and tells when its block begins."""

    def __enter__(self) -> "FakeGpuWatch":
        self.entered = True
        return self

    def __exit__(self, *_: object) -> None:
        assert self.entered

    @property
    def worst(self) -> str | None:
        return f"GPU {self._device} was slowed" if self._device.endswith(("1", "3")) else None


@pytest.mark.parametrize(
    ("cores", "devices", "disturbed", "worst"),
    [
        (0.0, ("cpu",), False, None),
        (0.5, ("cpu",), True, None),
        (0.0, ("cuda:0",), False, None),
        (0.5, ("cuda:0",), True, None),
        (0.0, ("cuda:1",), True, "GPU cuda:1 was slowed"),
        (0.5, ("cuda:0", "cuda:1"), True, "GPU cuda:1 was slowed"),
        (0.0, ("cuda:1", "cuda:2", "cuda:3"), True, "GPU cuda:1 was slowed; GPU cuda:3 was slowed"),
    ],
)
def test_processor_and_gpus_are_watched_together(
    monkeypatch: pytest.MonkeyPatch, cores: float, devices: tuple[str, ...], disturbed: bool, worst: str | None
) -> None:
    """Either disturbs; the cores are those of the watch on the processor, the sentence names the GPUs."""
    monkeypatch.setattr("profiles.timing.clock.GpuWatch", FakeGpuWatch)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 1)  # a GPU's host with more cores may be busier
    with watch_on(*devices, cores=cores) as watch:
        pass
    assert (watch.cores, watch.disturbed, watch.worst) == (cores, disturbed, worst)


def test_watches_end_when_the_unit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside the block passes through, and the load and what disturbed it are known all the same."""
    monkeypatch.setattr("profiles.timing.clock.GpuWatch", FakeGpuWatch)
    watch = watch_on("cuda:1", cores=1.0)
    with pytest.raises(InputError, match="planted"), watch:
        raise InputError("planted")
    assert (watch.cores, watch.disturbed) == (1.0, True)


def test_the_real_watches_run_on_a_cpu() -> None:
    """Without a GPU the combined watch is the one on the processor: a block of no length is not disturbed."""
    with Disturbance("cpu") as watch:
        pass
    assert (watch.cores, watch.disturbed, watch.worst) == (None, False, None)
