"""What data sheets say of a device, from the table that ships or a file of the same form."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.hardware.device import family
from profiles.records.errors import InputError
from tuner.plan.shape import read_data


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind: bytes/s, operations/s by unit, bytes, seconds.

    Attributes:
        vector: Operations/s in float32 without tensor units; `fp16`, `fp8`: of tensor units on such values.
        link: Bytes/s from a device to its neighbour; 0 where memory is shared.
    """

    name: str
    count: int
    bandwidth: float
    vector: float
    fp16: float
    fp8: float
    memory: float
    link: float
    source: str


def read_hardware(text: str) -> Hardware:
    """`H100`, `RTX4090x2` or the path of a JSON file with one device. Raises InputError."""
    match = re.fullmatch(r"(.+?)[x*]([1-9]\d{0,2})", text.strip())
    name, count = (match[1], int(match[2])) if match else (text.strip(), 1)
    try:
        if name.endswith(".json"):
            [(key, row)] = json.loads(Path(name).read_text(encoding="utf-8"))["hardware"].items()
        else:
            table = read_data("hardware")
            key = _find_key(name, table)
            row = table[key]
        units = {unit: float(row["tflops"][unit]) * 1e12 for unit in ("vector", "fp16", "fp8")}
        sizes = {size: float(row[f"{size}_gb"]) * 1e9 for size in ("bandwidth", "memory", "link")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        names = ", ".join(read_data("hardware"))
        raise InputError(f"hardware {text!r}: {error}; known are {names}, or a JSON file of the same form") from error
    if min(*units.values(), sizes["bandwidth"], sizes["memory"]) <= 0.0:
        raise InputError(f"hardware {text!r}: bandwidth, memory and tflops above 0 are needed")
    return Hardware(name=key, count=count, **units, **sizes, source=row.get("source", "the given file"))


def _find_key(name: str, table: dict[str, Any]) -> str:
    """The table's name of a device as drivers write it: `NVIDIA H100 80GB HBM3` is `H100`. Raises KeyError."""
    wanted = {_plain(name), _plain(family(name))}
    for key, row in table.items():
        if wanted & set(map(_plain, (key, *row.get("aliases", ())))):
            return key
    raise KeyError(f"{name} is not in the table")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|radeon|apple|amd|[^a-z0-9]", "", name.lower()) or name
