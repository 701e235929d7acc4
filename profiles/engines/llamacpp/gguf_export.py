"""Writes a Llama of safetensors as the GGUF file that llama.cpp reads, once for every digest and float type.

Weights are only renamed, reordered and cast: no value is quantised. Other architectures and tokenizers have
llama.cpp's own `convert_hf_to_gguf.py`, and the errors say so.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from profiles.engines.llamacpp.gguf_cache import gguf_place
from profiles.models import sources
from profiles.models.sources import Source, library_errors
from profiles.records.errors import ModelError

_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}
_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py and name the .gguf file"
# how llama.cpp calls the way a text is split before its merges, by what the tokenizer's file says; token ids, which is
# all that is sent to a server here, do not go through it
_SPLITS = {
    "llama-bpe": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    "smollm": '{"type": "Digits", "individual_digits": true}',
}


def gguf_of(name: str, dtype: str) -> Path:
    """The GGUF file of a model as the user names it: a GGUF itself, else one written into the user's cache.

    Raises ModelError: no such model, or one that is not written here.
    """
    source = sources.find(name)
    if source.gguf is not None:
        return source.gguf.path
    with library_errors(f"model {name!r}"):
        path = gguf_place(source.folder, sources.digest(source), dtype)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(source, dtype, path)
    return path


def write(source: Source, dtype: str, path: Path) -> None:
    """Replaces `path` by the model in one step. Raises ModelError: an architecture or tokenizer not written here."""
    config, tokenizer = sources.read_config(source), sources.read_tokenizer(source)
    _check(source.name, config)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(draft, "llama")
        num_tokens = _write_tokenizer(writer, source, tokenizer, _end_token_ids(source, config, tokenizer))
        _write_config(writer, source, config, dtype)
        for tensor_name, tensor in _tensors(source, config, num_tokens):
            kind = _TYPES[dtype] if tensor.dim() > 1 else _TYPES["float32"]
            writer.add_tensor(tensor_name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _check(name: str, config: PreTrainedConfig) -> None:
    """Refuses what this Llama of llama.cpp would compute otherwise."""
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type != "llama":
        raise ModelError(f"model {name!r}: a GGUF of {config.model_type} is not written here; {_CONVERT}")
    if rotation not in ("default", "llama3"):
        raise ModelError(f"model {name!r}: {rotation} rotations are not written as GGUF here; {_CONVERT}")
    if config.attention_bias or config.mlp_bias:
        raise ModelError(f"model {name!r}: biases are not written as GGUF here; {_CONVERT}")


def _write_config(writer: gguf.GGUFWriter, source: Source, config: PreTrainedConfig, dtype: str) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(source.name).name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_context_length(sources.max_positions(config, source))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _tensors(source: Source, config: PreTrainedConfig, num_tokens: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by llama.cpp's names; embedding rows that no token names are cut, as the torch engine cuts them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for file in sources.weight_files(source):
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 -- not a dict
                stem, _, suffix = key.rpartition(".")
                found = names.get_name(stem)
                if stem.endswith("rotary_emb") or (tied and stem == "lm_head"):
                    continue
                if found is None or suffix != "weight":
                    raise ModelError(f"model {source.name!r}: its tensor {key} is not one of a Llama's; {_CONVERT}")
                tensor = _interleaved(stem, weights.get_tensor(key), config)
                yield f"{found}.weight", tensor[:num_tokens] if stem in ("lm_head", "model.embed_tokens") else tensor
    if config.rope_parameters.get("rope_type", "default") == "llama3":
        yield "rope_freqs.weight", _rotary_factors(config)


def _interleaved(stem: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Rows of queries and keys in llama.cpp's order, which pairs what transformers keeps in two halves."""
    parts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = parts.get(stem.rpartition(".")[2])
    if heads is None:
        return tensor
    return tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)


def _rotary_factors(config: PreTrainedConfig) -> torch.Tensor:
    """What divides the plain rotary frequencies in Llama 3.1 and later, one factor for each."""
    scaled: torch.Tensor
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * scaled.numel()
    plain: torch.Tensor = config.rope_parameters["rope_theta"] ** -(
        torch.arange(0, size, 2, dtype=torch.float32) / size
    )
    return plain / scaled


def _end_token_ids(source: Source, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The generation config's end tokens, else the config's, else the tokenizer's, which goes first of them."""
    generation = source.folder / "generation_config.json"
    told = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    own = tokenizer.eos_token_id
    named = (told.get("eos_token_id"), getattr(config, "eos_token_id", None), own)
    found = next((one for one in named if one is not None), None)
    ends = found if isinstance(found, list) else [found]
    return sorted((end for end in ends if end is not None), key=lambda end: (end != own, end))


def _write_tokenizer(
    writer: gguf.GGUFWriter, source: Source, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> int:
    """Byte-level BPE as llama.cpp keeps it; the number of tokens. Raises ModelError for another kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = state.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(state["decoder"]):
        raise ModelError(f"model {source.name!r}: its tokenizer is no byte-level BPE; {_CONVERT}")
    by_id: dict[int, str] = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in state["added_tokens"]}
    num_tokens = max(by_id) + 1
    kinds = [_token_type(index, by_id, special) for index in range(num_tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(json.dumps(state.get("pre_tokenizer"), ensure_ascii=False)))
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in range(num_tokens)])
    writer.add_token_types(kinds)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    for add, index in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), ends, strict=False
    ):
        add(index)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return num_tokens


def _token_type(index: int, by_id: dict[int, str], special: dict[int, bool]) -> gguf.TokenType:
    if index not in by_id:
        return gguf.TokenType.UNUSED
    if index not in special:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if special[index] else gguf.TokenType.USER_DEFINED


def _split_name(pre_tokenizer: str) -> str:
    plain = pre_tokenizer.replace("\\\\", "\\")
    return next((name for name, text in _SPLITS.items() if text in plain), "gpt-2")
