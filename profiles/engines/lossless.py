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
        if divergence is None and len(output) != len(trace.token_ids):
            raise EngineError(
                f"{setup.name} diverged from plain decoding: {len(output)} tokens of prompt {trace.prompt_digest} "
                f"where the target has {len(trace.token_ids)}"
            )
        if divergence is not None and trace.logit_gaps[divergence] > NEAR_TIE:
            raise EngineError(
                f"{setup.name} diverged from plain decoding at token {divergence} of prompt {trace.prompt_digest} "
                f"where the two largest logits are {trace.logit_gaps[divergence]:.2g} apart; allowed is {NEAR_TIE:g}"
            )


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
    ends, limit = set(workload.end_token_ids), workload.max_new_tokens
    allowed = f"the end tokens are {sorted(ends)}" if ends else "no token is an end"
    if ends.intersection(token_ids[:-1]) or len(token_ids) > limit:
        raise EngineError(f"{source} went on for {len(token_ids)} tokens; {allowed}, and the limit is {limit}")
    if len(token_ids) < limit and token_ids[-1] not in ends:
        raise EngineError(
            f"{source} ended after {len(token_ids)} of {limit} tokens, at token {token_ids[-1]}; {allowed}"
        )
