"""Loads target and draft, says who they are, and refuses what cannot be used, with the reason.

Weights are read from safetensors or GGUF only and loaded without a word on stderr. This module runs no model and knows
nothing of drafts' rounds; where the files are is `sources`' matter, whether they fit `memory`'s.
"""

import contextlib
import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from profiles.engines.torch import batch_model
from profiles.models import gguf, sources
from profiles.models.memory import check_dtype
from profiles.models.sources import Source, translated
from profiles.records.core import DTYPES, Model, Prompt, Workload
from profiles.records.errors import InputError, ModelError, PairError

# what a layer may keep per token, so that tokens can be taken back; a recurrent state cannot give them up
_CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_FILLED = 0.9  # of a GPU's free memory: caches and activations need the rest
_NO_ROLLBACK = "model {name!r}: {what} keep a running state, which cannot take tokens back; a key/value cache is needed"


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModel:
    """What is known of a model without running it; `max_positions` bounds its context in tokens.

    `note`: what the user should know about how the weights came to be as they are run, in one line.
    """

    tokenizer: PreTrainedTokenizerBase
    record: Model
    max_positions: int
    end_token_ids: tuple[int, ...]
    note: str | None = None

    def encode(self, text: str) -> list[int]:
        """A text's token ids, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel(DescribedModel):
    """A model ready to run, in evaluation mode and without gradients."""

    model: PreTrainedModel


def describe(name: str, *, dtype: str | None) -> DescribedModel:
    """A model that another engine will run, its weights left alone; `dtype` None: the type that its files hold.

    A packed GGUF file counts as float16. Raises ModelError: nothing there, pickled or broken files, no tokenizer.
    """
    source = sources.find(name)
    sources.weight_files(source)
    with translated(f"model {name!r}"):
        config, tokenizer = sources.config_of(source), sources.tokenizer_of(source)
        generation = None
        if source.holds("generation_config.json"):
            generation = GenerationConfig.from_pretrained(source.folder)
        return DescribedModel(
            tokenizer=tokenizer,
            record=_record(source, config, dtype),
            max_positions=sources.max_positions(config, source),
            end_token_ids=_end_token_ids(source, (generation, config.get_text_config(decoder=True), tokenizer)),
        )


def load(name: str, *, dtype: str, device: str, several_gpus: bool = True) -> LoadedModel:
    """Loads a directory, a GGUF file or a hub id on `device`, its float weights as `dtype`.

    On `cuda`, which names no GPU, a model too large for the first is spread over all; `several_gpus` False, meant for
    drafts, keeps it on the first.

    Raises: ModelError: nothing there, pickled or broken files, weights missing or not finite, no tokenizer, an
    architecture that transformers does not know, that cannot take tokens back or not be run in rows.
    OutOfMemoryError: the device is full.
    """
    check_dtype(dtype)
    source = sources.find(name)
    sources.weight_files(source)
    with translated(f"model {name!r}"):
        config = sources.config_of(source)
        _check_cache(name, config)
        tokenizer = sources.tokenizer_of(source)
        placement = _placement(source, dtype, device) if several_gpus else {}
        model = _without_padding(name, _load_weights(source, config, dtype, placement), tokenizer)
        if placement:
            _check_spread(model, name, dtype)
        else:
            model = model.to(device)
        _check_finite(model, source, dtype)
        batch_model.check_rows(model, name)
        record = Model(
            name=name,
            revision=source.revision,
            dtype=dtype,
            digest=sources.digest(source),
            num_params=sum(parameter.numel() for parameter in model.parameters()),
        )
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            record=record,
            max_positions=sources.max_positions(config, source),
            end_token_ids=_end_token_ids(
                source, (model.generation_config, model.config.get_text_config(decoder=True), tokenizer)
            ),
            note=_note(source, dtype, placement),
        )


def describe_head(name: str, *, dtype: str) -> Model:
    """A draft that is no model of its own, such as one that reads the target's hidden states. Raises ModelError."""
    source = sources.find(name)
    with translated(f"model {name!r}"):
        return _record(source, sources.config_of(source), dtype)


def _record(source: Source, config: PreTrainedConfig, dtype: str | None) -> Model:
    held = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if source.gguf is not None:
        held = {"F32": "float32", "BF16": "bfloat16"}.get(source.gguf.float_type, "float16")
    return Model(
        name=source.name,
        revision=source.revision,
        dtype=dtype or (held if held in DTYPES else "float32"),
        digest=sources.digest(source),
        num_params=sources.num_values(source),
    )


