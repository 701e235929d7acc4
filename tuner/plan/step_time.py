"""Seconds of a forward pass: a roofline with shares of its limits, least times of launches, and kernels' steps of rows.

The verify curve is a step function of rows where a kernel works in blocks, with a slope inside a step: docs/plan.md.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.hardware.device import family
from profiles.records.errors import InputError
from tuner.plan.shape import Shape, read_data

_TENSOR_SHARE = 0.5  # of tensor units' peak that thin matrix products reach
_OVERLAP = 1.5  # 1: computing waits for reading; infinite: the longer one hides the other
_LINK_LATENCY_S = 10e-6  # of one all-reduce beyond its bytes
_HOP_S = 20e-6  # activations from one device to the next where layers are split
_EAGER = 6.0  # times a captured layer's least time


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Devices of one kind by their data sheet: bytes/s, operations/s by unit, bytes, seconds.

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
    """`H100`, `RTX4090x2`, or the path of a JSON file with one device as in hardware.json. Raises InputError."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """Constants of an engine.

    Attributes:
        bandwidth_share: Share of the memory bandwidth that plain decoding reaches.
        layer_s: Least time of a layer; `expert_layer_s` more of routing to experts.
        step_s: Host time of a plain step; `round_s` more of a round with a draft; `draft_step_s` of a draft's step.
        parallel: `tensor`: devices share each layer; `layers`: they take turns.
        graph_rows: Captured sizes that rows are padded to; beyond the last, layers are launched kernel by kernel.
        curves: By class of format, how time grows with rows.
    """

    name: str
    bandwidth_share: float
    layer_s: float
    expert_layer_s: float
    step_s: float
    round_s: float
    draft_step_s: float
    parallel: str
    graph_rows: Sequence[int]
    curves: Mapping[str, Mapping[str, Any]]
    default_k: int
    source: str


def read_engine(name: str, hardware: Hardware) -> EngineModel:
    """The engine of that name; llama.cpp on Apple's GPUs is an engine of its own. Raises InputError."""
    table = read_data("engines")
    key = next((key for key, row in table.items() if name.lower() in (key, *row["aliases"])), None)
    if key is None:
        raise InputError(f"engine {name!r}: known are {', '.join(table)}")
    if key == "llamacpp" and hardware.source.startswith("Apple"):
        key = "llamacpp-metal"
    row = {field: value for field, value in table[key].items() if not field.endswith("_us") and field != "aliases"}
    times = {f"{field[:-3]}_s": value * 1e-6 for field, value in table[key].items() if field.endswith("_us")}
    return EngineModel(name=key, **row, **times)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundParts:
    """Seconds of a round with a draft, by what takes them, and of a plain step."""

    plain: float
    verify: float
    rows: float  # of `verify`: beyond one token a sequence
    draft: float
    host: float

    @property
    def total(self) -> float:
        return self.verify + self.draft + self.host

    @property
    def cost(self) -> float:
        """Seconds of a round in plain steps."""
        return self.total / self.plain


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Step times of shapes on a device and an engine."""

    hardware: Hardware
    engine: EngineModel

    def round(
        self, target: Shape, draft: Shape | None, *, k: float, batch: int, context: int, passes: float | None = None
    ) -> RoundParts:
        """A round that drafts `k` tokens (a mean, perhaps) and verifies k + 1; `passes` of the draft: None is k."""
        plain = self.step_s(target, batch, 1, context)
        low = int(k)
        verify = self.step_s(target, batch, low + 1, context)
        if k > low:
            verify += (k - low) * (self.step_s(target, batch, low + 2, context) - verify)
        host = self.engine.step_s
        draft_s = 0.0
        if draft is not None:
            draft_s = self.step_s(draft, batch, 1, context) + self.engine.draft_step_s
        return RoundParts(
            plain=plain + host,
            verify=verify + host,
            rows=verify - plain,
            draft=draft_s * (k if passes is None else passes),
            host=self.engine.round_s,
        )

    def step_s(self, shape: Shape, batch: int, width: int, context: int) -> float:
        """Device seconds of a step over `width` tokens of each of `batch` sequences with `context` cached tokens."""
        engine = self.engine
        rows = next((size for size in engine.graph_rows if size >= batch * width), batch * width)
        devices = self.hardware.count if engine.parallel == "tensor" else 1
        rate = self.hardware.bandwidth * engine.bandwidth_share * devices
        read_s = shape.step_bytes(batch) / rate
        touched_s = shape.step_bytes(batch * width) / rate - read_s
        cache_s = batch * context * shape.cache * 2.0 / rate
        eager = bool(engine.graph_rows) and rows > engine.graph_rows[-1]
        least_s = shape.layers * engine.layer_s * (_EAGER if eager else 1.0)
        routing_s = shape.layers * engine.expert_layer_s if shape.num_experts else 0.0
        device_s = read_s + touched_s + cache_s + self._more_rows_s(shape, rows, read_s, devices)
        return max(device_s, least_s) + routing_s + self._link_s(shape, rows)

    def _more_rows_s(self, shape: Shape, rows: int, read_s: float, devices: int) -> float:
        """Seconds that rows add to reading the weights once."""
        curves, hardware = self.engine.curves, self.hardware
        kind = "16-bit" if shape.bits >= 16.0 else "8-bit" if shape.bits >= 7.5 else "default"
        curve = curves.get(kind, curves["default"])
        operations = 2.0 * shape.active / devices
        if curve["kind"] == "block" and rows <= curve["until"]:
            return float(read_s * curve["repeat"] * (math.ceil(rows / curve["rows"]) - 1))
        slope_s = operations / (hardware.vector * curve["share"]) if curve["kind"] == "vector" else 0.0
        if slope_s and rows <= curve["until"]:
            return (rows - 1) * slope_s
        peak = hardware.fp8 if shape.format in ("fp8", "int8", "nvfp4") else hardware.fp16
        compute_s = math.ceil(rows / curve["tile"]) * curve["tile"] * operations / (peak * _TENSOR_SHARE)
        if slope_s:  # another kernel, never cheaper than the last row of the first
            return float(compute_s + (curve["until"] - 1) * slope_s)
        return float((read_s**_OVERLAP + compute_s**_OVERLAP) ** (1.0 / _OVERLAP) - read_s)

    def _link_s(self, shape: Shape, rows: int) -> float:
        """Two all-reduces a layer where devices share layers; a hop between devices where they take turns."""
        count = self.hardware.count
        if count == 1 or self.engine.parallel != "tensor":
            return (count - 1) * _HOP_S
        sent = 4.0 * (count - 1) / count * rows * shape.hidden
        return 2 * shape.layers * (_LINK_LATENCY_S + sent / max(self.hardware.link, 1e9))
