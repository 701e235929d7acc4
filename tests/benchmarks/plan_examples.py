"""Ten plans that a user would ask for, with why each is plausible: `python -m tests.benchmarks.plan_examples --write`.

Writes docs/plan-examples.md; without `--write` to standard output. The last line is one JSON document.
"""

import io
import sys
from typing import Any

from rich.console import Console

from profiles.records.errors import DraftpickError
from tests import ROOT
from tests.benchmarks.common import finish
from tuner.cli.plan import lines, table
from tuner.plan.plan import PlanQuery, make_plan

EXAMPLES = (
    (
        PlanQuery(target="Qwen/Qwen3-32B", drafts=["mtp"], hardware="H100", engine="vllm", batch_sizes=(1, 32)),
        "65 GB of bfloat16 at 2.5 TB/s are 26 ms a step, which is the plain rate. The head is one of 64 layers and "
        "the output head: 5 % of a step for a token. No head of this target is published: the interval is that of MTP "
        "heads elsewhere, most of them told at one or two tokens, so long lengths are optimistic: a head tires.",
    ),
    (
        PlanQuery(target="Qwen/Qwen3-32B", drafts=["mtp"], hardware="RTX4090", engine="vllm", dtype="awq-int4"),
        "In bfloat16 it is refused: 66 GB of 24. In 4 bits the bytes fall by 3.5 and the bandwidth by 3.3, so the "
        "plain rate is that of the H100. The head keeps 16 bits for its output head, so drafting costs a larger share "
        "and the best length is shorter.",
    ),
    (
        PlanQuery(
            target="deepseek-ai/DeepSeek-V3",
            drafts=["mtp"],
            hardware="H200x8",
            engine="sglang",
            batch_sizes=(1, 16, 64),
        ),
        "At batch 1 each drafted token wakes up to eight more experts in each layer, so rows are dear; at batch 16 "
        "most, at 64 nearly all experts are read anyway and rows are cheap: the gain falls and rises again.",
    ),
    (
        PlanQuery(
            target="Llama-3.3-70B-Instruct", drafts=["Llama-3.2-1B@Q8_0"], hardware="M3Ultra", engine="llamacpp",
            dtype="Q4_K_M",
        ),
        "Apple's GPU has little arithmetic for its bandwidth: each further row of 4-bit weights costs a third of a "
        "step, so the best length is short and k = 8, past the row kernel, loses. Published runs of 72B on an M4 "
        "Max in 4 bits gain 1.4 to 2.0 with a confidence stop.",
    ),
    (
        PlanQuery(
            target="Llama-3.1-8B", drafts=["eagle3"], hardware="L4", engine="vllm", dtype="fp8", batch_sizes=(1, 8, 32)
        ),
        "8 GB at 225 GB/s are 36 ms. An EAGLE-3 head in 16 bits beside an 8-bit target costs 11 % of a step. The L4 "
        "computes 242 Top/s for 0.3 TB/s: arithmetic stays hidden up to batch 32.",
    ),
    (
        PlanQuery(
            target="Llama-3.3-70B-Instruct", drafts=["eagle3"], hardware="H100x2", engine="vllm", dtype="fp8",
            batch_sizes=(1, 32, 256),
        ),
        "The gain falls with the batch, because 4 tokens of each of 256 sequences are 1,024 rows, which "
        "arithmetic limits.",
    ),
    (
        PlanQuery(
            target="Qwen3-30B-A3B", drafts=["Qwen3-0.6B@Q8_0"], hardware="RTX4090", engine="llamacpp", dtype="Q4_K_M"
        ),
        "3 billion active parameters: a plain step takes 6 ms, of which a 0.6B draft's step is a quarter, and each "
        "row wakes its own experts: little is gained, and an acceptance in the lower half of what is published loses.",
    ),
    (
        PlanQuery(
            target="Qwen2.5-72B-Instruct", drafts=["Qwen2.5-1.5B-Instruct"], hardware="RTX3090x2", engine="exllamav2",
            dtype="gptq-int4",
        ),
        "The kernel takes 4 rows a pass: k = 3 is the best, k = 4 (the default) pays a second pass, k = 8 a third. "
        "Acceptance is published for this pair.",
    ),
    (
        PlanQuery(
            target="Qwen3-235B-A22B", drafts=["eagle3"], hardware="H100x8", engine="sglang", batch_sizes=(1, 16)
        ),
        "As DeepSeek: rows are dear at batch 1, cheap at batch 16. SpecForge publishes 1.2 to 2.0 at batch 8, k = 3.",
    ),
    (
        PlanQuery(
            target="Llama-3.1-405B", drafts=["Llama-3.1-8B"], hardware="H100x8", engine="trtllm", dtype="fp8",
            context=32000,
        ),
        "The draft is a fiftieth of the target, so a drafted token costs a few per cent, and the curve is still rising "
        "at k = 8. What is open is acceptance: none is published for the pair.",
    ),
)  # fmt: skip


