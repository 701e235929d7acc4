"""Loads target and draft, says who they are, and refuses what cannot be used, with the reason.

Weights are read from safetensors only and loaded without a word on stderr. Whatever the libraries underneath raise
becomes one `ModelError` here. This module runs no model and knows nothing of drafts' rounds.
"""

import contextlib
import copy
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from profiles.environment import free_bytes
from profiles.errors import ModelError, OutOfMemoryError, PairError
from profiles.terms import DTYPES, Model, digest_of

_GIB = 2**30
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.*")
FAMILY_FOLDER = Path(__file__).parent / "family"
_BUILTIN = "builtin:"
_HUB_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", *_TOKENIZER_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model ready to run, in evaluation mode and without gradients; `max_positions` bounds its context in tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    record: Model
    max_positions: int
    end_token_ids: tuple[int, ...]


def load(name: str, *, dtype: str, device: str, trust_remote_code: bool = False) -> Loaded:
    """Loads a directory or a hub id on `device`, its float weights as `dtype`.

    Raises: ModelError: nothing there, pickled or broken files, weights missing or not finite, no tokenizer, an
    architecture that transformers does not know. OutOfMemoryError: the device is full.
    """
    _check_dtype(dtype)
    source = _find(name, trust_remote_code)
    files = _weight_files(source)
    with _translated(f"model {name!r}"):
        config = _config(source)
        tokenizer = _load_tokenizer(source)
        model = _without_padding(name, _load_weights(source, config, dtype), tokenizer).to(device)
        _check_finite(model, source, dtype)
        record = Model(
            name=name,
            revision=source.revision,
            dtype=dtype,
            digest=_digest([*files, source.folder / "config.json"]),
            num_params=sum(parameter.numel() for parameter in model.parameters()),
        )
        return Loaded(
            model=model,
            tokenizer=tokenizer,
            record=record,
            max_positions=_max_positions(config, source),
            end_token_ids=_end_token_ids(model, tokenizer),
        )


def check_pair(target: Loaded, draft: Loaded) -> None:
    """Refuses a draft that does not speak the target's tokens; equal maps with padded embeddings are fine.

    Raises: PairError: the token maps differ.
    """
    pair = f"draft {draft.record.name!r} and target {target.record.name!r}"
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
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


def check_room(loaded: Loaded, *, context_length: int, max_length: int) -> None:
    """Refuses contexts in which a round of `max_length` drafted tokens could pass the model's last position.

    `context_length` is prompt plus new tokens. Raises: ModelError: names both and what is allowed.
    """
    most = loaded.max_positions
    model = f"model {loaded.record.name!r} has {most} positions"
    if context_length > most:
        raise ModelError(f"context {context_length}: {model}; allowed are contexts up to {most - max_length}")
    if context_length + max_length > most:
        shorter = f", or lengths up to {most - context_length} with that context" if context_length < most else ""
        raise ModelError(
            f"context {context_length} with speculation length {max_length}: {model}; allowed are contexts up to "
            f"{most - max_length} with that length{shorter}"
        )


def check_memory(
    names: Sequence[str], *, dtype: str, device: str, num_tokens: int, num_free_bytes: int | None = None
) -> None:
    """Refuses, before any weight is loaded, models that do not fit on `device` together with their caches.

    Counts the tensors of the weight files as `dtype` and a key/value cache of `num_tokens` (batch times context) for
    each model: what is needed at least, because activations come on top. `num_free_bytes` None asks the device.

    Raises: ModelError: needed and free memory in GiB, or a model that cannot be read.
    """
    _check_dtype(dtype)
    num_weights = num_cached = 0
    for name in names:
        source = _find(name, trust_remote_code=False)
        with _translated(f"model {name!r}"):
            num_weights += sum(map(_num_values, _weight_files(source)))
            num_cached += num_tokens * _cached_values_per_token(_config(source))
    size = getattr(torch, dtype).itemsize
    weights, cache = num_weights * size, num_cached * size
    free = free_bytes(device) if num_free_bytes is None else num_free_bytes
    if weights + cache > free:
        needed = f"{weights / _GIB:.3g} GiB of {dtype} weights and {cache / _GIB:.3g} GiB of cache"
        raise ModelError(
            f"models {', '.join(names)}: {needed} for {num_tokens} tokens; {device} has {free / _GIB:.3g} GiB free; "
            "take a smaller model, batch or context, or a 16-bit dtype"
        )


def early_exit(target: Loaded, num_layers: int) -> PreTrainedModel:
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
    return twin


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where the files of a model are; `revision` is a hub id's commit."""

    name: str
    folder: Path
    revision: str | None
    trust_remote_code: bool

    def holds(self, *patterns: str) -> list[str]:
        """Names of its files that fit one of the patterns."""
        return sorted({path.name for pattern in patterns for path in self.folder.glob(pattern)})


