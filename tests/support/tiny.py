"""Writes tiny random model directories and GGUF files, so that tests load real files without a download.

Hidden size 32, a byte-level BPE tokenizer of 300 tokens with a chat template, safetensors. The weights are wide
(standard deviation 0.2) so that greedy choices are far from ties.
"""

import json
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.models.early_exit import early_exit
from profiles.records.core import Draft

READS_GGUF = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="its GGUF tokenizers need transformers 5.23",
)
PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
NUM_TOKENS, HIDDEN, HEADS = 300, 32, 4
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "gpt_neox": (transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
MORE_ARCHITECTURES = {  # written by the tests that need them
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
LLAMA_CPP_READS: dict[str, object] = {  # what llama.cpp's own reader needs of `write_gguf`
    "tokenizer__ggml__pre": "gpt-2",
    "tokenizer__ggml__token_type": None,
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


def tokenizer(text: str = _TEXT) -> transformers.PreTrainedTokenizerFast:
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
    fast = transformers.PreTrainedTokenizerFast(
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
    """A model directory with its tokenizer; `changes` are further settings of the config, by name.

    Gemma 2 and 3 get a window of 8 tokens, which every text of the tests outgrows.
    """
    config_class, model_class = (ARCHITECTURES | MORE_ARCHITECTURES)[architecture]
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
    if architecture not in {"gpt2", "gpt_neox"}:
        settings["num_key_value_heads"] = 2
    if architecture in MORE_ARCHITECTURES:
        settings["head_dim"] = HIDDEN // HEADS
    if architecture in {"gemma2", "gemma3"}:
        settings |= {"sliding_window": 8, "query_pre_attn_scalar": HIDDEN // HEADS}
    torch.manual_seed(seed)
    model_class(config_class(**settings | changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_gguf(
    path: Path, folder: Path, float_type: str = "F32", *, rope_factors: torch.Tensor | None = None, **fields: object
) -> Path:
    """The tiny Llama of `folder` as a GGUF file, as llama.cpp's converter writes it; 1-d tensors stay F32.

    `fields` replace metadata by key, `__` for a dot; None leaves the key out.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, object] = {
        "llama.context_length": config["max_position_embeddings"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "general.file_type": int(next(one for one in gguf.LlamaFileType if one.name.endswith(f"_{float_type}"))),
        **_gguf_tokenizer(folder),
    }
    for key, value in (values | {key.replace("__", "."): value for key, value in fields.items()}).items():
        if value is not None:
            writer.add_key_value(key, value, *_gguf_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        base, _, suffix = name.rpartition(".")
        kind = gguf.GGMLQuantizationType[float_type if tensor.dim() > 1 else "F32"]
        data = gguf.quants.quantize(_interleaved(name, tensor, config).float().numpy(), kind)
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", data, raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(name: str, tensor: torch.Tensor, config: dict[str, int]) -> torch.Tensor:
    """Rows of queries and keys in llama.cpp's order, which pairs what transformers keeps in two halves."""
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            return tensor.view(config[heads], 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _gguf_tokenizer(folder: Path) -> dict[str, object]:
    state = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    special = {token["content"] for token in state["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": vocabulary[END],
        "tokenizer.ggml.padding_token_id": vocabulary[PAD],
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _gguf_type(value: object) -> tuple[gguf.GGUFValueType, ...]:
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, kinds[type(value[0])]
    return (kinds[type(value)],)


NGRAM = {"max_match": 3, "min_match": 1}


def every_draft(root: Path, *, own_composite: bool = False) -> TorchEngine:
    """An engine of a random target with a draft of every kind; the composite shares the model of another draft.

    `own_composite`: a second composite drafts with the target itself.
    """
    target, other = (
        loader.load(str(write_model(root / name, name, num_layers=layers)), dtype="float32", device="cpu")
        for name, layers in (("llama", 2), ("qwen2", 1))
    )
    drafts = {
        Draft(kind="model", model=target.record): target.model,
        Draft(kind="model", model=other.record): other.model,
        Draft(kind="early_exit", num_layers=1): early_exit(target, 1),
        Draft(kind="ngram", **NGRAM): None,
        Draft(kind="composite", model=other.record, **NGRAM): other.model,
    }
    if own_composite:
        drafts[Draft(kind="composite", model=target.record, **NGRAM)] = target.model
    return TorchEngine(target, drafts, "cpu")
