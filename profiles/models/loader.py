"""Loads target and draft models, describes those that another engine runs, and checks that they can be used.

Weights come from safetensors or GGUF files only; nothing is printed while loading.
"""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from profiles.engines.torch import batch_model
from profiles.models import gguf, sources
from profiles.models.memory import check_dtype
from profiles.models.sources import Source, library_errors
from profiles.records.core import DTYPES, Model, Prompt, Workload, digest_of
from profiles.records.errors import InputError, ModelError, PairError

# what a layer may keep per token so that tokens can be taken back; a recurrent state cannot
_CACHED_LAYERS = {"full_attention", "sliding_attention"}
_LLAMACPP_TRAILING = 128  # SPEC_VOCAB_MAX_SIZE_DIFFERENCE
_HARMLESS = re.compile(  # tensors that models compute themselves, and scales of a quantised key/value cache
    r"rotary_emb\.inv_freq$|\.(attn|attention|self_attn)\.(masked_)?bias$|\.[kvq]_scale$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModel:
    """What is known of a model without running it."""

    tokenizer: PreTrainedTokenizerBase
    record: Model
    max_positions: int  # the longest context in tokens
    num_tokens: int  # token ids below it have an embedding
    end_token_ids: tuple[int, ...]
    note: str | None = None  # one line for the user on how the weights are run, if there is something to say


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(DescribedModel):
    """A model in evaluation mode, without gradients."""

    model: PreTrainedModel


def describe(name: str, *, dtype: str | None) -> DescribedModel:
    """A model that another engine will run; weights are not loaded.

    `dtype`: float type it is run in; None takes the type of its files (float16 for a quantised GGUF). Raises
    ModelError: no such model, pickled or broken files, no tokenizer.
    """
    source = sources.find(name)
    sources.weight_files(source)
    with library_errors(f"model {name!r}"):
        config, tokenizer = sources.read_config(source), sources.read_tokenizer(source)
        has_generation = bool(source.files("generation_config.json"))
        generation = GenerationConfig.from_pretrained(source.folder) if has_generation else None
        record = _record(source, config, dtype)
        return DescribedModel(
            tokenizer=tokenizer,
            record=record,
            num_tokens=record.vocab_size or max(tokenizer.get_vocab().values()) + 1,
            max_positions=sources.max_positions(config, source),
            end_token_ids=_end_token_ids(source, generation, config.get_text_config(decoder=True), tokenizer),
        )


def load(name: str, *, dtype: str, device: str, num_tokens: int | None = None) -> LoadedModel:
    """Loads a directory, a GGUF file, a hub id or a built-in model on `device`, its float weights as `dtype`.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        num_tokens: Rows of the embedding to keep, a target's for its drafts; None keeps those that have a token.

    Raises: ModelError: no such model, pickled or broken files, weights missing or not finite, no tokenizer, or an
    architecture that transformers does not know, that cannot take tokens back or cannot run in rows. OutOfMemoryError:
    the device is full.
    """
    check_dtype(dtype)
    source = sources.find(name)
    sources.weight_files(source)
    with library_errors(f"model {name!r}"):
        config = sources.read_config(source)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            lack = f"{config.model_type} has no language model of its own in transformers, which the torch engine needs"
            raise source.error(f"{lack}; use an engine that runs it, such as vLLM")
        _check_cache(source, config)
        _check_quantization(source, config)
        tokenizer = sources.read_tokenizer(source)
        model, notes = _load_weights(source, config, dtype)
        _cut_embedding(model, num_tokens or max(tokenizer.get_vocab().values()) + 1)
        model = model.to(device)
        for weight_name, weight in model.named_parameters():
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                raise source.error(f"{weight_name} holds NaN or infinity as {dtype}")
        batch_model.check_rows(model, name)
        num_rows = model.get_input_embeddings().weight.shape[0]
        record = _record(source, config, dtype)
        if record.vocab_size not in (None, num_rows):  # another distribution than that of the files alone
            record = replace(record, digest=digest_of([record.digest, num_rows]))
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            record=replace(record, num_params=model.num_parameters()),
            num_tokens=num_rows,
            max_positions=sources.max_positions(config, source),
            end_token_ids=_end_token_ids(
                source, model.generation_config, config.get_text_config(decoder=True), tokenizer
            ),
            note="; ".join(notes) or None,
        )


