"""Plain decoding of common model shapes with random weights against the device's copy bandwidth."""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.step_times import time_steps
from profiles.models.footprint import GIB
from profiles.models.memory import cached_values_per_token
from profiles.records.core import Workload
from profiles.stats import median
from profiles.timing.clock import Clock, quietest

CONTEXT_LENGTH, COPIES = 512, 10
DTYPE = torch.bfloat16
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES = {
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
        **COMMON,
    ),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
        **COMMON,
    ),
}


def roofline_fraction(device: str) -> float | None:
    """Rate of plain decoding over the rate at which weights and cache can be read; the lowest of all shapes.

    Random weights, batch 1, 512 tokens cached; the bandwidth is that of copying on the device. None on a CPU.
    """
    if not device.startswith("cuda"):
        return None
    bandwidth = copy_bytes_per_s(device)
    return round(min(shape_bytes(name) / step_s(name, device) / bandwidth for name in SHAPES), 4)


def shape_bytes(name: str) -> int:
    """Bytes of the weights and of a full cache."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[name]))
    num_params = sum(weight.numel() for weight in model.parameters())
    return DTYPE.itemsize * int(num_params + CONTEXT_LENGTH * cached_values_per_token(SHAPES[name]))


def step_s(name: str, device: str) -> float:
    """Median seconds of a single-token step."""
    config = copy.deepcopy(SHAPES[name])  # a model writes into its config
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    rows = {name: RowModel(model, 1, CONTEXT_LENGTH + 3)}
    greedy = Workload(context_length=CONTEXT_LENGTH, max_new_tokens=2)
    times, _ = quietest(
        lambda: time_steps(rows, Clock(device), greedy, target=name, context_length=CONTEXT_LENGTH, max_length=1),
        [device],
    )
    return median(times[name].samples_s[1])


def copy_bytes_per_s(device: str) -> float:
    """Bandwidth of copying 1 GiB on the device: bytes read and written per second, the best of ten."""
    block, clock = torch.zeros(GIB, dtype=torch.uint8, device=device), Clock(device)
    target, seconds = torch.empty_like(block), []
    for _ in range(COPIES):
        started = clock.read()
        target.copy_(block)
        seconds.append(clock.read() - started)
    return 2.0 * GIB / min(seconds)
