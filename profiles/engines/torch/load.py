"""Loads a target and its drafts into a torch engine."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from profiles.engines.bench import Bench
from profiles.engines.torch.engine import TorchEngine
from profiles.hardware import fingerprint
from profiles.models import loader, memory
from profiles.models.early_exit import early_exit
from profiles.models.footprint import Footprint
from profiles.models.memory import cached_values_per_token
from profiles.models.sources import find
from profiles.records.core import Draft
from profiles.records.draft_spec import DraftSpec, RefusedDraft
from profiles.records.errors import InputError, ModelError, OutOfMemoryError


def load(target: str, specs: Sequence[DraftSpec], dtype: str | None, device: str | None, num_tokens: int = 0) -> Bench:
    """The engine over a target and its drafts; drafts that cannot be used are skipped and reported with a reason.

    Args:
        dtype: None is float32 on a CPU and bfloat16 on a GPU.
        num_tokens: Cached tokens that must fit in memory beside the weights.

    Raises:
        InputError: An unknown device or dtype.
        ModelError: The target cannot be loaded or does not fit in memory, or no draft can be used.
    """
    if dtype is not None:
        memory.check_dtype(dtype)
    device_name = fingerprint.pick_device(device)
    chosen = dtype or ("float32" if device_name == "cpu" else "bfloat16")
    fingerprint.limit_threads()
    memory.check_memory(target, dtype=chosen, device=device_name, num_tokens=num_tokens)
    by_name = {target: loader.load(target, dtype=chosen, device=device_name)}
    drafts: dict[str, tuple[Draft, PreTrainedModel | None]] = {}  # by digest
    errors: dict[str, ModelError | OutOfMemoryError] = {}
    for spec in specs:
        if spec.kind == "composite" and spec.path in errors:
            continue  # its model is refused already
        if spec.method is not None:
            raise InputError(f"draft {spec.name!r}: only a serving engine has it; --engine says which")
        try:
            if spec.path is not None and spec.path not in by_name:
                memory.check_memory(spec.path, dtype=chosen, device=device_name, num_tokens=num_tokens)
                loaded = loader.load(spec.path, dtype=chosen, device=device_name, num_tokens=by_name[target].num_tokens)
                loader.check_pair(by_name[target], loaded)
                by_name[spec.path] = loaded
            if spec.path is not None:
                draft, model = spec.draft(by_name[spec.path].record), by_name[spec.path].model
            else:
                draft = spec.draft(None)
                model = None if spec.num_layers is None else early_exit(by_name[target], spec.num_layers)
            drafts.setdefault(draft.digest, (draft, model))
        except (ModelError, OutOfMemoryError) as error:
            errors[spec.name] = error
    if errors and not drafts:
        raise next(iter(errors.values()))
    refused = [RefusedDraft.from_error(name, error) for name, error in errors.items()]
    prints: dict[Draft | None, Footprint] = {None: memory.footprint(find(target), chosen)}
    prints |= {draft: _footprint(draft, model, by_name[target]) for draft, model in drafts.values()}
    return Bench(
        engine=TorchEngine(by_name[target], dict(drafts.values()), device_name),
        loaded=tuple(by_name.values()),
        footprints=prints,
        refused=tuple(refused),
    )


def _footprint(draft: Draft, model: PreTrainedModel | None, target: loader.LoadedModel) -> Footprint:
    """What a draft adds: an early exit has the target's weights, a look-up next to nothing."""
    if model is None:
        return Footprint(weight_bytes=0, cache_bytes_per_token=0)
    size = getattr(torch, target.record.dtype).itemsize
    shares_weights = not draft.has_weights or model is target.model
    num_weights = 0 if shares_weights else sum(parameter.numel() for parameter in model.parameters())
    return Footprint(
        weight_bytes=size * num_weights, cache_bytes_per_token=size * cached_values_per_token(model.config)
    )
