"""Finds a model's files (directory, GGUF file, hub id or built-in name) and reads everything but the weights.

Errors of the libraries underneath become one-line `ModelError`s.
"""

import contextlib
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from profiles.builtin import BUILTIN, BUILTIN_FOLDER
from profiles.models import gguf as gguf_file
from profiles.models.gguf import GgufFile
from profiles.records.core import digest_of
from profiles.records.errors import ModelError, OutOfMemoryError
from profiles.records.files import absolute_name

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.*")
_HUB_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", *_TOKENIZER_FILES)
_LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins
NO_ROLLBACK = "{layers} keep a running state, which cannot take tokens back"
_ADAPTER = (
    "has a LoRA adapter (adapter_config.json), which engines do not load or load alone; merge it into its base model "
    "and name that folder, or move the file away"
)
_ALLOWED = "allowed are a model directory, a .gguf file and a hub id like owner/name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model's files are."""

    name: str
    folder: Path
    revision: str | None = None  # commit of a hub id
    gguf: GgufFile | None = None  # header of a GGUF file

    def error(self, fault: str) -> ModelError:
        """The error that names the model and its fault."""
        return ModelError(f"model {self.name!r}: {fault}")

    def files(self, *patterns: str) -> list[str]:
        """Sorted names of the files that match one of the patterns."""
        return sorted({path.name for pattern in patterns for path in self.folder.glob(pattern)})


def find(name: str) -> Source:
    """The directory, file or built-in model of that name, or the snapshot of a hub id, downloaded if not cached.

    A directory that holds one GGUF file and no safetensors weights is that file. Raises ModelError.
    """
    if not name.strip():
        raise ModelError(f"model {name!r}: {_ALLOWED}")  # as a path it would be the working directory
    name = absolute_name(name)
    path = Path(name)
    if name.startswith(BUILTIN):
        path = BUILTIN_FOLDER / name.removeprefix(BUILTIN)
        names = sorted(f"{BUILTIN}{config.parent.name}" for config in BUILTIN_FOLDER.glob("*/config.json"))
        if f"{BUILTIN}{path.name}" not in names:
            allowed = ", ".join(names) or "none, they come with a source checkout, not with the installed package"
            raise ModelError(f"model {name!r}: not a built-in model; allowed are {allowed}")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf_source(name, path)
    if path.is_dir():
        source = Source(name=name, folder=path)
        gguf_names = source.files("*.gguf")
        if not gguf_names or source.files(_WEIGHTS, _INDEX):
            return source
        if len(gguf_names) > 1:
            raise source.error(f"has {len(gguf_names)} GGUF files, first {gguf_names[0]}; name one")
        return _gguf_source(name, path / gguf_names[0])
    if path.exists():
        raise ModelError(f"model {name!r}: a file; {_ALLOWED}")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() == ".gguf":
        raise ModelError(f"model {name!r}: no such directory or file; {_ALLOWED}")
    with library_errors(f"model {name!r}: no such directory or file, and it cannot be downloaded as a hub id"):
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    return Source(name=name, folder=path, revision=path.name)


def _gguf_source(name: str, path: Path) -> Source:
    with library_errors(f"model {name!r}: not a whole GGUF file"):
        return Source(name=name, folder=path.parent, gguf=gguf_file.read(path, name))


def weight_files(source: Source) -> list[Path]:
    """The weight files that engines load: one, or the shards of the index. Raises ModelError."""
    if source.gguf is not None:
        return [source.gguf.path]
    shards = _indexed_files(source)
    if source.files("adapter_config.json"):
        raise source.error(_ADAPTER)
    if source.files(_WEIGHTS):
        if shards and source.folder / _WEIGHTS not in shards:
            raise source.error(
                f"has {_WEIGHTS} and an index of other files: engines load either; remove the stale ones"
            )
        shards = [source.folder / _WEIGHTS]
    if not shards:
        others = source.files("*.safetensors", *_PICKLED)[:3]
        beside = f", but {', '.join(others)}: pickled weights can run code and are refused" if others else ""
        raise source.error(f"has no {_WEIGHTS} or {_INDEX}{beside}; convert it to safetensors, or name a .gguf file")
    if missing := [shard.name for shard in shards if not shard.exists()]:
        number = f"{len(missing)} of {len(shards)}"
        raise source.error(f"{number} weight files are missing, first {missing[0]}; download it again")
    for shard in shards:
        _check_file(source, shard)
    return shards