def _find(name: str, trust_remote_code: bool) -> _Source:
    """The directory itself, or the snapshot of a hub id, fetched when it is not cached."""
    path = Path(name)
    if name.startswith(_BUILTIN):
        path = FAMILY_FOLDER / name.removeprefix(_BUILTIN)
        known = sorted(f"{_BUILTIN}{config.parent.name}" for config in FAMILY_FOLDER.glob("*/config.json"))
        if f"{_BUILTIN}{path.name}" not in known:
            raise ModelError(f"model {name!r}: not one that ships; allowed are {', '.join(known) or 'none'}")
    if path.is_dir():
        return _Source(name=name, folder=path, revision=None, trust_remote_code=trust_remote_code)
    allowed = "allowed are a model directory and a hub id like owner/name"
    if path.exists():
        raise ModelError(f"model {name!r}: a file; {allowed}")
    if path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"model {name!r}: no such directory; {allowed}")
    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else list(_HUB_FILES)
    with _translated(f"model {name!r}: no such directory, and not to be had as a hub id"):
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    return _Source(name=name, folder=path, revision=path.name, trust_remote_code=trust_remote_code)


def _weight_files(source: _Source) -> list[Path]:
    """The files transformers will load: one, or the shards its index lists."""
    if source.holds(_WEIGHTS):
        return [source.folder / _WEIGHTS]
    if not source.holds(_INDEX):
        pickled = ", ".join(source.holds(*_PICKLED)[:3])
        found = f"; pickled weights ({pickled}) can run code and are refused" if pickled else ""
        raise ModelError(f"model {source.name!r}: no {_WEIGHTS} or {_INDEX} in it{found}; convert it to safetensors")
    with _translated(f"model {source.name!r}: {_INDEX}"):
        index = json.loads((source.folder / _INDEX).read_text(encoding="utf-8"))
        shards = [source.folder / shard for shard in sorted(set(index["weight_map"].values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        count = f"{len(missing)} of {len(shards)} weight files are missing"
        raise ModelError(f"model {source.name!r}: {count}, first {missing[0]}; fetch it again")
    return shards


def _config(source: _Source) -> PreTrainedConfig:
    if not source.holds("config.json"):
        raise ModelError(f"model {source.name!r}: no config.json in it; a transformers model directory is needed")
    return AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)


def _load_tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    # Without files some tokenizer classes load as an empty map instead of failing.
    if not source.holds(*_TOKENIZER_FILES):
        raise ModelError(f"model {source.name!r}: no tokenizer in it; one of {', '.join(_TOKENIZER_FILES)} is needed")
    return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)


def _load_weights(source: _Source, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """The model in evaluation mode, with fused attention where the architecture has it; never with made-up weights."""
    options = {
        "config": config,
        "dtype": getattr(torch, dtype),
        "use_safetensors": True,
        "output_loading_info": True,
        "trust_remote_code": source.trust_remote_code,
    }
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="sdpa", **options)
    except ValueError:  # what an architecture without it raises; any other fault is raised again below
        model, info = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager", **options)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {source.name!r}: {len(missing)} weights are not in its files, first {missing[0]}; "
            "its config.json must describe the weights beside it"
        )
    model.eval()
    model.requires_grad_(False)
    return model


def _without_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Cuts embedding rows that no token names, so that target and draft laws have one width and emit only tokens."""
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < num_tokens:
        raise ModelError(f"model {name!r} embeds {rows} tokens; its tokenizer needs at least {num_tokens}")
    if rows > num_tokens:
        model.resize_token_embeddings(num_tokens)
        model.requires_grad_(False)
    return model


def _check_finite(model: PreTrainedModel, source: _Source, dtype: str) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"model {source.name!r}: {name} holds NaN or infinity as {dtype}; finite is needed")


def _digest(files: Sequence[Path]) -> str:
    """Identity of the files' names and contents."""
    contents = []
    for path in files:
        with path.open("rb") as file:
            contents.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest_of(contents)


def _max_positions(config: PreTrainedConfig, source: _Source) -> int:
    text_config = config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(
        f"model {source.name!r}: its config.json states no max_position_embeddings; add the longest context"
    )


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The generation config's end tokens, else the config's, else the tokenizer's; empty where none names any."""
    for source in (model.generation_config, model.config.get_text_config(decoder=True), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(sorted({found} if isinstance(found, int) else set(found)))
    return ()


def _num_values(file: Path) -> int:
    """Values in all tensors of a weight file, from its header alone."""
    with safetensors.safe_open(file, framework="pt") as weights:
        return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118 -- not a dict


def _cached_values_per_token(config: PreTrainedConfig) -> int:
    """Keys and values a token leaves in the cache of all layers."""
    text_config = config.get_text_config(decoder=True)
    num_heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    num_kept = getattr(text_config, "num_key_value_heads", None) or num_heads
    return int(2 * text_config.num_hidden_layers * num_kept * head_dim)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Runs the libraries without a word on stderr and turns what they raise into one line that starts with `what`."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = transformers_logging.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers_logging.disable_progress_bar()
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    except ModelError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"{what}: memory ran out while it was loaded") from error
    except Exception as error:  # tokenizers, safetensors and huggingface_hub derive theirs from Exception itself
        detail = " ".join(str(error).split())
        raise ModelError(f"{what}: {type(error).__name__}: {detail[:300]}") from error
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
