"""Makes the family that ships: `python -m profiles.builtin.training.train --work DIR [--stage NAME]`.

Stages, each leaving files in `--work`: `tokenizer`; `target` (language modelling); `loops` (a short unlikelihood pass
against loops); `drafts` and `refine` (all drafts distilled together on the target's distribution, first mostly over
its own outputs, then over fresh text); `ship` (float16 safetensors, held-out prompts and `training.json` beside this
file).
Everything is seeded; the same packages and number of threads give the same weights up to the CPU's rounding.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from profiles.builtin.training import corpus, evaluate

SEED = 20261121
VOCAB_SIZE = 2048
ROW_TOKENS = 384
BATCH_ROWS = 12
SHARE = {"prose": 0.35, "code": 0.35, "copy": 0.30}
TARGET_STEPS, UNLIKELIHOOD_STEPS, DRAFT_STEPS = 2000, 120, 1000
REFINE_STEPS = 400
TARGET_LAYERS, HIDDEN = 20, 128
# name -> (layers, domains it is trained on); the 8-layer draft is the one too dear to pay
DRAFTS = {
    "draft-general": (2, ("prose", "code", "copy")),
    "draft-code": (1, ("code",)),
    "draft-prose": (1, ("prose",)),
    "draft-deep": (8, ("prose", "code", "copy")),
}
STAGES = ("tokenizer", "target", "loops", "drafts", "refine", "ship")
STREAM = {"target": 6, "loops": 5, "drafts": 6, "refine": 7, "ship": 0}  # which stream of examples a stage draws
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(documents: list[corpus.Document], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training files, prose and code in equal parts, with the chat template."""
    texts = {
        domain: ["".join(document.pieces) for document in documents if document.domain == domain]
        for domain in ("prose", "code")
    }
    num_chars = min(sum(map(len, group)) for group in texts.values())
    joined = [text for group in texts.values() for text in _first_chars(group, num_chars)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [corpus.PAD, corpus.END, corpus.USER, corpus.ASSISTANT]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(joined, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=corpus.END,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.USER, corpus.ASSISTANT],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def _first_chars(texts: list[str], num_chars: int) -> Iterator[str]:
    for text in random.Random(SEED).sample(texts, len(texts)):
        if num_chars <= 0:
            return
        yield text[:num_chars]
        num_chars -= len(text)


class Rows:
    """An endless supply of (rows, 384) token batches in the stated domain shares, examples packed end to end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, documents: list[corpus.Document], seed: int) -> None:
        self.encode = tokenizer.backend_tokenizer.encode
        self.streams = {domain: corpus.examples(documents, domain, seed) for domain in corpus.DOMAINS}

    def row(self, domain: str) -> list[int]:
        ids: list[int] = []
        while len(ids) < ROW_TOKENS:
            example = next(self.streams[domain])
            text = f"{corpus.USER}{example.request}{corpus.END}{corpus.ASSISTANT}{example.answer}{corpus.END}"
            ids += self.encode(text).ids
        return ids[:ROW_TOKENS]

    def batch(self, num_rows: int, share: dict[str, float]) -> torch.Tensor:
        counts = {domain: round(num_rows * part / sum(share.values())) for domain, part in share.items()}
        rows = [self.row(domain) for domain, count in counts.items() for _ in range(count)]
        return torch.tensor(rows[:num_rows])


def new_model(num_layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama of width 128 with tied embeddings; depth is what sets its cost on a CPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=336,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Optimizer:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms; warm-up, then linear to zero."""

    def __init__(self, model: torch.nn.Module, num_steps: int, scale: float = 1.0) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.parts = [
            torch.optim.Muon(matrices, lr=0.02 * scale, weight_decay=0.01, momentum=0.95),
            torch.optim.AdamW(others, lr=0.003 * scale, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        warm_up = min(50, num_steps // 10)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                part, lambda step: min((step + 1) / warm_up, max(0.0, 1 - step / num_steps) / 0.7, 1.0)
            )
            for part in self.parts
        ]

    def step(self) -> None:
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()
            part.zero_grad(set_to_none=True)


def language_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train_target(rows: Rows, work: Path) -> LlamaForCausalLM:
    """Language modelling on the mixture; a checkpoint every 200 steps so that later stages can be tried early."""
    model = new_model(TARGET_LAYERS, SEED)
    optimizer = Optimizer(model, TARGET_STEPS)
    started = time.monotonic()
    for step in range(TARGET_STEPS):
        loss = language_loss(model, rows.batch(BATCH_ROWS, SHARE))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"target step {step} loss {loss.item():.3f} at {time.monotonic() - started:.0f} s", flush=True)
        if step % 200 == 199:
            model.save_pretrained(work / "target-lm")
    model.save_pretrained(work / "target-lm")
    return model


def unlearn_loops(model: LlamaForCausalLM, rows: Rows, work: Path) -> None:
    """Sequence-level unlikelihood (Welleck et al. 2020) on the model's own greedy prose and code.

    Tokens that complete a 4-gram already generated are pushed down; every second step is plain language modelling
    on the full mixture, so that copying, where repeating is right, is kept.
    """
    optimizer = Optimizer(model, UNLIKELIHOOD_STEPS, scale=0.15)
    for step in range(UNLIKELIHOOD_STEPS):
        prompts = rows.batch(24, {"prose": 0.5, "code": 0.5})[:, : 48 + 8 * (step % 8)]
        model.eval()
        generated = evaluate.generate_rows(model, prompts, 112)
        model.train()
        flags = torch.tensor([evaluate.repeated(row) for row in generated.tolist()])
        logits = model(torch.cat([prompts, generated], 1)[:, :-1], use_cache=False).logits[:, prompts.shape[1] - 1 :]
        taken = functional.log_softmax(logits, -1).gather(-1, generated[..., None]).squeeze(-1)
        penalty = -torch.log((1 - taken.exp()).clamp_min(1e-5)) * flags
        loss = penalty.sum() / flags.sum().clamp_min(1)
        torch.autograd.backward(loss + language_loss(model, rows.batch(BATCH_ROWS, SHARE)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"loops step {step} penalty {loss.item():.3f} repeated {flags.float().mean():.3f}", flush=True)
    model.save_pretrained(work / "target")


def target_outputs(model: LlamaForCausalLM, rows: Rows, num_batches: int) -> dict[str, torch.Tensor]:
    """Rows whose second part is the target's own greedy or sampled continuation, by domain."""
    model.eval()
    parts_by_domain: dict[str, list[torch.Tensor]] = {domain: [] for domain in corpus.DOMAINS}
    for index in range(num_batches):
        domain = corpus.DOMAINS[index % 3]
        prompts = rows.batch(64, {domain: 1.0})[:, : 96 + 16 * (index % 6)]
        temperature = 0.0 if index % 2 == 0 else 0.8
        generated = evaluate.generate_rows(model, prompts, ROW_TOKENS - prompts.shape[1], temperature)
        parts_by_domain[domain].append(torch.cat([prompts, generated], 1))
        print(f"own rows {index + 1}/{num_batches}", flush=True)
    return {domain: torch.cat(parts) for domain, parts in parts_by_domain.items()}


def train_drafts(target: LlamaForCausalLM, rows: Rows, work: Path) -> None:
    """All drafts side by side: each step the target scores a batch once, and every draft learns from its
    distribution.

    The small ones also take a step on the target's own outputs as they are, which costs no run of the target.
    """
    outputs = target_outputs(target, rows, 18)
    names = list(DRAFTS)
    drafts = {name: new_model(DRAFTS[name][0], SEED + 1 + names.index(name)) for name in names}
    optimizers = {name: Optimizer(draft, DRAFT_STEPS) for name, draft in drafts.items()}
    rng = random.Random(SEED)
    for step in range(DRAFT_STEPS):
        domain = corpus.DOMAINS[step % 3]
        batch = (
            rows.batch(6, {domain: 1.0})
            if step % 4 == 0
            else outputs[domain][rng.sample(range(len(outputs[domain])), 6)]
        )
        with torch.no_grad():
            target_probs = functional.softmax(target(batch, use_cache=False).logits, -1)
        for name, (num_layers, domains) in DRAFTS.items():
            losses = []
            # the deep draft costs as much as all others together: it learns from every second batch
            if domain in domains and (num_layers <= 2 or step % 2 == 0):
                guess = functional.log_softmax(drafts[name](batch, use_cache=False).logits, -1)
                losses.append(-(target_probs * guess).sum(-1).mean())
            if num_layers <= 2:
                source = outputs[rng.choice(domains)]
                losses.append(language_loss(drafts[name], source[rng.sample(range(len(source)), 8)]))
            if losses:
                torch.autograd.backward(torch.stack(losses).sum())
                torch.nn.utils.clip_grad_norm_(drafts[name].parameters(), 1.0)
                optimizers[name].step()
                if step % 60 < 3:
                    print(f"drafts step {step} {domain} {name} {losses[0].item():.3f}", flush=True)
        if step % 200 == 199:
            for name, draft in drafts.items():
                draft.save_pretrained(work / name)
    for name, draft in drafts.items():
        draft.save_pretrained(work / name)


def refine_drafts(target: LlamaForCausalLM, rows: Rows, work: Path) -> None:
    """Fresh text of all domains in every batch: the target's outputs are few, and small drafts learn them by heart."""
    drafts = {name: LlamaForCausalLM.from_pretrained(work / name) for name in DRAFTS}
    optimizers = {name: Optimizer(draft, REFINE_STEPS, scale=0.5) for name, draft in drafts.items()}
    for step in range(REFINE_STEPS):
        parts = {domain: rows.batch(5, {domain: 1.0}) for domain in corpus.DOMAINS}
        with torch.no_grad():
            target_probs_of = {
                domain: functional.softmax(target(part, use_cache=False).logits, -1) for domain, part in parts.items()
            }
        for name, (num_layers, domains) in DRAFTS.items():
            if num_layers > 2 and step % 4:
                continue
            batch = torch.cat([parts[domain] for domain in domains])
            target_probs = torch.cat([target_probs_of[domain] for domain in domains])
            guess = functional.log_softmax(drafts[name](batch, use_cache=False).logits, -1)
            loss = -(target_probs * guess).sum(-1).mean()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(drafts[name].parameters(), 1.0)
            optimizers[name].step()
            if step % 20 == 0:
                print(f"refine step {step} {name} {loss.item():.3f}", flush=True)
        if step % 100 == 99 or step == REFINE_STEPS - 1:
            for name, draft in drafts.items():
                draft.save_pretrained(work / name)


def main() -> None:
    """Runs the asked stage, or all four in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    corpus.fetch_npm_text(options.work / "text")
    documents = corpus.read_documents(options.work / "text")
    training = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    stages = STAGES if options.stage == "all" else (options.stage,)
    for stage in stages:
        if stage == "tokenizer":
            train_tokenizer(training, options.work / "tokenizer")
            continue
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.work / "tokenizer")
        rows = Rows(tokenizer, training, SEED + STREAM[stage])
        if stage == "target":
            train_target(rows, options.work)
        elif stage == "loops":
            unlearn_loops(LlamaForCausalLM.from_pretrained(options.work / "target-lm"), rows, options.work)
        elif stage in ("drafts", "refine"):
            train = train_drafts if stage == "drafts" else refine_drafts
            train(LlamaForCausalLM.from_pretrained(options.work / "target"), rows, options.work)
        else:
            evaluate.ship(options.work, tokenizer, held_out, ["target", *DRAFTS])


if __name__ == "__main__":
    main()
