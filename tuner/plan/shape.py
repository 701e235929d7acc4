"""Bytes and operations of a forward pass, from a model's config; sizes from file headers where there are files.

Standard library only: no weight is read and no model library is loaded.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from profiles.builtin import BUILTIN, BUILTIN_FOLDER
from profiles.records.errors import ModelError

_ALLOWED = "give a directory, a config.json, a .gguf file, a hub id or a name of tuner/plan/models.json"
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type of a value
_GGUF_FLOATS, _GGUF_TEXT, _GGUF_LIST = (6, 12), 8, 9
_LONGEST_TEXT = 1 << 26  # bytes
_HUB_TIMEOUT_S = 3.0
_ANOTHER_MODEL = re.compile(r"\db\b|distill|eagle|specul|flash|medusa")  # behind a published name
Config = Mapping[str, Any]


@cache
def read_data(name: str) -> Any:
    """A data file that ships: hardware, engines, models, formats, published or residual."""
    document = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    return document.get(name, document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Weights of a decoder by how a step reads them, in values.

    Attributes:
        dense: Read by every step: attention, dense MLPs, shared experts and routers of all layers.
        expert: One expert's, summed over all layers that have experts.
        head: The output head; `stored`: what is held beside it, embeddings that are not tied to it.
        cache: Keys and values per cached token.
        bits: Bits per weight; of the head, `head_bits`.
        format: How the weights are stored, as formats.json names it.
    """

    name: str
    layers: int
    hidden: int
    dense: float
    expert: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    head: float
    stored: float
    cache: float
    format: str
    bits: float
    head_bits: float
    config: Config

    @property
    def weight_bytes(self) -> float:
        values = self.dense + self.expert * self.num_experts
        return (values * self.bits + (self.head + self.stored) * self.head_bits) / 8.0

    @property
    def active(self) -> float:
        """Weights that one token is multiplied with."""
        return self.dense + self.expert * self.experts_per_token + self.head

    def step_bytes(self, tokens: int) -> float:
        """Weight bytes that a step over `tokens` tokens reads: experts touched are E (1 - (1 - k/E)^tokens)."""
        spared = (1.0 - self.experts_per_token / max(self.num_experts, 1)) ** tokens
        body = self.dense + self.expert * self.num_experts * (1.0 - spared)
        return (body * self.bits + self.head * self.head_bits) / 8.0

    def first_layers(self, count: int) -> "Shape":
        """The first `count` layers and the head: an early exit."""
        part = count / self.layers
        return replace(self, layers=count, dense=self.dense * part, expert=self.expert * part, cache=self.cache * part)


def read_shape(name: str, format_name: str | None = None) -> Shape:
    """The shape of a model directory, config.json, .gguf file, built-in model, published name or hub id.

    Args:
        format_name: How the weights are stored; None: what the files or the config say, else bfloat16.

    Raises:
        ModelError: No such model, or a config that lacks a needed field.
    """
    path, size = Path(name), 0
    if name.startswith(BUILTIN):
        path, format_name = BUILTIN_FOLDER / name.removeprefix(BUILTIN), format_name or "float32"
    try:
        gguf_files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
        config_file = path / "config.json" if path.is_dir() else path
        if gguf_files and not (path.is_dir() and config_file.exists()):
            config, size = _read_gguf(gguf_files[0]), sum(file.stat().st_size for file in gguf_files)
        elif config_file.suffix == ".json":
            config = json.loads(config_file.read_text(encoding="utf-8"))
            size = sum(map(_tensor_bytes, path.glob("*.safetensors")))
        elif key := model_key(name):
            config, methods = read_data("models")[key], read_data("formats")["quant_methods"]
            format_name = format_name or next((methods[part] for part in methods if part in name.lower()), None)
        else:
            config = _hub_config(name)
        return shape_of(name, config, format_name, size)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, struct.error) as error:
        what = " ".join(str(error).split())
        raise ModelError(f"model {name!r}: {type(error).__name__} {what}; {_ALLOWED}") from error


def shape_of(name: str, config: Config, format_name: str | None = None, size: float = 0) -> Shape:
    """The shape that a config describes; `size`: bytes of all weights, where files tell.

    Raises KeyError: a needed field is not there. ModelError: no such format.
    """
    config = {**config, **(config.get("text_config") or {})}
    formats = read_data("formats")
    method = str((config.get("quantization_config") or {}).get("quant_method"))
    given = format_name or formats["quant_methods"].get(method) or config.get("dtype") or config.get("torch_dtype")
    spelling = formats["aliases"].get(str(given or "bfloat16").lower(), given or "bfloat16")
    format_key = next((key for key in formats["bits"] if key.lower() == spelling.lower()), None)
    if format_key is None:
        raise ModelError(f"dtype {given!r} of {name!r}: allowed are {', '.join(formats['bits'])}")
    bits = formats["bits"][format_key]
    head_bits = (
        max(bits, 6.56) if format_key[0] in "QI" else max(bits, 16.0)
    )  # a GGUF's head is Q6_K, others keep 16 bits
    shape = replace(_count(name, config), format=format_key, bits=bits, head_bits=head_bits)
    if size and format_name is None:
        bits = shape.bits * size / shape.weight_bytes
        format_key = min(
            formats["bits"], key=lambda key: (round(abs(formats["bits"][key] - bits), 1), key != format_key)
        )
        shape = replace(shape, format=format_key, bits=bits, head_bits=head_bits * size / shape.weight_bytes)
    return shape


