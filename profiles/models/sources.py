"""Finds the files of a model (a directory, a GGUF file, a hub id, what ships) and reads what they say cheaply.

Config, tokenizer, the number of values and the digest; weights are read elsewhere. Whatever the libraries underneath
raise becomes one `ModelError` here. Knows nothing of devices.
"""

import contextlib
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from profiles.builtin import BUILTIN, BUILTIN_FOLDER
from profiles.models import gguf as gguf_file
from profiles.models.gguf import GgufFile
from profiles.records.core import digest_of
from profiles.records.errors import ModelError, OutOfMemoryError

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.*")
_HUB_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", *_TOKENIZER_FILES)
_ALLOWED = "allowed are a model directory, a .gguf file and a hub id like owner/name"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the files of a model are; `revision` is a hub id's commit, `gguf` the header of a GGUF file."""

    name: str
    folder: Path
    revision: str | None = None
    gguf: GgufFile | None = None
    trust_remote_code: bool = False

    def holds(self, *patterns: str) -> list[str]:
        """Names of its files that fit one of the patterns."""
        return sorted({path.name for pattern in patterns for path in self.folder.glob(pattern)})

    @property
    def options(self) -> dict[str, object]:
        """What `from_pretrained` must be told beside the folder."""
        found: dict[str, object] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf is not None:
            found["gguf_file"] = self.gguf.path.name
        return found


def find(name: str, *, trust_remote_code: bool = False) -> Source:
    """The directory or file itself, or the snapshot of a hub id, fetched when it is not cached.

    A directory without safetensors weights but with one GGUF file is that file. Raises ModelError.
    """
    if not name.strip():
        raise ModelError(f"model {name!r}: {_ALLOWED}")  # as a path it would be the working directory
    path = Path(name)
    if name.startswith(BUILTIN):
        path = BUILTIN_FOLDER / name.removeprefix(BUILTIN)
        known = sorted(f"{BUILTIN}{config.parent.name}" for config in BUILTIN_FOLDER.glob("*/config.json"))
        if f"{BUILTIN}{path.name}" not in known:
            raise ModelError(f"model {name!r}: not one that ships; allowed are {', '.join(known) or 'none'}")
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf_source(name, path)
    if path.is_dir():
        source = Source(name=name, folder=path, trust_remote_code=trust_remote_code)
        packed = source.holds("*.gguf")
        if not packed or source.holds(_WEIGHTS, _INDEX):
            return source
        if len(packed) > 1:
            raise ModelError(f"model {name!r}: {len(packed)} GGUF files in it, first {packed[0]}; name the one to use")
        return _gguf_source(name, path / packed[0])
    if path.exists():
        raise ModelError(f"model {name!r}: a file; {_ALLOWED}")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() == ".gguf":
        raise ModelError(f"model {name!r}: no such directory or file; {_ALLOWED}")
    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else list(_HUB_FILES)
    with translated(f"model {name!r}: no such directory, and not to be had as a hub id"):
        path = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    return Source(name=name, folder=path, revision=path.name, trust_remote_code=trust_remote_code)


def _gguf_source(name: str, path: Path) -> Source:
    with translated(f"model {name!r}: not a whole GGUF file"):
        return Source(name=name, folder=path.parent, gguf=gguf_file.read(path, name))


def weight_files(source: Source) -> list[Path]:
    """The files transformers will load: one, or the shards its index lists. Raises ModelError."""
    if source.gguf is not None:
        return [source.gguf.path]
    if source.holds(_WEIGHTS):
        return [source.folder / _WEIGHTS]
    if not source.holds(_INDEX):
        pickled = ", ".join(source.holds(*_PICKLED)[:3])
        found = f"; pickled weights ({pickled}) can run code and are refused" if pickled else ""
        needed = f"no {_WEIGHTS} or {_INDEX} in it{found}; convert it to safetensors, or name a .gguf file"
        raise ModelError(f"model {source.name!r}: {needed}")
    with translated(f"model {source.name!r}: {_INDEX}"):
        index = json.loads((source.folder / _INDEX).read_text(encoding="utf-8"))
        shards = [source.folder / shard for shard in sorted(set(index["weight_map"].values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        count = f"{len(missing)} of {len(shards)} weight files are missing"
        raise ModelError(f"model {source.name!r}: {count}, first {missing[0]}; fetch it again")
    return shards


def config_of(source: Source) -> PreTrainedConfig:
    """The transformers config. Raises ModelError where there is none; library errors pass, see `translated`."""
    if source.gguf is not None:
        return gguf_file.config_of(source.gguf)
    if not source.holds("config.json"):
        raise ModelError(f"model {source.name!r}: no config.json in it; a transformers model directory is needed")
    return AutoConfig.from_pretrained(source.folder, **source.options)


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises ModelError where there is none; library errors pass, see `translated`."""
    if source.gguf is not None:
        return gguf_file.tokenizer_of(source.gguf)
    # Without files some tokenizer classes load as an empty map instead of failing.
    if not source.holds(*_TOKENIZER_FILES):
        raise ModelError(f"model {source.name!r}: no tokenizer in it; one of {', '.join(_TOKENIZER_FILES)} is needed")
    return AutoTokenizer.from_pretrained(source.folder, **source.options)


def max_positions(config: PreTrainedConfig, source: Source) -> int:
    """The longest context in tokens. Raises ModelError where none is stated."""
    if source.gguf is not None:
        return source.gguf.context_length
    text_config = config.get_text_config(decoder=True)
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text_config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(
        f"model {source.name!r}: its config.json states no max_position_embeddings; add the longest context"
    )


def num_values(source: Source) -> int:
    """Values in all tensors of the weight files, from their headers alone."""
    if source.gguf is not None:
        return source.gguf.num_values
    return sum(map(_values_in, weight_files(source)))


def _values_in(file: Path) -> int:
    with safetensors.safe_open(file, framework="pt") as weights:
        return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118 -- not a dict


def digest(source: Source) -> str:
    """Identity of the names and contents of weights and config."""
    files = weight_files(source)
    return _digest_files(files if source.gguf is not None else [*files, source.folder / "config.json"])


def _digest_files(files: Sequence[Path]) -> str:
    contents = []
    for path in files:
        with path.open("rb") as file:
            contents.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest_of(contents)


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
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
