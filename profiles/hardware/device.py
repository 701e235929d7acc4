"""A machine as far as it is known, and which devices are of one family. Standard library only.

An absent field is not known, which differs from a field with another value.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache

from profiles.records.core import Environment
from profiles.records.errors import InputError, require

Machine = Mapping[str, object]  # fields of `Environment`
ENGINE = "draftpick-torch"  # the built-in engine

_NUMBERS = ("device_count", "memory_bytes", "threads", "memory_bandwidth_bytes_s")
_GPU_TEXTS = ("driver", "cuda")  # None on a CPU: there is none
# What a card's name says beside its kind: maker, mount, and memory, which is compared by itself.
_NOT_THE_KIND = re.compile(r"(?<![\w.])(NVIDIA|TESLA|PCIE?|SXM\d*|NVL\d*|HBM\w*|\d+ ?GB)\b", re.IGNORECASE)


def parse_machine(raw: object) -> Machine:
    """A machine from JSON; null is unknown, but for a CPU's driver and CUDA (there is none). Raises InputError."""
    allowed = [field.name for field in fields(Environment)]
    if not isinstance(raw, dict):
        raise InputError(f"an object with some of {', '.join(allowed)} is needed")
    for name, value in raw.items():
        require(name in allowed, f"unknown field {name!r}: allowed are {', '.join(allowed)}")
        if name in _NUMBERS:
            good, needed = type(value) is int and 1 <= value < 2**63, "a whole number from 1"
        else:
            good, needed = isinstance(value, str) and value != "", "a string"
        if not good and value is not None:
            raise InputError(f"{name} is {str(value)[:60]!r}: {needed} is needed")
    return drop_unknown(raw)


@cache
def family(device: str) -> str:
    """What cards of one kind share in their names: `NVIDIA H100 PCIe` and `NVIDIA H100 80GB HBM3` are both `H100`.

    A CPU's whole name is its family: generations of rented ones differ only in the clock they state.
    """
    if not re.search(r"nvidia|tesla|geforce|quadro", device, re.IGNORECASE):
        return device
    return " ".join(_NOT_THE_KIND.sub(" ", device.replace("-", " ")).split()).upper()


def drop_unknown(machine: Mapping[str, object]) -> Machine:
    """The fields that are known. None means unknown, except for a CPU's driver and CUDA."""
    absent = () if on_gpu(machine) else _GPU_TEXTS
    return {name: value for name, value in machine.items() if value is not None or name in absent}


def on_gpu(machine: Machine) -> bool:
    """Whether the machine's device is a GPU."""
    return any(machine.get(name) for name in ("compute_capability", *_GPU_TEXTS))
