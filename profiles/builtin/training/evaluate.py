"""Grades the trained family and writes what ships: float16 safetensors, held-out prompts, `training.json`.

Used by `train` only. The figures are the ones a reader needs to trust the family: loss on held-out files, the share
of repeated 4-grams in what the target writes, and how much of a copying task it gets right.
"""

import json
import shutil
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from profiles.builtin.training import corpus

PROMPTS_PER_DOMAIN = 48
TEST_SEED = 1
FAMILY = Path(__file__).parents[1]
WRITTEN_TOKENS = 96


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


def repeated(ids: list[int], size: int = 4) -> list[bool]:
    """For each token, whether the n-gram of `size` tokens that ends there occurred before in `ids`."""
    seen: set[tuple[int, ...]] = set()
    flags = []
    for end in range(1, len(ids) + 1):
        gram = tuple(ids[max(0, end - size) : end])
        flags.append(len(gram) == size and gram in seen)
        seen.add(gram)
    return flags


class Grader:
    """Held-out examples of every domain, the ones that ship as prompts, and figures of a model on them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, held_out: list[corpus.Document]) -> None:
        self._tokenizer = tokenizer
        self.examples = {
            domain: list(islice(corpus.examples(held_out, domain, TEST_SEED), PROMPTS_PER_DOMAIN))
            for domain in corpus.DOMAINS
        }

    def ids(self, example: corpus.Example) -> tuple[list[int], list[int]]:
        encode = self._tokenizer.backend_tokenizer.encode
        request = encode(f"{corpus.USER}{example.request}{corpus.END}{corpus.ASSISTANT}").ids
        return request, encode(f"{example.answer}{corpus.END}").ids

    @torch.inference_mode()
    def loss(self, model: LlamaForCausalLM, domain: str) -> float:
        """Mean nats per answer token on held-out examples."""
        total, count = 0.0, 0
        for example in self.examples[domain]:
            request, answer = self.ids(example)
            logits = model(torch.tensor([request + answer]), use_cache=False).logits[0, len(request) - 1 : -1]
            total += float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            count += len(answer)
        return total / count

    def written(self, model: LlamaForCausalLM, domain: str) -> list[tuple[list[int], list[int]]]:
        """(greedy output up to its end token, reference answer), at most 96 tokens each."""
        pairs = []
        for example in self.examples[domain]:
            request, answer = self.ids(example)
            output = generate_rows(model, torch.tensor([request]), WRITTEN_TOKENS)[0].tolist()
            end = output.index(1) + 1 if 1 in output else len(output)
            pairs.append((output[:end], answer[:WRITTEN_TOKENS]))
        return pairs

    def figures(self, model: LlamaForCausalLM) -> dict[str, dict[str, float]]:
        """Per domain: loss, share of repeated 4-grams (and in the references), and right tokens in order."""
        table = {}
        for domain in corpus.DOMAINS:
            pairs = self.written(model, domain)
            flags = [flag for output, _ in pairs for flag in repeated(output)[3:]]
            natural = [flag for _, answer in pairs for flag in repeated(answer)[3:]]
            right = sum(sum(a == b for a, b in zip(output, answer, strict=False)) for output, answer in pairs)
            table[domain] = {
                "loss": round(self.loss(model, domain), 3),
                "repeated_4grams": round(sum(flags) / len(flags), 4),
                "repeated_4grams_in_references": round(sum(natural) / len(natural), 4),
                "tokens_as_reference": round(right / sum(len(answer) for _, answer in pairs), 3),
            }
        return table


def ship(
    work: Path, tokenizer: PreTrainedTokenizerFast, held_out: list[corpus.Document], names: list[str]
) -> dict[str, object]:
    """Writes models, prompts and `training.json` beside this file and prints the figures."""
    grader = Grader(tokenizer, held_out)
    record: dict[str, object] = {"held_out_prompts_per_domain": PROMPTS_PER_DOMAIN}
    for name in names:
        folder = FAMILY / name
        shutil.rmtree(folder, ignore_errors=True)
        model = LlamaForCausalLM.from_pretrained(work / name)
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        figures: dict[str, object] = {"num_params": sum(p.numel() for p in shipped.parameters())}
        if name == "target":
            figures |= grader.figures(shipped)
        else:
            figures["loss"] = {domain: round(grader.loss(shipped, domain), 3) for domain in corpus.DOMAINS}
        record[name] = figures
        print(name, json.dumps(figures), flush=True)
    (FAMILY / "prompts").mkdir(exist_ok=True)
    for domain, examples in grader.examples.items():
        rows = [{"domain": domain, "messages": [{"role": "user", "content": example.request}]} for example in examples]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FAMILY / "prompts" / f"{domain}.jsonl").write_text(lines, encoding="utf-8")
    (FAMILY / "training" / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record
