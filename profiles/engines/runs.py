"""Requests as engines decoded them, and the samples that a queue of them makes once it is seen to be lossless.

Greedy outputs equal the target's own with any draft, and all end where they must.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from profiles.records.core import Model, Prompt, Setup, Workload, digest_of
from profiles.records.errors import EngineError
from profiles.records.evidence import Rounds, Sample, Shapes, TargetTrace

TraceTarget = Callable[[Workload, Prompt], TargetTrace]
NEAR_TIE = 1e-4  # greedy float32 outputs may differ only where the two largest logits lie this close


@dataclass(slots=True, kw_only=True)
class Run:
    """One request as it was decoded, fields as in `Sample`; `rounds` are empty where a server does not report them."""

    token_ids: Sequence[int]
    ttft_s: float
    decode_s: float
    rounds: Rounds = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    refills: int = 0
    threads: int | None = None  # of the process, where it says


class DecodedQueue(NamedTuple):
    """The runs of a queue of prompts under a setup, and the cores that they used."""

    setup: Setup
    runs: Sequence[Run]
    cores: float
    disturbed: bool


def samples_of(
    target: Model,
    workload: Workload,
    prompts: Sequence[Prompt],
    queues: Sequence[DecodedQueue],
    *,
    trace_target: TraceTarget,
) -> tuple[Sample, ...]:
    """A sample per setup and prompt. Raises EngineError: outputs are not lossless (`check_queues`)."""
    outputs = [(queue.setup, [run.token_ids for run in queue.runs]) for queue in queues]
    check_queues(target, workload, prompts, outputs, trace_target)
    return tuple(
        Sample(
            setup_digest=queue.setup.digest,
            prompt_digest=prompt.digest,
            ttft_s=run.ttft_s,
            decode_s=run.decode_s,
            output_tokens=len(run.token_ids),
            rounds=run.rounds,
            shapes=run.shapes,
            refills=run.refills,
            output_digest=digest_of(list(run.token_ids)),
            disturbed=queue.disturbed,
            cores=queue.cores,
            threads=run.threads,
        )
        for queue in queues
        for prompt, run in zip(prompts, queue.runs, strict=True)
    )


def check_queues(
    target: Model,
    workload: Workload,
    prompts: Sequence[Prompt],
    outputs: Sequence[tuple[Setup, Sequence[Sequence[int]]]],
    trace_target: TraceTarget,
) -> None:
    """Greedy outputs of a queue, one per prompt under each setup, must equal the target's traces, except at near-ties.

    16-bit types and sampled outputs are not compared. `trace_target` is called only where outputs differ. Raises
    EngineError when an output diverges where the target was sure, or ends before or after the trace.
    """
    if workload.temperature > 0.0 or target.dtype != "float32":
        return
    for number, prompt in enumerate(prompts):
        texts = [(setup, queue[number]) for setup, queue in outputs]
        if any(output != texts[0][1] for _, output in texts):
            trace = trace_target(workload, prompt)
            for setup, output in texts:
                _check_output(setup, output, trace)


def _check_output(setup: Setup, output: Sequence[int], trace: TargetTrace) -> None:
    size, diverged = len(trace.token_ids), f"{setup.name} diverged from plain decoding"
    prompt = f"prompt {trace.prompt_digest}"
    pairs = enumerate(zip(trace.token_ids, output, strict=False))
    divergence = next((index for index, (expected, token) in pairs if expected != token), None)
    if divergence is None and len(output) != size:
        raise EngineError(f"{diverged}: {len(output)} tokens of {prompt} where the target has {size}")
    if divergence is not None and trace.logit_gaps[divergence] > NEAR_TIE:
        gap = f"the two largest logits are {trace.logit_gaps[divergence]:.2g} apart; allowed is {NEAR_TIE:g}"
        raise EngineError(f"{diverged} at token {divergence} of {prompt} where {gap}")


def check_end(source: str, workload: Workload, token_ids: Sequence[int]) -> None:
    """An output of `source` ends with its first end token, or with the last token that it may have.

    Raises EngineError: it is longer or shorter, so the engine stops at other tokens than the workload's end tokens.
    """
    ends, limit, size = set(workload.end_token_ids), workload.max_new_tokens, len(token_ids)
    allowed = f"the end tokens are {sorted(ends)}" if ends else "no token is an end"
    if ends.intersection(token_ids[:-1]) or size > limit:
        raise EngineError(f"{source} went on for {size} tokens; {allowed}, and the limit is {limit}")
    if size < limit and token_ids[-1] not in ends:
        raise EngineError(f"{source} ended after {size} of {limit} tokens, at token {token_ids[-1]}; {allowed}")