def _indexed_files(source: Source) -> list[Path]:
    """The files of the index, none without one. Raises ModelError."""
    if not source.files(_INDEX):
        return []
    weight_map = _check_file(source, source.folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise source.error(f"{_INDEX} has no weight_map of file names; download it again")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise source.error(f"{_INDEX} names {name!r}; allowed are .safetensors files beside it")
    return [source.folder / name for name in names]


def _check_file(source: Source, path: Path) -> dict[str, Any]:
    """The object in a JSON file, of other files an empty one.

    Raises ModelError: it cannot be read, is no JSON object, or was not downloaded.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
            raw = json.loads((start + file.read()).decode()) if path.suffix == ".json" and start != _LFS else {}
    except ValueError as error:
        raise source.error(f"{path.name} is not JSON ({error}); download it again") from error
    except OSError as error:
        raise source.error(f"{path.name} cannot be read: {error.strerror or error}") from error
    if start == _LFS:
        raise source.error(f"{path.name} is a Git LFS pointer, not the file; run `git lfs pull` in its folder")
    if not isinstance(raw, dict):
        raise source.error(f"{path.name} holds no JSON object; download it again")
    return raw


def read_config(source: Source) -> PreTrainedConfig:
    """The transformers config. Raises ModelError where there is none; call it within `library_errors`."""
    if source.gguf is not None:
        return gguf_file.read_config(source.gguf)
    if not source.files("config.json"):
        is_adapter = source.files("adapter_config.json")
        raise source.error(_ADAPTER if is_adapter else "has no config.json; name a transformers model")
    files = ("config.json", *source.files("generation_config.json"))
    raw, *_ = [_check_file(source, source.folder / file) for file in files]
    if raw.get("model_type") not in CONFIG_MAPPING and (raw.get("model_type") is not None or raw.get("auto_map")):
        code = "; its own code (auto_map) is not run" if raw.get("auto_map") else ""
        unknown = f"its model_type {raw.get('model_type')!r} is unknown to transformers {transformers.__version__}"
        raise source.error(f"{unknown}{code}")
    with library_errors(f"model {source.name!r}: its config.json"):
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises ModelError where there is none; call it within `library_errors`."""
    if source.gguf is not None:
        return gguf_file.read_tokenizer(source.gguf)
    names = source.files(*_TOKENIZER_FILES)
    if not names:  # some tokenizer classes load as an empty map instead of failing
        raise source.error(f"has no tokenizer; one of {', '.join(_TOKENIZER_FILES)} is needed")
    for name in {*names, *source.files("tokenizer_config.json", "special_tokens_map.json", "*.jinja")}:
        _check_file(source, source.folder / name)
    with library_errors(f"model {source.name!r}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    if not tokenizer.encode("The 1st text.", add_special_tokens=False):
        raise source.error("its tokenizer makes no tokens of a text; download it again")
    return tokenizer


def max_positions(config: PreTrainedConfig, source: Source) -> int:
    """The longest context in tokens. Raises ModelError where the config states none."""
    if source.gguf is not None:
        return source.gguf.context_length
    text_config = config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    raise source.error("its config.json states no max_position_embeddings; add it")


def num_values(source: Source) -> int:
    """Number of values in all tensors of the weight files, from their headers."""
    if source.gguf is not None:
        return source.gguf.num_values
    return sum(math.prod(shape) for _, shape, _ in tensors(source))


def tensors(source: Source) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and type (`F32`) of every tensor in safetensors files. Raises ModelError."""
    for path in weight_files(source):
        whole = library_errors(f"model {source.name!r}: {path.name} is not a whole safetensors file, download it again")
        with whole, safetensors.safe_open(path, framework="pt") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118 -- not a dict
            rows = [(key, values.get_shape(), values.get_dtype()) for key, values in slices.items()]
        yield from rows


def digest(source: Source) -> str:
    """Identity of the names and contents of weights and config."""
    files = weight_files(source)
    if source.gguf is None:
        files = [*files, source.folder / "config.json"]
    contents = []
    for path in files:
        with path.open("rb") as file:
            contents.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest_of(contents)


@contextlib.contextmanager
def library_errors(prefix: str) -> Iterator[None]:
    """Silences the libraries' logs and bars, and turns what they raise into one line that starts with `prefix`."""
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
        raise OutOfMemoryError(f"{prefix}: out of memory while loading") from error
    except Exception as error:  # tokenizers, safetensors and huggingface_hub derive theirs from Exception itself
        raise ModelError(f"{prefix}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        if had_bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
