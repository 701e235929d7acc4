"""How vLLM's engines are started and sample, and the device that they run on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from profiles.engines.vllm.flags import speculative_config
from profiles.hardware import fingerprint, nvml
from profiles.models import memory, sources
from profiles.records.core import Draft, Environment, Workload
from profiles.records.errors import ModelError, require

CONTEXT_STEP = 128  # contexts are rounded up to this, so that one engine serves several
MEMORY_SHARE, SPARE_BYTES = 0.9, 64 * 2**20
CAPTURED_ROWS = 512  # of the largest CUDA graph that vLLM captures by itself
LOOK_UP = Draft(kind="ngram", max_match=4, min_match=2)  # its engine serves every look-up: windows change in place
CPU = "cpu"
SET_HERE = {
    "async_scheduling", "disable_log_stats", "dtype", "enable_prefix_caching", "generation_config", "logprobs_mode",
    "max_model_len", "max_num_seqs", "model", "scheduler_cls", "seed", "speculative_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM is run: by `python`, else $DRAFTPICK_VLLM_PYTHON, else this one.

    Engines are started for `max_batch_size` requests in flight, `max_length` drafted tokens and contexts of at least
    `context_length` tokens; on a CPU `max_alive` of them are kept at a time, on a GPU one: each has the target's
    weights. `timeout_s`: the longest wait for an answer. `given`: further engine arguments of vLLM's, by name.
    `log_folder`: by default a temporary one, which is kept. `worker` replaces the worker script in tests.
    """

    python: str | None = None
    max_batch_size: int = 8
    max_length: int = 8
    context_length: int = 256
    max_alive: int = 4
    timeout_s: float = 1800.0
    given: Mapping[str, Any] = field(default_factory=dict)
    log_folder: Path | None = None
    worker: Path | None = None


def engine_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Engine arguments as vLLM names them, from `KEY=VALUE`. Raises InputError: another form, or one set elsewhere."""
    arguments: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.removeprefix("--").partition("=")
        name = key.strip().replace("-", "_")
        require(bool(name and equals and value), f"--engine-arg {text!r}: KEY=VALUE is allowed, as in dtype=auto")
        require(name not in SET_HERE, f"--engine-arg {text!r}: {key} is set by draftpick itself")
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineKey:
    """What one vLLM engine is started for: a model (by name) and a draft.

    `length`: the most drafted tokens a round, or exactly so many where the version cannot change it. `is_processed`:
    log-probabilities are those after temperature, top-k and top-p.
    """

    model: str
    draft: Draft | None = None
    length: int = 0
    is_processed: bool = False


def start_arguments(
    key: EngineKey, dtype: str, num_tokens: int, options: VllmOptions, *, on_cpu: bool
) -> dict[str, Any]:
    """Arguments of the worker's `start`, for `num_tokens` a sequence or as many as the models have positions.

    Raises ModelError: a model that vLLM does not read. InputError: a native draft's options.
    """
    draft_model = None if key.draft is None else key.draft.model
    models = [sources.find(key.model), *([] if draft_model is None else [sources.find(draft_model.name)])]
    longest = min(num_tokens, *(num_positions(source) for source in models))
    bytes_per_token = sum(memory.footprint(source, dtype).cache_bytes_per_token for source in models)
    speculative = None
    if key.draft is not None:
        speculative = speculative_config(key.draft, key.length)
        if draft_model is not None:  # the folder that is there: the worker is offline
            speculative = {**speculative, "model": str(models[1].folder)}
            speculative.pop("revision", None)
    arguments = {
        "model": str(models[0].folder),
        "dtype": dtype,
        "max_model_len": longest,
        "max_num_seqs": max(options.max_batch_size, key.length),  # vLLM's table of lengths ends there
        "seed": 0,
        "enforce_eager": on_cpu,
        "async_scheduling": False,  # a round's proposals and outputs would belong to different steps
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "generation_config": "vllm",
        "gpu_memory_utilization": MEMORY_SHARE / (options.max_alive if on_cpu else 1),
        "logprobs_mode": "processed_logprobs" if key.is_processed else "raw_logprobs",
    }
    if on_cpu:  # on a GPU vLLM takes what target and draft leave, as a server does
        cache_bytes = SPARE_BYTES + options.max_batch_size * (longest + CONTEXT_STEP) * bytes_per_token
        arguments["kv_cache_memory_bytes"] = cache_bytes
    if not on_cpu and (key.length + 1) * options.max_batch_size > CAPTURED_ROWS:  # beyond, rounds run without graphs
        arguments["max_cudagraph_capture_size"] = (key.length + 1) * options.max_batch_size
    if options.given.get("tensor_parallel_size", 1) == 1:
        arguments["distributed_executor_backend"] = "uni"
    if speculative is not None:
        arguments["per_request_spec_decode_metrics"] = "detailed"  # refused without speculation
    return {"options": arguments, "speculative": speculative, "given": dict(options.given)}


def num_positions(source: sources.Source) -> int:
    """The longest context in tokens. Raises ModelError: not a directory that vLLM reads."""
    if source.gguf is not None:
        raise ModelError(f"model {source.name!r}: a GGUF file; vLLM takes a directory with safetensors weights")
    with sources.library_errors(f"model {source.name!r}"):
        return sources.max_positions(sources.read_config(source), source)


def sampling_of(workload: Workload) -> dict[str, Any]:
    """vLLM's sampling parameters; end tokens stop an output only where the workload names them."""
    sampled = {"top_p": workload.top_p, "top_k": workload.top_k, "seed": workload.seed} if workload.temperature else {}
    return {
        "temperature": workload.temperature,
        "max_tokens": workload.max_new_tokens,
        "stop_token_ids": list(workload.end_token_ids),
        **sampled,
    }


def environment_of(about: Mapping[str, Any], gpus: Sequence[str]) -> Environment:
    """As `hardware.fingerprint`, of the device that a worker reports: its Python may know GPUs that this one does not.

    `about`: the answer to its command of that name; `gpus`: those to watch, none on a CPU.
    """
    here = fingerprint.fingerprint(CPU)
    if not gpus:
        return here
    driver = nvml.driver_version()  # this also starts NVML, which the handle needs
    bandwidth = nvml.memory_bandwidth(nvml.device_handle(gpus[0]))
    reported = {name: value for name, value in about.get("environment", {}).items() if value is not None}
    fields = {"device": about["kind"], "memory_bytes": 0, **reported}
    fields["memory_bytes"] = nvml.round_to_gib(fields["memory_bytes"])
    return replace(here, driver=driver, memory_bandwidth_bytes_s=bandwidth, **fields)
