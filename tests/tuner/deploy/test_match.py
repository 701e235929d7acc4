"""How well a measurement fits: every level, ties within one, and what differs told apart from what is not known."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pynvml
import pytest

from profiles.hardware import machine
from profiles.hardware.device import Machine, drop_unknown, family, parse_machine
from profiles.hardware.machine import read_machine, this_machine
from profiles.hardware.nvml import visible_gpus
from profiles.records.core import Environment
from profiles.records.errors import InputError
from tuner.deploy.match import LEVELS, match

H100 = {
    "device": "NVIDIA H100 80GB HBM3",
    "device_count": 1,
    "memory_bytes": 79 * 2**30,
    "driver": "580.65",
    "cuda": "13.0",
    "threads": 16,
    "torch": "2.13.0+cu130",
    "engine": "draftpick-torch",
    "engine_version": "0.3.0+transformers-5.23.0",
    "compute_capability": "9.0",
    "memory_bandwidth_bytes_s": 3_350_000_000_000,
}
CPU = {
    "device": "Example CPU @ 2.20GHz",
    "device_count": 1,
    "memory_bytes": 24 * 2**30,
    "driver": None,
    "cuda": None,
    "threads": 2,
    "torch": "2.13.0+cpu",
    "engine": "draftpick-torch",
    "engine_version": "0.3.0+transformers-5.23.0",
}


def without(machine: Machine, *names: str) -> Machine:
    return {name: value for name, value in machine.items() if name not in names}


@pytest.mark.parametrize(
    ("here", "there", "level"),
    [
        (H100, H100, "exact"),
        (CPU, CPU, "exact"),
        (H100 | {"memory_bytes": 80 * 2**30}, H100, "exact"),
        (H100 | {"torch": "2.14.0+cu130"}, H100, "version"),
        (H100 | {"driver": "590.10"}, H100, "version"),
        (H100 | {"engine_version": "0.4.0"}, H100, "version"),
        (H100 | {"threads": 64}, H100, "version"),
        (without(H100, "torch", "cuda"), H100, "version"),
        (H100, without(H100, "driver"), "version"),
        (without(H100, "memory_bytes"), H100, "version"),
        (CPU | {"memory_bytes": 64 * 2**30}, CPU, "version"),
        (H100 | {"engine": "vllm"}, H100, "engine"),
        (without(H100, "engine"), H100, "engine"),
        (H100 | {"device": "NVIDIA H100 PCIe"}, H100, "family"),
        (H100 | {"device": "NVIDIA H100 NVL", "engine": "vllm"}, H100, "family"),
        (H100 | {"memory_bytes": 94 * 2**30}, H100, "family"),
        (H100 | {"device_count": 8}, H100, "family"),
        (CPU | {"threads": 8}, CPU, "family"),
        (H100 | {"device": "NVIDIA H200"}, H100, "capability"),
        (H100 | {"device": "NVIDIA GH200 480GB"}, H100, "capability"),
        (H100 | {"device": "NVIDIA B200", "compute_capability": "10.0"}, H100, "none"),
        (without(H100 | {"device": "NVIDIA H200"}, "compute_capability"), H100, "none"),
        (without(H100, "device"), H100, "none"),
        (CPU | {"device": "Example CPU @ 2.80GHz"}, CPU, "none"),
        (CPU, H100, "none"),
    ],
)
def test_the_level_is_the_worst_that_any_field_calls_for(here: Machine, there: Machine, level: str) -> None:
    """Versions are soft, devices are compared by name, family and compute capability; unknown devices never fit."""
    assert match(here, there).level == level


def test_what_differs_is_told_apart_from_what_is_not_known() -> None:
    """A driver that differs and a torch that nobody told are two kinds of difference, and neither is equality."""
    found = match(without(H100, "torch") | {"driver": "590.10"}, without(H100, "threads"))
    assert [(one.field, one.here, one.there, one.is_known) for one in found.differences] == [
        ("threads", "16", None, False),
        ("driver", "590.10", "580.65", True),
        ("torch", None, "2.13.0+cu130", False),
    ]


def test_none_is_a_value_on_a_processor_and_unknown_on_a_gpu() -> None:
    """A processor has no driver; a GPU whose driver was not read has one that is not known."""
    assert "driver" in drop_unknown({"device": "Example CPU", "driver": None, "cuda": None})
    assert "driver" not in drop_unknown({"device": "NVIDIA H100", "driver": None, "cuda": "13.0"})
    assert match(CPU, drop_unknown(CPU)).level == "exact"


def test_of_one_compute_capability_the_nearest_is_first() -> None:
    """Bandwidth is compared before memory; a machine that does not tell its bandwidth comes last."""
    fast = H100 | {"device": "NVIDIA H200", "memory_bytes": 140 * 2**30, "memory_bandwidth_bytes_s": 4_800_000_000_000}
    slow = H100 | {"device": "NVIDIA Y", "memory_bytes": 24 * 2**30, "memory_bandwidth_bytes_s": 900_000_000_000}
    mute = without(H100 | {"device": "NVIDIA Z"}, "memory_bandwidth_bytes_s")
    here = H100 | {"device": "NVIDIA X"}
    order = sorted([mute, slow, fast], key=lambda there: match(here, there).order)
    assert [one["device"] for one in order] == ["NVIDIA H200", "NVIDIA Y", "NVIDIA Z"]


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA GeForce RTX 4090", "GEFORCE RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "GEFORCE RTX 4090 LAPTOP GPU"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "H100 MIG 1G.10GB"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
    ],
)
def test_a_family_is_a_name_without_mount_and_memory(device: str, kind: str) -> None:
    """Laptop cards and slices of a card are kinds of their own."""
    assert family(device) == kind


def test_this_machine_is_an_exact_match_for_its_own_fingerprint() -> None:
    """What is read without torch equals what torch tells: a look-up where the run was made is exact."""
    from profiles.hardware.fingerprint import fingerprint

    assert match(this_machine(device="cpu"), drop_unknown(asdict(fingerprint("cpu")))).level == "exact"


def test_a_file_stands_in_for_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$DRAFTPICK_ENVIRONMENT names a JSON file; fields it lacks are not known."""
    path = tmp_path / "machine.json"
    path.write_text('{"device": "NVIDIA H100 PCIe", "compute_capability": "9.0"}')
    monkeypatch.setenv("DRAFTPICK_ENVIRONMENT", str(path))
    assert this_machine() == read_machine(path)
    assert match(this_machine(), H100).level == "family"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "cannot be read"),
        ("[]", "an object with some of device, device_count"),
        ('{"gpu": "H100"}', "unknown field 'gpu'"),
        ('{"device": 7}', "device is '7': a string is needed"),
        ('{"device": ""}', "device is '': a string is needed"),
        ('{"threads": 0}', "threads is '0': a whole number from 1 is needed"),
        ('{"threads": true}', "threads is 'True'"),
        ('{"memory_bytes": 1.5}', "memory_bytes is '1.5'"),
        ('{"driver": 5}', "driver is '5': a string is needed"),
        (f'{{"memory_bytes": {10**400}}}', "a whole number from 1 is needed"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, text: str, wanted: str) -> None:
    """One line names the file, the field, the value and what is allowed."""
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"machine\.json") as caught:
        read_machine(path)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_format_asks_for_its_engine(tmp_path: Path) -> None:
    """A description of the machine a policy was measured on does not turn torch's measurement into vLLM's."""
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(H100))
    here = read_machine(path, "vllm")
    assert (here["engine"], "engine_version" in here) == ("vllm", False)
    assert match(here, H100).level == "engine"
    assert read_machine(path) == H100


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """A device or pipe would be read without an end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read: .*([Nn]ot a regular file|[Ii]s a directory)"):
            read_machine(path)


@pytest.mark.parametrize(
    ("named", "cards"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        ("1,-1,0", [1]),
        ("0,9,1", [0]),
        ("GPU-b,1", ["GPU-b", 1]),
        ("GPU-nosuch", []),
        ("MIG-x", None),
    ],
)
def test_visible_gpus_are_read_as_cuda_does(
    monkeypatch: pytest.MonkeyPatch, named: str | None, cards: list[object] | None
) -> None:
    """Up to the first entry that is none; slices of a card cannot be told by name."""

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-b":
            raise pynvml.NVMLError(6)
        return uuid

    def by_index(index: int) -> int:
        if index > 3:
            raise pynvml.NVMLError(2)
        return index

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", by_index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", by_uuid)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == cards


def test_every_field_of_an_environment_may_be_given() -> None:
    """The fields a description may have are those of the record."""
    every = H100 | {"engine_options": "{}"}
    assert parse_machine(every) == every
    assert set(every) == set(Environment.__dataclass_fields__)
    assert LEVELS[0] == "exact"
    assert LEVELS[-1] == "none"


def test_a_serving_engine_chooses_threads_and_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compared where the asking machine states them; its version is the package's, as a run spells it."""
    served = CPU | {"engine": "llamacpp", "engine_version": "xllamacpp 2026.1"}
    assert match(without(served, "threads", "torch"), served | {"threads": 4}).level == "exact"
    assert match(served, served | {"threads": 4}).level == "family"
    assert match(without(CPU, "threads"), CPU).level == "version"
    monkeypatch.setattr(machine, "installed_version", {"xllamacpp": "2026.1", "sglang": "0.5"}.get)
    found = this_machine("llamacpp", "cpu")
    assert (found["engine_version"], "threads" in found, "torch" in found) == ("xllamacpp 2026.1", False, False)
    assert this_machine("sglang", "cpu")["engine_version"] == "0.5"


