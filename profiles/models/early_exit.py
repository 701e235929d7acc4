"""An early-exit draft: the target's first layers under its final norm and head, with shared weights."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from profiles.models.loader import LoadedModel
from profiles.records.errors import PairError


def early_exit(target: LoadedModel, num_layers: int) -> PreTrainedModel:
    """The target cut after `num_layers` layers.

    Only the modules on the way to the layers are copied: the target stays as it is and no weight is held twice. The
    config states `num_layers`, so that a cache made from it fits. Raises PairError: not 1 to one less than all layers,
    or the architecture has no single list of layers.
    """
    num_all = target.model.config.get_text_config(decoder=True).num_hidden_layers
    draft = f"early-exit:{num_layers} of target {target.record.name!r}"
    if not 1 <= num_layers < num_all:
        allowed = f"1 to {num_all - 1}" if num_all > 1 else "none, it has 1 layer"
        raise PairError(f"{draft}: allowed are {allowed}")
    path = _path_to_layers(target.model, num_all)
    if path is None:
        raise PairError(f"{draft}: {type(target.model).__name__} has no single list of {num_all} layers to cut")
    configs: dict[int, Any] = {}  # modules that share a config share its copy
    exit_model = module = _shallow_copy(target.model, configs)
    *parents, last = path.split(".")
    for parent in parents:
        setattr(module, parent, _shallow_copy(getattr(module, parent), configs))
        module = getattr(module, parent)
    setattr(module, last, getattr(module, last)[:num_layers])
    text_config = exit_model.config.get_text_config(decoder=True)
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:num_layers]
    return exit_model


def _path_to_layers(model: PreTrainedModel, num_layers: int) -> str | None:
    """Path of the decoder's layers; None unless exactly one outermost module list has `num_layers` entries."""
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    ]
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    return outer[0] if len(outer) == 1 else None


def _shallow_copy(module: Any, configs: dict[int, Any]) -> Any:
    """A module with its own table of submodules and its own config; the submodules are shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    if hasattr(module, "config"):
        twin.config = copy.deepcopy(module.config, configs)
    return twin
