"""How much memory models need, told from headers and configs before any weight is loaded.

Weights and key/value caches only: what is needed at least, because activations come on top. Loads and runs nothing.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from profiles.hardware.fingerprint import free_bytes
from profiles.models import sources
from profiles.models.footprint import GIB, Footprint
from profiles.models.sources import Source
from profiles.records.core import DTYPES
from profiles.records.errors import ModelError

__all__ = ["Footprint", "cached_values_per_token", "check_dtype", "check_memory", "footprint"]


def check_dtype(dtype: str) -> None:
    """Raises ModelError for a float type that models are not run in."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")


def footprint(source: Source, dtype: str) -> Footprint:
    """What the model takes as `dtype`. Raises ModelError when it cannot be read."""
    check_dtype(dtype)
    size = getattr(torch, dtype).itemsize
    with sources.translated(f"model {source.name!r}"):
        return Footprint(
            weight_bytes=size * sources.num_values(source),
            cache_bytes_per_token=size * cached_values_per_token(sources.config_of(source)),
        )


def check_memory(
    names: Sequence[str], *, dtype: str, device: str, num_tokens: int, num_free_bytes: int | None = None
) -> None:
    """Refuses, before any weight is loaded, models that do not fit on `device` together with their caches.

    A key/value cache of `num_tokens` (batch times context) is counted for each. `num_free_bytes` None asks the device.

    Raises: ModelError: needed and free memory in GiB, or a model that cannot be read.
    """
    prints = [footprint(sources.find(name), dtype) for name in names]
    weights = sum(one.weight_bytes for one in prints)
    cache = num_tokens * sum(one.cache_bytes_per_token for one in prints)
    free = free_bytes(device) if num_free_bytes is None else num_free_bytes
    if weights + cache > free:
        needed = f"{weights / GIB:.3g} GiB of {dtype} weights and {cache / GIB:.3g} GiB of cache"
        raise ModelError(
            f"models {', '.join(names)}: {needed} for {num_tokens} tokens; {device} has {free / GIB:.3g} GiB free; "
            "take a smaller model, batch or context, or a 16-bit dtype"
        )


def cached_values_per_token(config: PreTrainedConfig) -> int:
    """Keys and values a token leaves in the cache of all layers; windowed layers keep all of theirs, to roll back."""
    text_config = config.get_text_config(decoder=True)
    num_heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    num_kept = getattr(text_config, "num_key_value_heads", None) or num_heads
    return int(2 * text_config.num_hidden_layers * num_kept * head_dim)
