"""Writes builtin models as GGUF beside their safetensors: `python -m profiles.builtin.training.write_gguf`.

Weights are renamed, reordered and cast to float32; no value is quantised. Only Llamas with a byte-level BPE tokenizer
are written: users convert their models with llama.cpp's `convert_hf_to_gguf.py`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from profiles.builtin import GGUF_MODELS
from profiles.models import sources
from profiles.models.sources import Source
from profiles.records.errors import ModelError

MAX_FILE_BYTES = 12_000_000
_CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py"
# how llama.cpp calls the way a text is split before its merges, by what the tokenizer's file says; token ids, which is
# all that is sent to a server here, do not go through it
_SPLITS = {
    "llama-bpe": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    "smollm": '{"type": "Digits", "individual_digits": true}',
}


def write(source: Source, folder: Path) -> None:
    """Writes the model as float32 into files of `folder` of at most 12 MB each, which llama.cpp reads as one."""
    config, tokenizer = sources.read_config(source), sources.read_tokenizer(source)
    _check(source.name, config)
    for stale in folder.glob("model*.gguf"):
        stale.unlink()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_size=MAX_FILE_BYTES)
    num_tokens = _write_tokenizer(writer, source, tokenizer, _end_token_ids(source, config, tokenizer))
    _write_config(writer, source, config)
    for tensor_name, tensor in _tensors(source, config, num_tokens):
        writer.add_tensor(tensor_name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(name: str, config: PreTrainedConfig) -> None:
    """Refuses what this Llama of llama.cpp would compute otherwise."""
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type != "llama":
        raise ModelError(f"model {name!r}: a GGUF of {config.model_type} is not written here; {_CONVERT}")
    if rotation not in ("default", "llama3"):
        raise ModelError(f"model {name!r}: {rotation} rotations are not written as GGUF here; {_CONVERT}")
    if config.attention_bias or config.mlp_bias:
        raise ModelError(f"model {name!r}: biases are not written as GGUF here; {_CONVERT}")


def _write_config(writer: gguf.GGUFWriter, source: Source, config: PreTrainedConfig) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(source.name).name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
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
                name = names.get_name(stem)
                if stem.endswith("rotary_emb") or (tied and stem == "lm_head"):
                    continue
                if name is None or suffix != "weight":
                    raise ModelError(f"model {source.name!r}: its tensor {key} is not one of a Llama's; {_CONVERT}")
                tensor = _interleaved(stem, weights.get_tensor(key), config)
                yield f"{name}.weight", tensor[:num_tokens] if stem in ("lm_head", "model.embed_tokens") else tensor
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
    stated = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    eos_token_id = tokenizer.eos_token_id
    candidates = (stated.get("eos_token_id"), getattr(config, "eos_token_id", None), eos_token_id)
    first = next((candidate for candidate in candidates if candidate is not None), None)
    ends = first if isinstance(first, list) else [first]
    return sorted((end for end in ends if end is not None), key=lambda end: (end != eos_token_id, end))


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
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
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


def main() -> None:
    for name in GGUF_MODELS:
        source = sources.find(name)
        write(source, source.folder)
        sys.stdout.write(f"{name}: {', '.join(sorted(path.name for path in source.folder.glob('*.gguf')))}\n")


if __name__ == "__main__":
    main()
