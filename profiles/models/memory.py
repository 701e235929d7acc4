"""Memory that models need, from headers and configs, before any weight is loaded. Activations come on top."""

import torch
from transformers import PreTrainedConfig

from profiles.hardware.fingerprint import free_bytes
from profiles.models import sources
from profiles.models.footprint import GIB, Footprint
from profiles.models.sources import Source
from profiles.records.core import DTYPES
from profiles.records.errors import ModelError


def check_dtype(dtype: str) -> None:
    """Raises ModelError for a float type that models are not run in."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")


def footprint(source: Source, dtype: str) -> Footprint:
    """The model's footprint as `dtype`. Raises ModelError when its files cannot be read."""
    check_dtype(dtype)
    item_bytes = getattr(torch, dtype).itemsize
    with sources.library_errors(f"model {source.name!r}"):
        config = sources.read_config(source)
        if not isinstance(getattr(config.get_text_config(decoder=True), "num_attention_heads", None), int):
            raise source.error(sources.NO_ROLLBACK.format(layers=f"{config.model_type} layers"))
        return Footprint(
            weight_bytes=item_bytes * sources.num_values(source),
            cache_bytes_per_token=item_bytes * cached_values_per_token(config),
        )


def check_memory(name: str, *, dtype: str, device: str, num_tokens: int) -> None:
    """Refuses a model that does not fit on `device` with a key/value cache of `num_tokens` (batch size times context).

    Raises ModelError: too little memory (the message names GiB needed and free), or a model that cannot be read.
    """
    need, free = footprint(sources.find(name), dtype), free_bytes(device)
    if need.total_bytes(num_tokens) > free:
        cache_bytes = num_tokens * need.cache_bytes_per_token
        needed = f"{need.weight_bytes / GIB:.3g} GiB of {dtype} weights and {cache_bytes / GIB:.3g} GiB of cache"
        raise ModelError(
            f"model {name!r}: {needed} for {num_tokens} tokens; {device} has {free / GIB:.3g} GiB free; "
            "use a smaller model, batch or context, or a 16-bit dtype"
        )


def cached_values_per_token(config: PreTrainedConfig) -> int:
    """Keys and values cached per token over all layers; sliding-window layers keep all tokens, for rollback."""
    text_config = config.get_text_config(decoder=True)
    num_heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or num_heads
    return int(2 * text_config.num_hidden_layers * num_kv_heads * head_dim)
