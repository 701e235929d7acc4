"""Writes tiny random model directories, so that tests load real files without a download.

Hidden size 32, a byte-level BPE tokenizer of 300 tokens with a chat template, safetensors. The weights are wide
(standard deviation 0.2) so that greedy choices are far from ties.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
NUM_TOKENS, HIDDEN, HEADS = 300, 32, 4
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TEXT = (
    """The quick brown fox jumps over the lazy dog while another animal watches the evening light; then
they wander through the old garden, gathering flowers, counting stones and listening to the river. """
    * 2
)
OTHER_TEXT = (
    """def count(values): return sum(1 for value in values if value is not None)
for index, name in enumerate(sorted(names)): print(index, name, len(name), lengths[name]) """
    * 2
)


def tokenizer(text: str = _TEXT) -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens, `<|pad|>` 0 and `<|end|>` 1; another `text` gives another token map."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        unk_token=PAD,  # the Qwen2 class would add one of its own
        additional_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_model(
    folder: Path, architecture: str = "llama", *, num_layers: int = 2, seed: int = 0, **changes: object
) -> Path:
    """A model directory with its tokenizer; `changes` are further settings of the config, by name."""
    config_class, model_class = ARCHITECTURES[architecture]
    settings: dict[str, object] = {
        "vocab_size": NUM_TOKENS,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if architecture != "gpt2":
        settings["intermediate_size"] = 64
    if architecture in {"llama", "qwen2"}:
        settings["num_key_value_heads"] = 2
    torch.manual_seed(seed)
    model_class(config_class(**settings | changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