def check_pair(target: DescribedModel, draft: DescribedModel) -> None:
    """Refuses a draft that does not speak the target's tokens; equal maps with padded embeddings are fine.

    Raises: PairError: the token maps differ.
    """
    check_tokens(f"draft {draft.record.name!r} and target {target.record.name!r}", target.tokenizer, draft.tokenizer)


def check_tokens(pair: str, target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    """Refuses a draft's tokenizer that is not the target's; `pair` opens the message. Raises PairError."""
    ours, theirs = target.get_vocab(), draft.get_vocab()
    differing = sorted(
        (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, theirs.get(token)), token),
    )
    if differing:
        first = ", ".join(
            f"{token!r} ({theirs.get(token, 'absent')} and {ours.get(token, 'absent')})" for token in differing[:3]
        )
        raise PairError(
            f"{pair} have different token maps ({len(theirs)} and {len(ours)} tokens): {len(differing)} tokens differ, "
            f"first, with the ids in each: {first}; allowed are drafts with the target's tokenizer"
        )


def check_context(loaded: DescribedModel, *, context_length: int, max_length: int) -> None:
    """Refuses contexts in which a round of `max_length` drafted tokens could pass the model's last position.

    `context_length` is prompt plus new tokens. Raises: ModelError: names both and what is allowed.
    """
    check_positions(loaded.record.name, loaded.max_positions, context_length=context_length, max_length=max_length)


def check_positions(name: str, max_positions: int, *, context_length: int, max_length: int) -> None:
    """As `check_context`, for a model of which only name and number of positions are given."""
    most = max_positions
    model = f"model {name!r} has {most} positions"
    if context_length > most:
        raise ModelError(f"context {context_length}: {model}; allowed are contexts up to {most - max_length}")
    if context_length + max_length > most:
        shorter = f", or lengths up to {most - context_length} with that context" if context_length < most else ""
        raise ModelError(
            f"context {context_length} with speculation length {max_length}: {model}; allowed are contexts up to "
            f"{most - max_length} with that length{shorter}"
        )


def check_prompts(workload: Workload, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts that are too long for the workload's context. Raises InputError: the lengths."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + workload.max_new_tokens > workload.context_length:
        raise InputError(
            f"a prompt of {longest} tokens with {workload.max_new_tokens} new ones: "
            f"allowed are {workload.context_length} together, the workload's context"
        )


def early_exit(target: LoadedModel, num_layers: int) -> PreTrainedModel:
    """The target's first `num_layers` layers under its final norm and head: a model of its own that shares the weights.

    Only the modules on the way to the layers are copied, so the target is untouched and no weight is held twice; the
    config says `num_layers`, so that a cache made from it fits.

    Raises: PairError: not 1 to one less than all layers, or the layers of this architecture cannot be told.
    """
    text_config = target.model.config.get_text_config(decoder=True)
    whole = text_config.num_hidden_layers
    asked = f"early-exit:{num_layers} of target {target.record.name!r}"
    if not 1 <= num_layers < whole:
        allowed = f"1 to {whole - 1}" if whole > 1 else "none, it has 1 layer"
        raise PairError(f"{asked}: allowed are {allowed}")
    path = _path_to_layers(target.model, whole)
    if path is None:
        raise PairError(f"{asked}: {type(target.model).__name__} has no single list of {whole} layers to cut")
    copies: dict[int, Any] = {}  # a config shared by several modules stays shared between their copies
    exit_model = module = _twin(target.model, copies)
    *parents, last = path.split(".")
    for parent in parents:
        setattr(module, parent, _twin(getattr(module, parent), copies))
        module = getattr(module, parent)
    setattr(module, last, getattr(module, last)[:num_layers])
    own_config = exit_model.config.get_text_config(decoder=True)
    own_config.num_hidden_layers = num_layers
    if getattr(own_config, "layer_types", None):
        own_config.layer_types = own_config.layer_types[:num_layers]
    return exit_model


def _path_to_layers(model: PreTrainedModel, whole: int) -> str | None:
    """Where the decoder's layers hang; None unless exactly one outermost module list has `whole` entries."""
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == whole
    ]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return outer[0] if len(outer) == 1 else None