def _count(name: str, config: Config) -> Shape:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head = hidden * (config.get("draft_vocab_size") or config["vocab_size"])  # EAGLE-3 heads choose from fewer tokens
    types = config.get("layer_types") or ()
    full = layers // (config.get("full_attention_interval") or 1)
    if any("linear" in kind for kind in types):
        full = sum("linear" not in kind for kind in types)
    attention, cache = _attention(config)
    dense = full * attention
    if full < layers:  # gated delta-net layers, as in Qwen3-Next
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        dense += (layers - full) * hidden * (2 * keys + 3 * values)
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
    routed = layers - min(config.get("first_k_dense_replace") or 0, layers) if experts else 0
    dense += (layers - routed) * 3 * hidden * config["intermediate_size"] if layers > routed else 0
    width = config.get("moe_intermediate_size") or config.get("intermediate_size") or 0
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        dense=dense + routed * hidden * (3 * shared + experts),
        expert=routed * 3 * hidden * width,
        num_experts=experts,
        experts_per_token=(config.get("num_experts_per_tok") or 1) if experts else 0,
        head=head,
        stored=0 if config.get("tie_word_embeddings") else head,
        cache=full * cache,
        format="",
        bits=0.0,
        head_bits=0.0,
        config=config,
    )


def _attention(config: Config) -> tuple[float, float]:
    """Weights of one attention layer, and its cached values per token."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if rank := config.get("kv_lora_rank"):  # multi-head latent attention, as in DeepSeek-V2
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        query_rank = config.get("q_lora_rank") or 0
        query = hidden * query_rank + (query_rank or hidden) * heads * (nope + rope)
        return query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden, rank + rope
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    return hidden * head_dim * 2 * (heads + kv_heads), 2 * kv_heads * head_dim


def head_shape(target: Shape, method: str) -> Shape:
    """The shape of a draft head of `target` without a config of its own.

    An MTP head is one layer of the target, a projection of two hidden states, and the target's output head. An EAGLE
    head is one dense layer and projections, with an output head of 32,000 tokens; a DFlash draft has five such layers.
    """
    first = replace(target.first_layers(1), name=f"native:{method}", stored=0.0)
    if "mtp" in method or "nextn" in method:
        return replace(first, dense=first.dense + 2 * target.hidden**2)
    is_block = "flash" in method
    inner = 3.5 * target.hidden if target.num_experts else target.config["intermediate_size"]
    dense = (5 if is_block else 1) * (3 * target.hidden**2 + 3 * target.hidden * inner) + 3 * target.hidden**2
    head = target.head if is_block else min(target.head, 32000 * target.hidden)
    form: dict[str, Any] = {"expert": 0.0, "num_experts": 0, "experts_per_token": 0}
    form |= {"format": "bfloat16", "bits": 16.0, "head_bits": 16.0}
    return replace(first, layers=5 if is_block else 1, dense=dense, head=head, **form)


def model_key(name: str) -> str | None:
    """The published model that a name begins with: `meta-llama/Llama-3.1-70B-Instruct` is `Llama-3.1-70B`.

    None for another model that is named after it: `DeepSeek-R1-Distill-Qwen-7B`, a draft head of it.
    """
    short = name.rpartition("/")[2].lower()
    key = max((key for key in read_data("models") if short.startswith(key.lower())), key=len, default="")
    return key if key and not _ANOTHER_MODEL.search(short[len(key) :]) else None


def is_at_hand(name: str) -> bool:
    """Whether the config of a model is read without the hub: it is a file, a directory, built in or published."""
    return name.startswith(BUILTIN) or Path(name).exists() or model_key(name) is not None


def _hub_config(name: str) -> Config:
    """From the hub's cache, else from the hub, asked once: a plan takes seconds. Raises ModelError."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"model {name!r}: no such directory, file or published name; {_ALLOWED}")
    try:
        from huggingface_hub import get_session, get_token, hf_hub_url, try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return dict(json.loads(Path(cached).read_text(encoding="utf-8")))
        url = hf_hub_url(name, "config.json")
        headers = {"authorization": f"Bearer {token}"} if (token := get_token()) else {}
        answer = get_session().get(url, headers=headers, timeout=_HUB_TIMEOUT_S)
        return dict(answer.raise_for_status().json())
    except Exception as error:  # the hub's client derives its errors from Exception itself
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ModelError(
            f"model {name!r}: the hub cannot be asked for it ({reason}); give its config.json or its directory"
        ) from error


def _tensor_bytes(path: Path) -> int:
    """Bytes of the tensors of a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a whole safetensors file, download it again")
        header = json.loads(file.read(length))
    return max((tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"), default=0)


def _read_gguf(path: Path) -> Config:
    """The config in a GGUF file's metadata, in the names of transformers."""
    with path.open("rb") as file:
        magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF":
            raise ValueError("not a GGUF file")
        pairs = [(_gguf_value(file, _GGUF_TEXT), _gguf_value(file, *_unpack(file, "<I"))) for _ in range(count)]
    metadata = dict(pairs)
    architecture = metadata["general.architecture"]
    fields = read_data("formats")["gguf_fields"]
    config = {name: metadata.get(f"{architecture}.{key}") for key, name in fields.items()}
    config["vocab_size"] = config["vocab_size"] or metadata.get("tokenizer.ggml.tokens")
    return {key: value for key, value in config.items() if value}


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    """A metadata value: integers and texts as they are, lists as their lengths, other numbers as None."""
    if kind == _GGUF_TEXT:
        (length,) = _unpack(file, "<Q")
        if length > _LONGEST_TEXT:
            raise ValueError("not a whole GGUF file")
        return file.read(length).decode(errors="replace")
    if kind == _GGUF_LIST:
        item, count = _unpack(file, "<IQ")
        if item in _GGUF_SIZES:
            file.seek(count * _GGUF_SIZES[item], 1)
        else:
            for _ in range(count):
                _gguf_value(file, item)
        return count
    raw = file.read(_GGUF_SIZES[kind])
    return None if kind in _GGUF_FLOATS else int.from_bytes(raw, "little")
