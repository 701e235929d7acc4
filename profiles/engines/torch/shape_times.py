"""Measures step times of common shapes on this device and writes them to one file named by the device.

    python -m profiles.engines.torch.shape_times --dry-run
    python -m profiles.engines.torch.shape_times

Random weights, one shape after another: plain steps and verify widths up to 17 at batches 1 to 64 and contexts of 512
and 4,096 tokens. What does not fit in memory is listed with the figures. A file is read into a store by
`store.shape_times.load`.
"""

import argparse
import copy
import gc
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.step_times import Sweep, time_steps
from profiles.hardware import fingerprint
from profiles.models.footprint import GIB
from profiles.models.memory import cached_values_per_token
from profiles.records.codec import plain
from profiles.records.core import DTYPES, Model, Workload, digest_of
from profiles.records.evidence import StepTimes
from profiles.records.shape_times import FILE_VERSION
from profiles.timing.clock import Clock, quietest

MAX_LENGTH = 16
BATCH_SIZES, CONTEXTS = (1, 4, 16, 64), (512, 4096)
COPIED_BYTES, COPIES = GIB, 10


def _shape(config: type[PreTrainedConfig], sizes: tuple[int, ...], vocab_size: int, tied: bool) -> PreTrainedConfig:
    """`sizes`: hidden, intermediate, layers, heads, heads of keys and values."""
    hidden, intermediate, layers, heads, key_heads = sizes
    return config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "qwen2.5-0.5b": _shape(Qwen2Config, (896, 4864, 24, 14, 2), 151936, True),
    "llama-3.2-1b": _shape(LlamaConfig, (2048, 8192, 16, 32, 8), 128256, True),
    "llama-3.2-3b": _shape(LlamaConfig, (3072, 8192, 28, 24, 8), 128256, True),
    "llama-3.1-8b": _shape(LlamaConfig, (4096, 14336, 32, 32, 8), 128256, False),
    "qwen2.5-14b": _shape(Qwen2Config, (5120, 13824, 48, 40, 8), 152064, False),
    "qwen2.5-32b": _shape(Qwen2Config, (5120, 27648, 64, 40, 8), 152064, False),
    "tiny": _shape(LlamaConfig, (64, 128, 2, 4, 2), 512, True),
}
DEFAULT_SHAPES = tuple(name for name in SHAPES if name != "tiny")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One sweep to take: a shape at a batch size and a context, and what it needs."""

    shape: str
    dtype: str
    batch_size: int
    context_length: int
    num_bytes: int


def points(names: tuple[str, ...], dtype: str, batch_sizes: tuple[int, ...], contexts: tuple[int, ...]) -> list[Point]:
    """Everything asked for, shape by shape; bytes are weights and full caches."""
    found = []
    for name, batch_size, context_length in itertools.product(names, batch_sizes, contexts):
        cached = batch_size * context_length * cached_values_per_token(SHAPES[name])
        values = _num_params(SHAPES[name]) + cached
        num_bytes = getattr(torch, dtype).itemsize * values
        found.append(
            Point(shape=name, dtype=dtype, batch_size=batch_size, context_length=context_length, num_bytes=num_bytes)
        )
    return found


def _num_params(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return int(sum(weight.numel() for weight in model.parameters()))


def random_model(name: str, dtype: str, device: str) -> PreTrainedModel:
    """The shape with random weights, made on the device."""
    config = copy.deepcopy(SHAPES[name])  # a model writes into its config
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def record(name: str, dtype: str) -> Model:
    """What stands for the shape in a store: its digest is the config's, because there are no weights to speak of."""
    config = {key: value for key, value in SHAPES[name].to_diff_dict().items() if key != "transformers_version"}
    return Model(
        name=f"shape:{name}",
        dtype=dtype,
        digest=digest_of([type(SHAPES[name]).__name__, config]),
        num_params=_num_params(SHAPES[name]),
    )


