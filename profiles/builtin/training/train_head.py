"""Makes the EAGLE head that ships: `python -m profiles.builtin.training.train_head --work DIR [--stage NAME]`.

One Llama layer over `fc([embedding(x[t+1]); hidden[t]])` without a norm before it, whose output the target's own
`lm_head` reads: the head of Li et al. 2024 as vLLM's `EagleLlamaForCausalLM` runs it, with the target's embedding. It
learns the target's distribution over the target's outputs, on its own features too (HASS, Zhang et al. 2025). Stages,
minutes each on one core: `outputs` (texts of the target and its features, left in `--work`), `train` (the float16 head
beside this folder), `grade` (the head's acceptance on prompts that ship, which it has not seen: printed, and added to
`training.json`).
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from profiles.builtin import ALL_PROMPTS
from profiles.builtin.training import corpus, evaluate
from profiles.builtin.training.train import ROW_TOKENS, SEED, Optimizer, Rows
from profiles.prompts import reader, tokenize

NAME = "draft-eagle"
STREAM = 8  # of examples, which no draft was trained on
INTERMEDIATE = 672
OUTPUT_BATCHES, OUTPUT_ROWS, HALF = 6, 96, 128  # batches, rows of each, tokens of a row's first half
STEPS, BATCH_ROWS, UNROLLED = 300, 12, 3
TESTED_LENGTHS, TESTED_PROMPTS = (1, 3, 8), 24
STAGES = ("outputs", "train", "grade")
TARGET = evaluate.FAMILY / "target"


class EagleHead(nn.Module):
    """`unroll` gives what it drafts from every position at once; names of parameters are those of vLLM's file."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.fc = nn.Linear(2 * size, size, bias=False)
        attention = nn.ModuleDict({f"{name}_proj": nn.Linear(size, size, bias=False) for name in "qkvo"})
        mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, inner, bias=False),
                "up_proj": nn.Linear(size, inner, bias=False),
                "down_proj": nn.Linear(inner, size, bias=False),
            }
        )
        norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"self_attn": attention, "mlp": mlp, "post_attention_layernorm": norm})]
        )
        self.rotary = LlamaRotaryEmbedding(config)

    def unroll(self, embedded: torch.Tensor, hidden: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
        """The features predicted by each drafting step.

        `embedded` (rows, tokens, size) are of the text's tokens, `hidden` of the same shape the target's features. The
        features of step j at t follow t + j tokens that were read from the text, the last j features the head's own.
        """
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        steps = []
        for step in range(num_steps):
            # at t: the embedding of token t + step + 1 and the feature of token t + step
            tokens = functional.pad(embedded, (0, 0, 0, step + 1))[:, step + 1 :]
            hidden = self._forward(self.fc(torch.cat((tokens, hidden), -1)), step, keys, values)
            steps.append(hidden)
        return steps

    def _forward(
        self, inputs: torch.Tensor, step: int, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        """One layer; rows attend to the first step's keys up to t and to those of their own later steps."""
        layer = self.layers[0]
        assert isinstance(layer, nn.ModuleDict)
        attention, mlp = layer["self_attn"], layer["mlp"]
        assert isinstance(attention, nn.ModuleDict)
        assert isinstance(mlp, nn.ModuleDict)
        rows, length, size = inputs.shape
        query, key, value = (
            attention[f"{name}_proj"](inputs).view(rows, length, self.num_heads, -1).transpose(1, 2) for name in "qkv"
        )
        positions = torch.arange(length)[None] + step
        query, key = apply_rotary_pos_emb(query, key, *self.rotary(inputs, positions))
        keys.append(key)
        values.append(value)
        is_later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = [(query @ keys[0].transpose(2, 3)).masked_fill(is_later, -torch.inf)]
        scores += [(query * later).sum(-1, keepdim=True) for later in keys[1:]]
        weights = (torch.cat(scores, -1) / query.shape[-1] ** 0.5).softmax(-1)
        mixed = weights[..., :length] @ values[0]
        for index, later in enumerate(values[1:]):
            mixed = mixed + weights[..., length + index, None] * later
        residual = inputs + attention["o_proj"](mixed.transpose(1, 2).reshape(rows, length, size))
        normed = layer["post_attention_layernorm"](residual)
        inner = functional.silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed)
        return torch.add(residual, mlp["down_proj"](inner))


def write_outputs(target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, work: Path) -> None:
    """Batches of rows whose second half the target wrote, greedily or sampled, with its features."""
    corpus.fetch_npm_text(work / "text")
    training = [document for document in corpus.read_documents(work / "text") if not document.held_out]
    for number in range(OUTPUT_BATCHES):
        rows = Rows(tokenizer, training, SEED + STREAM + number)
        requests = rows.batch(OUTPUT_ROWS, {corpus.DOMAINS[number % 3]: 1.0})[:, :HALF]
        file = work / f"head-{number}.safetensors"
        if file.is_file():
            continue
        temperature = 0.0 if number < OUTPUT_BATCHES // 2 else 0.8
        tokens = torch.cat((requests, evaluate.generate_rows(target, requests, HALF, temperature)), 1)
        with torch.inference_mode():
            hidden = [target.get_decoder()(part).last_hidden_state for part in torch.split(tokens, BATCH_ROWS)]
        save_file({"tokens": tokens, "hidden": torch.cat(hidden).clone()}, file)
        print(f"outputs {number + 1}/{OUTPUT_BATCHES}", flush=True)


def train(head: EagleHead, target: LlamaForCausalLM, work: Path) -> None:
    """Cross-entropy with the target's distribution at every step of the unrolled head."""
    outputs = [load_file(work / f"head-{number}.safetensors") for number in range(OUTPUT_BATCHES)]
    embeddings, optimizer, rng = (
        target.get_input_embeddings(),
        Optimizer(head, STEPS, scale=0.5),
        random.Random(SEED),
    )
    started = time.monotonic()
    for step in range(STEPS):
        rows, picked = outputs[step % OUTPUT_BATCHES], rng.sample(range(OUTPUT_ROWS), BATCH_ROWS)
        hidden = rows["hidden"][picked]
        with torch.no_grad():
            target_probs, embedded = target.lm_head(hidden).softmax(-1), embeddings(rows["tokens"][picked])
        losses = []
        for shift, predicted in enumerate(head.unroll(embedded, hidden, UNROLLED), start=1):
            log_probs = target.lm_head(predicted[:, :-shift]).log_softmax(-1)
            losses.append(-(target_probs[:, shift:] * log_probs).sum(-1).mean())
        torch.autograd.backward(torch.stack(losses).mean())
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            shown = " ".join(f"{loss.item():.3f}" for loss in losses)
            print(f"head step {step} {shown} at {time.monotonic() - started:.0f} s", flush=True)


@torch.inference_mode()
def agreements(head: EagleHead, target: LlamaForCausalLM, ids: torch.Tensor) -> list[int]:
    """How many drafted tokens equal those of a text, shape (1, tokens), for a round after so many of its tokens."""
    hidden = target.get_decoder()(ids).last_hidden_state
    steps = head.unroll(target.get_input_embeddings()(ids), hidden, max(TESTED_LENGTHS))
    drafted = torch.stack([target.lm_head(features[0]).argmax(-1) for features in steps], dim=1).tolist()
    emitted = ids[0].tolist()
    agreed = [0, 0]
    for start in range(2, len(emitted)):
        pairs = zip(drafted[start - 2], emitted[start:], strict=False)
        agreed.append([*(token == other for token, other in pairs), False].index(False))
    return agreed


@torch.inference_mode()
def acceptance(head: EagleHead, target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """By domain of the prompts that ship: agreement of the first token, and accepted tokens per round by length."""
    by_domain: dict[str, list[list[int]]] = {domain: [] for domain in corpus.DOMAINS}
    prompts, _ = tokenize(reader.read_all([ALL_PROMPTS]), tokenizer, ROW_TOKENS)
    for prompt in prompts[:: len(prompts) // TESTED_PROMPTS]:
        request = torch.tensor([prompt.token_ids])
        ids = torch.cat((request, evaluate.generate_rows(target, request, evaluate.WRITTEN_TOKENS)), 1)
        by_domain[prompt.domain].append(agreements(head, target, ids)[len(prompt.token_ids) + 1 :])
    figures: dict[str, object] = {}
    for domain, texts in by_domain.items():
        first = [count > 0 for agreed in texts for count in agreed]
        rounds = {
            f"accepted_per_round_k{length}": statistics.fmean(
                accepted for agreed in texts for accepted in _walk(agreed, length)
            )
            for length in TESTED_LENGTHS
        }
        figures[domain] = {
            name: round(value, 3) for name, value in {"first_token": statistics.fmean(first), **rounds}.items()
        }
    return figures


def _walk(agreed: list[int], length: int) -> Iterator[int]:
    """Accepted tokens of each round, from the proposals that agree at every position."""
    start = 0
    while start < len(agreed):
        accepted = min(length, agreed[start])
        yield accepted
        start += accepted + 1


def ship(head: EagleHead, config: LlamaConfig) -> None:
    """Writes float16 weights and the config beside the other drafts; the embedding is the target's."""
    folder = evaluate.FAMILY / NAME
    config.save_pretrained(folder)
    weights = {name: value.to(torch.float16).contiguous() for name, value in head.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Runs the asked stage, or all in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32).requires_grad_(requires_grad=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TARGET)
    replaced = {"num_hidden_layers": 1, "intermediate_size": INTERMEDIATE, "architectures": ["LlamaForCausalLM"]}
    config = LlamaConfig(**{**target.config.to_dict(), **replaced})
    head = EagleHead(config)
    stages = STAGES if options.stage == "all" else (options.stage,)
    for stage in stages:
        if stage == "outputs":
            write_outputs(target, tokenizer, options.work)
        elif stage == "train":
            train(head, target, options.work)
            ship(head, config)
        else:
            head.load_state_dict(load_file(evaluate.FAMILY / NAME / "model.safetensors"))
            figures = {"num_params": sum(p.numel() for p in head.parameters()), **acceptance(head, target, tokenizer)}
            print(NAME, json.dumps(figures), flush=True)
            file = evaluate.FAMILY / "training" / "training.json"
            record = json.loads(file.read_text(encoding="utf-8")) | {NAME: figures}
            file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
