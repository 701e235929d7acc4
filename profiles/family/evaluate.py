"""Grades the trained family and writes what ships: weights as float16 safetensors, held-out prompts, `training.json`.

Used by `train` only. The figures are the ones a reader needs to trust the family: loss on held-out files, the share
of repeated 4-grams in what the target writes, and how exactly it copies.
"""

import torch
from transformers import DynamicCache, LlamaForCausalLM


@torch.inference_mode()
def _generate(model: LlamaForCausalLM, prompts: torch.Tensor, num_tokens: int, temperature: float) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(0)
    tokens, out = prompts, []
    for _ in range(num_tokens):
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if temperature == 0.0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        out.append(tokens)
    return torch.cat(out, 1)


def generate_rows(
    model: LlamaForCausalLM, prompts: torch.Tensor, num_tokens: int, temperature: float = 0.0
) -> torch.Tensor:
    """Continues equally long prompts (rows, tokens) by `num_tokens`, ignoring end tokens; (rows, num_tokens)."""
    return _generate(model, prompts, num_tokens, temperature).clone()
