"""What a GGUF file says about itself, and what transformers leaves unread or adds when it loads one.

The weights are dequantised by transformers; here stand the header, the tokenizer without additions of the library's
classes, and the scaled rotary frequencies that llama.cpp keeps as a tensor. Knows nothing of other kinds of files.
"""

import copy
import json
import math
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

from profiles.records.errors import ModelError

_ROPE_FACTORS = "rope_freqs.weight"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # what llama.cpp too takes for an end of generation
_READS_ROPE_SCALING = ("gpt-oss",)  # the architectures whose scaling transformers reads from the metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """The header: `float_type` as llama.cpp spells it (Q4_K_M, F16), `context_length` in tokens.

    `rope_factors`, where there are any, divide the rotary frequencies (Llama 3.1 and later).
    """

    path: Path
    float_type: str
    context_length: int
    num_tokens: int
    num_values: int
    end_token_ids: tuple[int, ...]
    rope_factors: tuple[float, ...] | None


def read(path: Path, name: str) -> GgufFile:
    """The header of the model the user calls `name`.

    Raises: ModelError: a file that ends early, a part of a split model, a header that lacks what is needed, positions
    scaled in a way that transformers does not read. Whatever the reader raises on a broken header passes.
    """
    metadata, _ = read_gguf_metadata(str(path))  # lists of strings as their lengths: seconds less than gguf's reader
    header = GgufHeader.from_file(str(path))
    architecture = header.architecture
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ModelError(f"model {name!r}: one of {parts} parts; join them with `llama-gguf-split --merge`")
    _check_positions(name, metadata, header)
    needed = (f"{architecture}.context_length", "tokenizer.ggml.tokens")
    if missing := [key for key in needed if not metadata.get(key)]:
        raise ModelError(f"model {name!r}: its header has no {missing[0]}; convert it again")
    size, whole = path.stat().st_size, header.data_start + max(info.offset + info.nbytes for info in header.tensors)
    if size < whole:
        raise ModelError(f"model {name!r}: not a whole GGUF file, {size} of {whole} bytes; fetch it again")
    return GgufFile(
        path=path,
        float_type=_float_type(metadata.get("general.file_type"), header),
        context_length=metadata[needed[0]],
        num_tokens=metadata[needed[1]],
        num_values=sum(math.prod(info.shape) for info in header.tensors),
        end_token_ids=tuple(sorted({metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS} - {None})),
        rope_factors=_rope_factors(path, header),
    )


def _check_positions(name: str, metadata: dict[str, Any], header: GgufHeader) -> None:
    """Refuses scaled positions that would be left out without a word: the model would be another one."""
    scaling = metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    unread = [info.name for info in header.tensors if info.name.startswith("rope_factors")]
    if scaling != "none" and header.architecture not in _READS_ROPE_SCALING:
        unread.append(f"rope.scaling.type {scaling!r}")
    if unread:
        raise ModelError(
            f"model {name!r}: transformers does not read {unread[0]} of a GGUF; take the safetensors files"
        )


def _float_type(file_type: int | None, header: GgufHeader) -> str:
    """The file's own word; where it has none, the type that holds the most values."""
    try:
        return (
            gguf.LlamaFileType(-1 if file_type is None else file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        )
    except ValueError:
        values: Counter[int] = Counter()
        for info in header.tensors:
            values[info.ggml_type] += math.prod(info.shape)
        return gguf.GGMLQuantizationType(values.most_common(1)[0][0]).name


def _rope_factors(path: Path, header: GgufHeader) -> tuple[float, ...] | None:
    info = next((info for info in header.tensors if info.name == _ROPE_FACTORS), None)
    if info is None:
        return None
    place = {"offset": header.data_start + info.offset, "shape": info.shape}
    return tuple(numpy.memmap(path, numpy.float32, "r", **place).tolist())


@lru_cache(maxsize=8)
def _config_of(file: GgufFile) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)


def config_of(file: GgufFile) -> PreTrainedConfig:
    """A fresh copy of the transformers config; the file is read for it once, which takes seconds."""
    return copy.deepcopy(_config_of(file))


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerBase:
    """The file's own tokenizer, with exactly its tokens: the library's classes add theirs (`<|endoftext|>`) to any."""
    with tempfile.TemporaryDirectory() as alone:  # a tokenizer.json beside the file would be taken instead
        (Path(alone) / file.path.name).symlink_to(file.path.resolve())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=file.path.name)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < file.num_tokens]
    own = {token["content"] for token in state["added_tokens"]} | state["model"]["vocab"].keys()
    special = tokenizer.special_tokens_map.items()
    named = {kind: token for kind, token in special if isinstance(token, str) and token in own}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **named)


def scale_rotary(model: PreTrainedModel, file: GgufFile) -> None:
    """Divides the model's rotary frequencies by the file's factors, as llama.cpp does; no-op without factors."""
    if file.rope_factors is None:
        return
    factors = torch.tensor(file.rope_factors)
    for module in model.modules():
        for frequencies in (getattr(module, "inv_freq", None), getattr(module, "original_inv_freq", None)):
            if isinstance(frequencies, torch.Tensor):
                frequencies.div_(factors.to(frequencies.device))