def command(query: PlanQuery) -> str:
    """The command line of a query."""
    options = {"--target": query.target, "--hardware": query.hardware, "--engine": query.engine, "--dtype": query.dtype}
    options |= {"--context": None if query.context == 1024 else query.context}
    parts = [f"{name} {value}" for name, value in options.items() if value is not None]
    parts += [f"--draft {draft}" for draft in query.drafts]
    parts += [f"--batch-size {batch}" for batch in query.batch_sizes if query.batch_sizes != (1,)]
    return " ".join(["draftpick plan", *parts])


def printed(document: dict[str, Any]) -> str:
    """What the command prints."""
    console = Console(file=io.StringIO(), width=100, highlight=False)
    for line in lines(document):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table(document))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def page(documents: list[dict[str, Any]]) -> str:
    """The page: a row for every plan and batch, why each is plausible, and two outputs in full."""
    text = [
        "# Ten plans",
        "What users ask before they buy, by `python -m tests.benchmarks.plan_examples --write`. Acceptance is what "
        "is published of the pair, else of such drafts; none is proven: see "
        "[how far to trust a plan](plan-trust.md).",
        "| | target, format | devices, engine | batch | plain tok/s | best | speed-up, 90 % interval |\n"
        + "|---" * 7
        + "|",
    ]
    for number, document in enumerate(documents, 1):
        target, hardware = document["target"], document["hardware"]
        for choice in document["choices"]:
            best = max(
                (row for row in document["setups"] if row["batch_size"] == choice["batch_size"]),
                key=lambda row: row["speedup"],
            )
            text[-1] += (
                f"\n| {number} | {target['name']}, {target['format']} | {hardware['count']} x {hardware['name']}, "
                f"{document['engine']['name']} | {choice['batch_size']} | {best['plain_tok_per_s']:.3g} | "
                f"{best['draft']} k={best['k']} | {best['speedup']:.2f} [{best['low']:.2f}, {best['high']:.2f}] |"
            )
    text.append("## Why they are plausible")
    text.append("\n".join(f"{number}. {why}" for number, (_, why) in enumerate(EXAMPLES, 1)))
    for number in (1, 8):
        query, document = EXAMPLES[number - 1][0], documents[number - 1]
        text.append(f"## Plan {number} in full\n\n    {command(query)}\n\n```text\n{printed(document)}\n```")
    return "\n\n".join(text) + "\n"


def main() -> None:
    documents = [make_plan(query) for query, _ in EXAMPLES]
    if "--write" in sys.argv:
        (ROOT / "docs" / "plan-examples.md").write_text(page(documents), encoding="utf-8")
    else:
        print(page(documents))
    try:
        make_plan(PlanQuery(target="Qwen/Qwen3-32B", drafts=["mtp"], hardware="RTX4090", engine="vllm"))
    except DraftpickError as error:
        print(error)
    finish({"choices": [document["choices"] for document in documents]})


if __name__ == "__main__":
    main()