def describe_head(name: str, *, dtype: str) -> Model:
    """A draft that is no model by itself, such as one that reads the target's hidden states. Raises ModelError."""
    source = sources.find(name)
    with library_errors(f"model {name!r}"):
        return _record(source, sources.read_config(source), dtype)


def _record(source: Source, config: PreTrainedConfig, dtype: str | None) -> Model:
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if source.gguf is not None:
        stored = {"F32": "float32", "BF16": "bfloat16"}.get(source.gguf.float_type, "float16")
    return Model(
        name=source.name,
        revision=source.revision,
        dtype=dtype or (stored if stored in DTYPES else "float32"),
        digest=sources.digest(source),
        num_params=sources.num_values(source),
        vocab_size=getattr(config.get_text_config(decoder=True), "vocab_size", None),
        stored_type=None if source.gguf is None else source.gguf.float_type,
    )


def check_pair(target: DescribedModel, draft: DescribedModel, *, engine: str = "torch") -> None:
    """Refuses a draft with another token map.

    Tokens that only one of the two has at the end of its map are fine: such a draft never proposes them, or has them
    refused. Padded embeddings are fine here; engines that compare their rows have a rule of their own. Raises
    PairError: other tokens under the same ids, more tokens at the end than llama.cpp allows, or fewer embedding rows
    than the torch engine needs.
    """
    pair = f"draft {draft.record.name!r} and target {target.record.name!r}"
    draft_ids, target_ids = maps = [loaded.tokenizer.get_vocab() for loaded in (draft, target)]
    num_common = min(max(ids.values()) for ids in maps) + 1
    entries = [{(number, token) for token, number in ids.items() if number < num_common} for ids in maps]
    differing = list(dict.fromkeys(token for _, token in sorted(entries[0] ^ entries[1])))
    if differing:
        first = ", ".join(
            f"{token!r} ({draft_ids.get(token, 'absent')} and {target_ids.get(token, 'absent')})"
            for token in differing[:3]
        )
        raise PairError(
            f"{pair} have different token maps ({len(draft_ids)} and {len(target_ids)} tokens): {len(differing)} "
            f"tokens differ, first, with the ids in each: {first}; use a draft with the target's tokenizer"
        )
    num_behind = abs(len(target_ids) - len(draft_ids))
    if engine == "llamacpp" and num_behind > _LLAMACPP_TRAILING:
        raise PairError(f"{pair}: {num_behind} tokens at the end of one map only; llama.cpp takes {_LLAMACPP_TRAILING}")
    if isinstance(draft, LoadedModel) and draft.num_tokens != target.num_tokens:
        raise PairError(f"{pair} embed {draft.num_tokens} and {target.num_tokens} tokens; the draft needs as many")


def check_context(loaded: DescribedModel, *, context_length: int, max_length: int) -> None:
    """As `check_positions`, for a loaded or described model."""
    check_positions(loaded.record.name, loaded.max_positions, context_length=context_length, max_length=max_length)


def check_positions(name: str, max_positions: int, *, context_length: int, max_length: int) -> None:
    """Refuses contexts in which a round of `max_length` drafted tokens could pass the model's last position.

    `context_length`: prompt plus new tokens. Raises ModelError: the context does not fit; the message names what is
    allowed.
    """
    if context_length + max_length > max_positions:
        length = f" with speculation length {max_length}" if max_length else ""
        raise ModelError(
            f"context {context_length}{length}: model {name!r} has {max_positions} positions; "
            f"allowed are contexts up to {max_positions - max_length}{' with that length' if max_length else ''}"
        )


