"""What vLLM is told: arguments that an engine is started with, and how a workload samples.

Starts nothing.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles.models import memory, sources
from profiles.records.core import Model, Setup, Workload
from profiles.records.draft_spec import engine_options
from profiles.records.errors import ModelError

CONTEXT_STEP = 128  # contexts are rounded up to this, so that one engine serves several
MEMORY_SHARE, SPARE_BYTES = 0.9, 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM is run: by `python`, else $DRAFTPICK_VLLM_PYTHON, else this one.

    Engines are started for `max_batch_size` requests in flight, `max_length` drafted tokens and contexts of at least
    `context_length` tokens; `max_alive` of them are kept at a time. `timeout_s`: the longest that one answer may take.
    `log_folder`: by default a temporary one, which is kept. `worker` stands in for the worker in tests.
    """

    python: str | None = None
    max_batch_size: int = 8
    max_length: int = 8
    context_length: int = 256
    max_alive: int = 4
    timeout_s: float = 1800.0
    log_folder: Path | None = None
    worker: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What an engine is started for: the model served, and how it speculates.

    `length` is the most drafted tokens a round, exactly so many where the version cannot change it. `is_processed`: its
    log-probabilities are those after temperature, top-k and top-p.
    """

    served: str
    method: str | None = None
    draft: str | None = None
    length: int = 0
    is_processed: bool = False


def kind_of(setup: Setup, target: Model, most_length: int) -> Kind:
    """The engine that runs a setup; it may serve others too."""
    draft = setup.draft
    if draft is None:
        return Kind(served=target.name)
    method = {"model": "draft_model", "ngram": "ngram"}.get(draft.kind, draft.method)
    kind = Kind(served=target.name, method=method, length=most_length)
    return kind if draft.model is None else replace(kind, draft=draft.model.name)


def start_arguments(kind: Kind, dtype: str, num_tokens: int, options: VllmOptions, *, on_cpu: bool) -> dict[str, Any]:
    """Arguments of the worker's `start`, with room for `num_tokens` a sequence or as many as the models have positions.

    Raises ModelError: a model that vLLM does not read. InputError: a native draft's options.
    """
    found = [sources.find(name) for name in (kind.served, kind.draft) if name is not None]
    longest = min(num_tokens, *(num_positions(source) for source in found))
    bytes_per_token = sum(memory.footprint(source, dtype).cache_bytes_per_token for source in found)
    speculative = None if kind.method is None else _speculative(kind)
    arguments = {
        "model": str(found[0].folder),
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": options.max_batch_size,
        "seed": 0,
        "enforce_eager": on_cpu,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "gpu_memory_utilization": MEMORY_SHARE / options.max_alive,
        "kv_cache_memory_bytes": SPARE_BYTES + options.max_batch_size * (longest + CONTEXT_STEP) * bytes_per_token,
        "logprobs_mode": "processed_logprobs" if kind.is_processed else "raw_logprobs",
    }
    if speculative is not None:
        arguments["per_request_spec_decode_metrics"] = "detailed"  # refused without speculation
    return {"options": arguments, "speculative": speculative}


def _speculative(kind: Kind) -> dict[str, Any]:
    assert kind.method is not None
    name, extras = engine_options(kind.method)
    config: dict[str, Any] = {**extras, "method": name, "num_speculative_tokens": kind.length}
    return config if kind.draft is None else config | {"model": str(sources.find(kind.draft).folder)}


def num_positions(source: sources.Source) -> int:
    """The longest context in tokens. Raises ModelError: not a directory that vLLM reads."""
    if source.gguf is not None:
        raise ModelError(f"model {source.name!r}: a GGUF file; vLLM takes a directory with safetensors weights")
    with sources.library_errors(f"model {source.name!r}"):
        return sources.max_positions(sources.read_config(source), source)


def sampling_of(workload: Workload) -> dict[str, Any]:
    """vLLM's sampling parameters; end-of-text tokens stop an output only where the workload names them."""
    law = {"top_p": workload.top_p, "top_k": workload.top_k, "seed": workload.seed} if workload.temperature else {}
    return {
        "temperature": workload.temperature,
        "max_tokens": workload.max_new_tokens,
        "stop_token_ids": list(workload.end_token_ids),
        **law,
    }
