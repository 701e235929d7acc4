"""Attention whose query heads share keys, packed so that no key is copied; and which kernel of torch computes it.

The only module that touches the attention functions of transformers (5.17 to 5.23).
"""

from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "draftpick_packed"


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """(B, width, heads, size) of queries (B, heads, width, size) over keys and values (B, key heads, view, size).

    Query heads that share keys are laid along the width. `mask` is (B, 1, groups * width, view), see `per_group`.
    """
    rows, heads, width, size = queries.shape
    groups = heads // keys.shape[1]
    if is_causal:  # packed queries are no triangle; with enable_gqa some kernels would keep all scores
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return mixed.transpose(1, 2)
    # only one dimension is split each time, as the layout in memory depends on the cache and on the kernel
    packed = queries.view(rows, -1, groups, width, size).flatten(2, 3)
    mixed = functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    return mixed.view(rows, -1, groups, width, size).permute(0, 3, 1, 2, 4).flatten(2, 3)


def per_group(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """A mask (B, 1, width, view) for packed queries."""
    return mask.repeat(1, 1, groups, 1) if groups > 1 else mask


def pack_heads(model: PreTrainedModel) -> None:
    """Makes a transformers model attend as above where a mask is given: it would copy keys for every query head."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)


def disable_cudnn() -> None:
    """cuDNN builds a plan for every new shape, 0.4 s each: in every prompt's time to first token."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def kernel_name(model: PreTrainedModel) -> str:
    """The kernel that torch chooses for this model's masked steps: `efficient` or `math`."""
    disable_cudnn()
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.zeros(1, 1, 2, size, dtype=model.dtype, device=model.device)
    choice = torch._fused_sdp_choice(query, query, query, attn_mask=query.new_zeros(1, 1, 2, 2))
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As `sdpa_attention_forward`, which runs whatever is not a plain masked attention of shared keys."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or attention_mask is None or attention_mask.shape[1] > 1 or options.get("position_bias") is not None:
        delegated: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return delegated
    return attend(query, key, value, per_group(attention_mask, groups), scale=scaling), None


AttentionInterface.register(_NAME, _packed_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
