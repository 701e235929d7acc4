"""What is known of a machine, as far as it is known, and what two devices have in common by their names.

A field that is absent is not known; that is another thing than a field with another value. Standard library only.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache

from profiles.records.core import Environment
from profiles.records.errors import InputError

Machine = Mapping[str, object]
ENGINE = "draftpick-torch"  # our own

NUMBERS = ("device_count", "memory_bytes", "threads", "memory_bandwidth_bytes_s")
OPTIONAL_TEXTS = ("driver", "cuda")  # null: there is none, as on a CPU
# What a card's name says beside its kind: who makes it, how it is mounted, and its memory, which is compared by itself.
_NOT_THE_KIND = re.compile(r"(?<![\w.])(NVIDIA|TESLA|PCIE?|SXM\d*|NVL\d*|HBM\w*|\d+ ?GB)\b", re.IGNORECASE)


def parse_machine(raw: object) -> Machine:
    """`raw` JSON as a machine; null is not known, but of a processor's driver and CUDA it says that there is none.

    Raises InputError, naming field, value and what is allowed.
    """
    allowed = [field.name for field in fields(Environment)]
    if not isinstance(raw, dict):
        raise InputError(f"an object with some of {', '.join(allowed)} is needed")
    for name, value in raw.items():
        if name not in allowed:
            raise InputError(f"unknown field {name!r}: allowed are {', '.join(allowed)}")
        if name in NUMBERS:
            good, needed = type(value) is int and 1 <= value < 2**63, "a whole number from 1"
        else:
            good, needed = isinstance(value, str) and value != "", "a string"
        if not good and value is not None:
            raise InputError(f"{name} is {str(value)[:60]!r}: {needed} is needed")
    return drop_unknown(raw)


@cache
def family(device: str) -> str:
    """What cards of one kind share in their names: `NVIDIA H100 PCIe` and `NVIDIA H100 80GB HBM3` are both `H100`.

    A processor's whole name is its family: generations of rented ones differ in nothing but the clock they state.
    """
    if not re.search(r"nvidia|tesla|geforce|quadro", device, re.IGNORECASE):
        return device
    return " ".join(_NOT_THE_KIND.sub(" ", device.replace("-", " ")).split()).upper()


def drop_unknown(fields_found: Mapping[str, object]) -> Machine:
    """The fields that are known: None says "there is none" of a processor's driver and CUDA, else "not known"."""
    none_there = () if on_gpu(fields_found) else OPTIONAL_TEXTS
    return {name: value for name, value in fields_found.items() if value is not None or name in none_there}


def on_gpu(machine: Machine) -> bool:
    """Whether the machine's device is a GPU."""
    return any(machine.get(name) for name in ("compute_capability", *OPTIONAL_TEXTS))