def _twin(module: Any, copies: dict[int, Any]) -> Any:
    """A module with its own table of submodules and its own config; the submodules themselves are shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    if hasattr(module, "config"):
        twin.config = copy.deepcopy(module.config, copies)
    if hasattr(module, "_hf_hook"):  # on several GPUs: what accelerate made of `forward` runs the module, not its twin
        del twin._hf_hook, twin._old_forward, twin.forward
        add_hook_to_module(twin, ModelHook())
        twin._hf_hook = module._hf_hook  # set afterwards: adding it would place the shared weights again
    return twin


def _check_cache(name: str, config: PreTrainedConfig) -> None:
    """Refuses layers whose memory of the text is a state that cannot take tokens back."""
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - _CACHED_LAYERS
    if kinds:
        raise ModelError(_NO_ROLLBACK.format(name=name, what=f"{min(kinds)} layers"))


def _placement(source: Source, dtype: str, device: str) -> dict[str, object]:
    """What `from_pretrained` is told of GPUs: nothing for a model that one device is to hold, else to spread it."""
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    if num_gpus < 2:
        return {}
    usable = {index: int(_FILLED * torch.cuda.mem_get_info(index)[0]) for index in range(num_gpus)}
    if getattr(torch, dtype).itemsize * sources.num_values(source) <= usable[0]:
        return {}
    return {"device_map": "auto", "max_memory": usable}


def _check_spread(model: PreTrainedModel, name: str, dtype: str) -> None:
    """Refuses a model of which a part is not on a GPU, or none on the first, where tokens go in and drafts are."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if 0 not in places or places & {"cpu", "disk"}:
        raise ModelError(
            f"model {name!r}: its {dtype} weights cannot be spread over {torch.cuda.device_count()} GPUs from the "
            f"first on, filling {_FILLED:.0%} of their free memory; take a smaller model or a 16-bit dtype"
        )


def _load_weights(
    source: Source, config: PreTrainedConfig, dtype: str, placement: dict[str, object]
) -> PreTrainedModel:
    """The model in evaluation mode, with fused attention where the architecture has it; never with made-up weights."""
    options = {
        "config": config,
        "dtype": getattr(torch, dtype),
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, by name
        **source.options,
        **placement,
    }
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar of dequantising cannot be turned off
        try:
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="sdpa", **options)
        except ValueError:  # what an architecture without it raises; any other fault is raised again below
            model, info = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager", **options)
    _check_complete(source, info)
    if model._is_stateful:  # what transformers' own assisted decoding asks
        raise ModelError(_NO_ROLLBACK.format(name=source.name, what=f"{type(model).__name__}'s layers"))
    if source.gguf is not None:
        gguf.scale_rotary(model, source.gguf)
    model.eval()
    model.requires_grad_(False)
    return model


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """Refuses a model of which transformers would have made up weights."""
    described = "the header" if source.gguf is not None else "its config.json"
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {source.name!r}: {len(missing)} weights are not in its files, first {missing[0]}; "
            f"{described} must describe the weights"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, held, wanted = mismatched[0]
        raise ModelError(
            f"model {source.name!r}: {len(mismatched)} weights are of another size than {described} says, first {name} "
            f"({list(held)} instead of {list(wanted)}); {described} must describe the weights"
        )


def _without_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Cuts embedding rows that no token names, so that target and draft laws have one width and emit only tokens."""
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    num_rows = model.get_input_embeddings().weight.shape[0]
    if num_rows < num_tokens:
        raise ModelError(f"model {name!r} embeds {num_rows} tokens; its tokenizer needs at least {num_tokens}")
    if num_rows > num_tokens:
        model.resize_token_embeddings(num_tokens)
        model.requires_grad_(False)
    return model


def _check_finite(model: PreTrainedModel, source: Source, dtype: str) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"model {source.name!r}: {name} holds NaN or infinity as {dtype}; finite is needed")


def _end_token_ids(source: Source, places: tuple[Any, ...]) -> tuple[int, ...]:
    """A GGUF file's end tokens, else the first that `places` name: generation config, config, tokenizer; else none.

    The configs of a GGUF are made by transformers, whose defaults name end tokens that the file does not have.
    """
    if source.gguf is not None:
        return source.gguf.end_token_ids
    for place in places:
        found = getattr(place, "eos_token_id", None)
        if found is not None:
            return tuple(sorted({found} if isinstance(found, int) else set(found)))
    return ()


def _note(source: Source, dtype: str, placement: dict[str, object]) -> str | None:
    notes = []
    if source.gguf is not None:
        notes.append(
            f"model {source.name!r}: a GGUF of {source.gguf.float_type} weights, dequantised and run as {dtype}; "
            "acceptance is that of its weights, speed and memory are not those of an engine that keeps them packed"
        )
    if placement:
        notes.append(
            f"model {source.name!r}: too large for one GPU, spread over {torch.cuda.device_count()}, which take turns"
        )
    return "; ".join(notes) or None