def sweep(model: PreTrainedModel, point: Point, device: str, max_length: int) -> StepTimes:
    """The target's staircase at one point. Raises torch.OutOfMemoryError."""
    workload = Workload(
        batch_size=point.batch_size, context_length=point.context_length + max_length + 2, max_new_tokens=2
    )
    part = record(point.shape, point.dtype).run_digest
    stepper = RowModel(model, point.batch_size, workload.context_length)
    timed = Sweep(
        target=(part, stepper),
        models={},
        lookups={},
        batch_size=point.batch_size,
        context_length=point.context_length,
        max_length=max_length,
    )
    times, disturbed = quietest(lambda: time_steps(timed, Clock(device)), [device])
    return replace(times[part], disturbed=disturbed)


def copy_bytes_per_s(device: str) -> float:
    """Bandwidth of copying 1 GiB on the device: bytes read and written per second, the best of ten."""
    block, clock = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device), Clock(device)
    copy, seconds = torch.empty_like(block), []
    for _ in range(COPIES):
        started = clock.read()
        copy.copy_(block)
        seconds.append(clock.read() - started)
    return 2.0 * COPIED_BYTES / min(seconds)


def measure(planned: list[Point], device: str, max_length: int) -> Iterator[Mapping[str, Any]]:
    """One entry per point: its staircase, or why there is none."""
    for name, own in itertools.groupby(planned, key=lambda point: point.shape):
        model = None
        _let_go(device)
        for point in own:
            entry = {"target": plain(record(name, point.dtype)), "max_length": max_length, **plain(point)}
            free = fingerprint.free_bytes(device) + (0 if model is None else _held_bytes(model))
            if point.num_bytes > 0.92 * free:
                needed = f"{point.num_bytes / GIB:.1f} GiB of weights and cache, {free / GIB:.1f} GiB free"
                yield {**entry, "infeasible": needed}
                continue
            try:
                model = model or random_model(name, point.dtype, device)
                yield {**entry, "step_times": plain(sweep(model, point, device, max_length))}
            except torch.OutOfMemoryError as error:
                yield {**entry, "infeasible": str(error).splitlines()[0][:200]}
            _let_go(device)


def _let_go(device: str) -> None:
    """Gives freed memory back to the device, so that what is free can be asked."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _held_bytes(model: PreTrainedModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def file_name(device_name: str) -> str:
    """`NVIDIA H100 80GB HBM3` is `nvidia-h100-80gb-hbm3.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def asked() -> argparse.Namespace:
    """The flags; a comma separates values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(DEFAULT_SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batch-sizes", default=",".join(map(str, BATCH_SIZES)))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH)
    parser.add_argument("--device", help="else the GPU when there is one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and stop")
    options = parser.parse_args()
    if unknown := set(options.shapes.split(",")) - SHAPES.keys():
        parser.error(f"--shapes {', '.join(sorted(unknown))}: allowed are {', '.join(SHAPES)}")
    return options


def main() -> None:
    """Plan, measure, write."""
    options = asked()
    device = fingerprint.pick_device(options.device)
    sizes, contexts = (tuple(map(int, text.split(","))) for text in (options.batch_sizes, options.contexts))
    planned = points(tuple(options.shapes.split(",")), options.dtype, sizes, contexts)
    for point in planned if options.dry_run else ():
        sys.stdout.write(
            f"{point.shape:14} {point.dtype} batch {point.batch_size:3} context {point.context_length:5} "
            f"widths 1 to {options.max_length + 1}: {point.num_bytes / GIB:6.1f} GiB\n"
        )
    if options.dry_run:
        return
    here = fingerprint.fingerprint(device)
    entries = []
    for entry in measure(planned, device, options.max_length):
        entries.append(entry)
        told = entry.get("infeasible") or "measured"
        sys.stdout.write(f"{entry['shape']} batch {entry['batch_size']} context {entry['context_length']}: {told}\n")
    document = {
        "evidence_version": FILE_VERSION,
        "environment": plain(here),
        "copy_bytes_per_s": copy_bytes_per_s(device),
        "entries": entries,
    }
    path = options.out / file_name(here.device)
    path.write_text(json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
