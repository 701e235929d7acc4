"""Reads GGUF files: the header, the exact tokenizer, and the scaled rotary frequencies that transformers leaves out."""

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
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

from profiles.records.errors import ModelError

_ROPE_FACTORS = "rope_freqs.weight"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp ends a generation at each of them
_READS_ROPE_SCALING = ("gpt-oss",)  # architectures whose scaling transformers reads from the metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A GGUF file's header."""

    path: Path
    float_type: str  # llama.cpp's name of the stored type (Q4_K_M, F16)
    context_length: int  # in tokens
    num_tokens: int
    num_values: int
    end_token_ids: tuple[int, ...]
    rope_factors: tuple[float, ...] | None  # divisors of the rotary frequencies (Llama 3.1 and later)


def read(path: Path, name: str) -> GgufFile:
    """The header of the model that the user calls `name`.

    Raises ModelError: a truncated file, a part of a split model, a header without a needed key, or scaled positions
    that transformers does not read. Errors of the gguf reader on a broken header pass.
    """
    metadata, _ = read_gguf_metadata(str(path))  # lists of strings as their lengths: seconds less than gguf's reader
    header = GgufHeader.from_file(str(path))
    if (num_parts := metadata.get("split.count", 1)) > 1:
        raise ModelError(f"model {name!r}: one of {num_parts} parts; join them with `llama-gguf-split --merge`")
    _check_positions(name, metadata, header)
    context_key, tokens_key = f"{header.architecture}.context_length", "tokenizer.ggml.tokens"
    if missing := [key for key in (context_key, tokens_key) if not metadata.get(key)]:
        raise ModelError(f"model {name!r}: its header has no {missing[0]}; convert it again")
    size = path.stat().st_size
    full_size = header.data_start + max(info.offset + info.nbytes for info in header.tensors)
    if size < full_size:
        raise ModelError(f"model {name!r}: not a whole GGUF file, {size} of {full_size} bytes; download it again")
    return GgufFile(
        path=path,
        float_type=_float_type(metadata.get("general.file_type"), header),
        context_length=metadata[context_key],
        num_tokens=metadata[tokens_key],
        num_values=sum(math.prod(info.shape) for info in header.tensors),
        end_token_ids=tuple(sorted({metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS} - {None})),
        rope_factors=_rope_factors(path, header),
    )


def _check_positions(name: str, metadata: dict[str, Any], header: GgufHeader) -> None:
    """Refuses scaled positions that transformers would ignore silently."""
    scaling = metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    unread = [info.name for info in header.tensors if info.name.startswith("rope_factors")]
    if scaling != "none" and header.architecture not in _READS_ROPE_SCALING:
        unread.append(f"rope.scaling.type {scaling!r}")
    if unread:
        raise ModelError(f"model {name!r}: transformers ignores {unread[0]} of a GGUF; use the safetensors files")


def _float_type(file_type: int | None, header: GgufHeader) -> str:
    """The type that the file states; without one, the type of the most values."""
    try:
        name = gguf.LlamaFileType(-1 if file_type is None else file_type).name
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        counts: Counter[int] = Counter()
        for info in header.tensors:
            counts[info.ggml_type] += math.prod(info.shape)
        return gguf.GGMLQuantizationType(counts.most_common(1)[0][0]).name


def _rope_factors(path: Path, header: GgufHeader) -> tuple[float, ...] | None:
    info = next((info for info in header.tensors if info.name == _ROPE_FACTORS), None)
    if info is None:
        return None
    factors = numpy.memmap(path, numpy.float32, "r", offset=header.data_start + info.offset, shape=tuple(info.shape))
    return tuple(factors.tolist())


@lru_cache(maxsize=8)
def _read_config(file: GgufFile) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)


def read_config(file: GgufFile) -> PreTrainedConfig:
    """A fresh copy of the transformers config; reading the file takes seconds and happens once."""
    return copy.deepcopy(_read_config(file))


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer with exactly the file's tokens; transformers' classes add tokens such as `<|endoftext|>`."""
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer.json beside the file would win
        (Path(folder) / file.path.name).symlink_to(file.path.resolve())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=file.path.name)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < file.num_tokens]
    vocabulary = {token["content"] for token in state["added_tokens"]} | state["model"]["vocab"].keys()
    special_tokens = {
        role: token
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and token in vocabulary
    }
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **special_tokens)


def scale_rotary(model: PreTrainedModel, file: GgufFile) -> None:
    """Divides the model's rotary frequencies by the file's factors, as llama.cpp does."""
    if file.rope_factors is None:
        return
    factors = torch.tensor(file.rope_factors)
    for module in model.modules():
        for frequencies in (getattr(module, "inv_freq", None), getattr(module, "original_inv_freq", None)):
            if isinstance(frequencies, torch.Tensor):
                frequencies.div_(factors.to(frequencies.device))
