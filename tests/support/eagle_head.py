"""A one-layer EAGLE head for the built-in target, made in seconds by one linear solve: poor, and real."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from profiles.models.loader import LoadedModel


@torch.inference_mode()
def write_eagle_head(folder: Path, target: LoadedModel, texts: list[list[int]]) -> Path:
    """Writes the head: `hidden[t+1] ~ W [embedding(x[t+1]); hidden[t]]` by least squares over texts (Li et al. 2024).

    Its layer adds a little random attention, so that what it has read matters, and nothing else.
    """
    decoder = target.model.get_decoder()
    embeddings = target.model.get_input_embeddings().weight
    inputs, outputs = [], []
    for text in texts:
        ids = torch.tensor([text])
        hidden = decoder(ids).last_hidden_state[0]  # (length, size), normalised: what the head of the target reads
        inputs.append(torch.cat((embeddings[ids[0, 1:]], hidden[:-1]), dim=1))
        outputs.append(hidden[1:])
    solution = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution
    size = embeddings.shape[1]
    old = target.model.config
    config = LlamaConfig(**{**old.to_dict(), "num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    attention = {
        f"layers.0.self_attn.{name}_proj.weight": 0.05 * torch.randn(size, size, generator=generator)
        for name in ("q", "k", "v", "o")
    }
    feed_forward = {
        "layers.0.mlp.gate_proj.weight": torch.zeros(old.intermediate_size, size),
        "layers.0.mlp.up_proj.weight": torch.zeros(old.intermediate_size, size),
        "layers.0.mlp.down_proj.weight": torch.zeros(size, old.intermediate_size),
        "layers.0.post_attention_layernorm.weight": torch.ones(size),
    }
    weights = {
        "fc.weight": solution.T.contiguous(),
        "embed_tokens.weight": embeddings.clone(),
        **attention,
        **feed_forward,
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
