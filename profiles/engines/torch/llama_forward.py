"""A leaner forward for Llama's layers on transformers' weights: the same sums in fewer operations.

transformers' classes spend most of a small model's step on the host; here projections that share an input are one
product, and masks and rotations are made once a step. Weights are not copied: the model's own parameters become views
of the joined ones. `fits` says which models it can run; `batch_model.check_rows` checks it against their own forward.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

from profiles.engines.torch.attention import attend, per_group
from profiles.engines.torch.kv_cache import RowCache, added_mask

_FIXED_ROTATIONS = {"default", "linear", "llama3"}  # the others change their angles with the length of the text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """One layer's matrices; queries, keys and values in one, gate and up in one."""

    norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


_JOINED: WeakKeyDictionary[torch.nn.Module, _Weights] = WeakKeyDictionary()


def fits(model: PreTrainedModel) -> bool:
    """Whether this forward computes what the model's own does: plain Llama, no biases, fixed rotations."""
    if type(model) is not LlamaForCausalLM:
        return False
    config = model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        not config.attention_bias
        and not config.mlp_bias
        and config.hidden_act == "silu"
        and rotation in _FIXED_ROTATIONS
        and all(type(module) is torch.nn.Linear for module in (model.lm_head, model.model.layers[0].mlp.down_proj))
    )


class LlamaForward:
    """Logits (B, keep, V) of the last `keep` tokens of every row."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        layers: Any = model
        config = model.config
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_size = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._eps = config.rms_norm_eps
        self._embedding, self._head = layers.model.embed_tokens.weight, layers.lm_head.weight
        self._norm = layers.model.norm.weight
        self._layers = [_joined(layer) for layer in layers.model.layers]
        rotary = layers.model.rotary_emb
        angles = torch.outer(torch.arange(capacity + 1, device=model.device).float(), rotary.inv_freq.float())
        cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
        # rotating half of a head is rolling it by half, with the sign of the first half turned
        self._cos = torch.cat([cos, cos], -1)[:, None].to(model.dtype)
        self._sin = torch.cat([-sin, sin], -1)[:, None].to(model.dtype)

    def __call__(self, tokens: torch.Tensor, cache: RowCache, keep: int) -> torch.Tensor:
        """`tokens` (B, width) at the positions set in the cache."""
        rows, width = tokens.shape
        cos, sin = self._cos[cache.query_positions], self._sin[cache.query_positions]
        is_causal = cache.is_prompt and tokens.is_cuda  # a mask of a long prompt takes gigabytes
        mask = None
        if cache.needs_mask and not is_causal:
            # added to scores, as attention kernels would turn a boolean mask into that in every layer
            mask = per_group(added_mask(cache.mask(), self._cos.dtype), self._heads // self._key_heads)
        hidden = functional.embedding(tokens, self._embedding)
        size = hidden.shape[-1:]
        for number, layer in enumerate(self._layers):
            normed = functional.rms_norm(hidden, size, layer.norm, self._eps)
            joined = functional.linear(normed, layer.qkv).view(rows, width, -1, self._head_size)
            turned = joined[:, :, : self._heads + self._key_heads]
            turned = torch.addcmul(turned * cos, turned.roll(self._head_size // 2, -1), sin)
            queries, keys = turned[:, :, : self._heads], turned[:, :, self._heads :]
            keys, values = cache.write(number, keys, joined[:, :, self._heads + self._key_heads :])
            queries, keys, values = (heads.transpose(1, 2) for heads in (queries, keys, values))
            mixed = attend(queries, keys, values, mask, is_causal=is_causal)
            hidden = hidden + functional.linear(mixed.flatten(2), layer.out)
            normed = functional.rms_norm(hidden, size, layer.mlp_norm, self._eps)
            gate, up = functional.linear(normed, layer.gate_up).chunk(2, -1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, layer.down)
        hidden = functional.rms_norm(hidden[:, -keep:], size, self._norm, self._eps)
        return functional.linear(hidden, self._head)


def _joined(layer: Any) -> _Weights:
    """A layer's weights, joined once even where models share the layer; its parameters become views of them."""
    if layer not in _JOINED:
        attention, mlp = layer.self_attn, layer.mlp
        _JOINED[layer] = _Weights(
            norm=layer.input_layernorm.weight,
            qkv=_join(attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.o_proj.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=_join(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj.weight,
        )
        if mlp.down_proj.weight.is_cuda:
            torch.cuda.empty_cache()  # the separate blocks are as large as the joined ones
    return _JOINED[layer]


def _join(*linears: torch.nn.Linear) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([linear.weight for linear in linears])
        start = 0
        for linear in linears:
            start, first = start + linear.weight.shape[0], start
            linear.weight.data = joined[first:start]
    return joined