def check_prompts(workload: Workload, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts that are too long for the workload's context. Raises InputError."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + workload.max_new_tokens > workload.context_length:
        tokens = f"a prompt of {longest} tokens with {workload.max_new_tokens} new ones"
        raise InputError(f"{tokens}: allowed are {workload.context_length} together, the workload's context")


def _check_cache(source: Source, config: PreTrainedConfig) -> None:
    """Refuses layers that keep a state instead of keys and values."""
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - _CACHED_LAYERS
    if "chunked_attention" in kinds:
        raise source.error("chunked_attention layers are not decoded by the torch engine; use --engine vllm")
    if kinds:
        raise source.error(sources.NO_ROLLBACK.format(layers=f"{min(kinds)} layers"))


def _check_quantization(source: Source, config: PreTrainedConfig) -> None:
    """Refuses a method that transformers does not know: it would load the weights as if they had none."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization and method not in AUTO_QUANTIZER_MAPPING:
        fault = f"quantised by {method!r}, which transformers does not know"
        raise source.error(f"{fault}; use the original weights, or an engine that reads it, such as vLLM")


def _load_weights(source: Source, config: PreTrainedConfig, dtype: str) -> tuple[PreTrainedModel, list[str]]:
    """The model in evaluation mode, with fused attention where the architecture has it, and notes on its files."""
    options = {
        "config": config,
        "dtype": getattr(torch, dtype),
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, by name
        **({} if source.gguf is None else {"gguf_file": source.gguf.path.name}),
    }
    types = {} if source.gguf is not None else {name: kind for name, _, kind in sources.tensors(source)}
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar of dequantising cannot be turned off
        try:
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="sdpa", **options)
        except ValueError:  # what an architecture without it raises; any other fault is raised again below
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager", **options)
    notes = _check_complete(source, model, info, types)
    if model._is_stateful:  # what transformers' own assisted decoding checks
        raise source.error(sources.NO_ROLLBACK.format(layers=f"{type(model).__name__}'s layers"))
    if source.gguf is not None:
        gguf.scale_rotary(model, source.gguf)
        packed = (
            f"model {source.name!r}: a GGUF of {source.gguf.float_type} weights, dequantised and run as {dtype}; "
            "acceptance is that of its weights, speed and memory are not those of an engine that keeps them packed"
        )
        notes = [packed, *notes]
    model.requires_grad_(False)
    return model, notes


def _check_complete(source: Source, model: PreTrainedModel, info: dict[str, Any], types: dict[str, str]) -> list[str]:
    """Refuses a model that is not what its files hold; returns notes on tensors of other parts that stay unread."""
    floats = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    unread = [key for key in sorted(info["unexpected_keys"]) if not _HARMLESS.search(key)]
    if model.config.get_text_config(decoder=True).tie_word_embeddings:
        unread = [key for key in unread if key != "lm_head.weight"]
    modules = {name for name, _ in model.named_modules()}
    faults = {
        "are not in its files": sorted(info["missing_keys"]),
        "are of another size": [
            f"{name} ({list(stored)} instead of {list(expected)})"
            for name, stored, expected in sorted(info["mismatched_keys"])
        ],
        "are whole numbers": sorted(name for name in floats if types.get(name, "").startswith(("I", "U"))),
        "have no place in the model": [key for key in unread if _is_inside(key, modules)],
        "cannot be read": [" ".join(str(fault).split())[:300] for fault in info.get("error_msgs") or ()],
    }
    for fault, names in faults.items():
        if names:
            description = "the header" if source.gguf is not None else "its config.json"
            advice = f"{description} must describe the weights, and how they are quantised"
            raise source.error(f"{len(names)} weights {fault}, first {names[0]}; {advice}")
    parts = ", ".join(dict.fromkeys(key.partition(".")[0] for key in unread))
    note = f"model {source.name!r}: {len(unread)} tensors beside the language model are not read ({parts})"
    return [note] if unread else []


def _is_inside(key: str, modules: set[str]) -> bool:
    """Whether a tensor belongs to the language model: to one of its modules, or to a layer that it lacks."""
    return key.rpartition(".")[0] in modules or ".".join(key.split(".")[:2]) in modules


def _cut_embedding(model: PreTrainedModel, num_tokens: int) -> None:
    """Cuts the embedding to `num_tokens` rows, so that target and draft probabilities have one width.

    Fewer rows stay: a tokenizer may name tokens that the model does not have.
    """
    if model.get_input_embeddings().weight.shape[0] > num_tokens:
        model.resize_token_embeddings(num_tokens)
        model.requires_grad_(False)


def _end_token_ids(source: Source, *configs: Any) -> tuple[int, ...]:
    """A GGUF file's end tokens, else those of the first of `configs` that names any, else none.

    The configs of a GGUF are made by transformers, whose defaults name end tokens that the file does not have.
    """
    if source.gguf is not None:
        return source.gguf.end_token_ids
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()
