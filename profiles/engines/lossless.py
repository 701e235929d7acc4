"""Whether outputs are lossless: greedy ones equal the target's own with any draft, all end where they must."""

import functools
from collections.abc import Callable, Sequence

from profiles.records.core import Model, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import TargetTrace

NEAR_TIE = 1e-4  # greedy float32 outputs may differ only where the two largest logits lie this close


def check_divergences(
    target: Model, setups: Sequence[Setup], outputs: Sequence[Sequence[int]], trace_target: Callable[[], TargetTrace]
) -> None:
    """Greedy outputs of one prompt, one per setup, must equal the target's trace, except at near-ties.

    16-bit types are not compared. `trace_target` is called only where outputs differ. Raises EngineError when an
    output diverges where the target was sure, or ends before or after the trace.
    """
    if target.dtype != "float32" or all(output == outputs[0] for output in outputs):
        return
    trace = trace_target()
    for setup, output in zip(setups, outputs, strict=True):
        pairs = enumerate(zip(trace.token_ids, output, strict=False))
        divergence = next((index for index, (expected, token) in pairs if expected != token), None)
        diverged, prompt = f"{setup.name} diverged from plain decoding", f"prompt {trace.prompt_digest}"
        if divergence is None and len(output) != len(trace.token_ids):
            size = len(trace.token_ids)
            raise EngineError(f"{diverged}: {len(output)} tokens of {prompt} where the target has {size}")
        if divergence is not None and trace.logit_gaps[divergence] > NEAR_TIE:
            gap = f"the two largest logits are {trace.logit_gaps[divergence]:.2g} apart; allowed is {NEAR_TIE:g}"
            raise EngineError(f"{diverged} at token {divergence} of {prompt} where {gap}")


def check_queues(
    target: Model,
    workload: Workload,
    prompts: Sequence[Prompt],
    outputs: Sequence[tuple[Setup, Sequence[Sequence[int]]]],
    trace_target: Callable[[Workload, Prompt], TargetTrace],
) -> None:
    """As `check_divergences`, of a queue that several setups decoded, one output per prompt; not of sampled ones."""
    if workload.temperature > 0.0:
        return
    setups = [setup for setup, _ in outputs]
    for number, prompt in enumerate(prompts):
        trace = functools.partial(trace_target, workload, prompt)
        check_divergences(target, setups, [queue[number] for _, queue in outputs], trace)


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