def test_the_version_of_an_engine_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the program on the PATH says its own; what is named goes before the package."""
    monkeypatch.setattr(machine, "installed_version", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for named in ("DRAFTPICK_VLLM_PYTHON", "DRAFTPICK_LLAMA_SERVER"):
        monkeypatch.delenv(named, raising=False)
    assert machine.serving_engine_version("llamacpp") is None
    assert machine.serving_engine_version("vllm") is None
    for name, said in (("llama-server", "version: 11549 (abc)"), ("python", "0.33.0")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    assert machine.serving_engine_version("llamacpp") == "version: 11549 (abc)"
    monkeypatch.setattr(machine, "installed_version", lambda _: "1.0")
    assert machine.serving_engine_version("llamacpp") == "xllamacpp 1.0"
    monkeypatch.setenv("DRAFTPICK_LLAMA_SERVER", str(tmp_path / "llama-server"))
    assert machine.serving_engine_version("llamacpp") == "version: 11549 (abc)"
    monkeypatch.setenv("DRAFTPICK_VLLM_PYTHON", str(tmp_path / "python"))
    assert machine.serving_engine_version("vllm") == "0.33.0"
    monkeypatch.setenv("DRAFTPICK_VLLM_PYTHON", str(tmp_path / "missing"))
    assert machine.serving_engine_version("vllm") is None
