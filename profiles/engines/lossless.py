"""Whether outputs are what was asked for: greedy ones the target's own with any draft, all as long as they must be.

Compares tokens; runs no model.
"""

import functools
from collections.abc import Callable, Sequence

from profiles.records.core import Model, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import TargetTrace

NEAR_TIE = 1e-4  # greedy float32 outputs may part only where the two largest logits lie this close


def check_divergences(
    target: Model, setups: Sequence[Setup], outputs: Sequence[Sequence[int]], traced: Callable[[], TargetTrace]
) -> None:
    """Greedy outputs of one prompt must equal the target's trace, but for near-ties; 16-bit types are left alone.

    The target is `traced` only where outputs differ. Raises EngineError when one parts where the target was sure, or
    ends before or after the trace: decoding would not be lossless.
    """
    if target.dtype != "float32" or all(output == outputs[0] for output in outputs):
        return
    trace = traced()
    for setup, output in zip(setups, outputs, strict=True):
        pairs = enumerate(zip(trace.token_ids, output, strict=False))
        place = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
        if place is None and len(output) != len(trace.token_ids):
            raise EngineError(
                f"{setup.name} parted from plain decoding: {len(output)} tokens of prompt {trace.prompt_digest} where "
                f"the target has {len(trace.token_ids)}"
            )
        if place is not None and trace.logit_gaps[place] > NEAR_TIE:
            raise EngineError(
                f"{setup.name} parted from plain decoding at token {place} of prompt {trace.prompt_digest} where the "
                f"two largest logits are {trace.logit_gaps[place]:.2g} apart; allowed are partings under {NEAR_TIE:g}"
            )


def check_queues(
    target: Model,
    workload: Workload,
    prompts: Sequence[Prompt],
    outputs: Sequence[tuple[Setup, Sequence[Sequence[int]]]],
    trace_target: Callable[[Workload, Prompt], TargetTrace],
) -> None:
    """As `check_divergences`, of a queue that several setups decoded, one output per prompt; sampled ones are not."""
    if workload.temperature > 0.0:
        return
    setups = [setup for setup, _ in outputs]
    for number, prompt in enumerate(prompts):
        traced = functools.partial(trace_target, workload, prompt)
        check_divergences(target, setups, [own[number] for _, own in outputs], traced)


def check_end(who: str, workload: Workload, token_ids: Sequence[int]) -> None:
    """An output ends with its first end token, or with the last token that it may have; `who` made it.

    Raises EngineError: it is longer or shorter; the engine then takes other tokens for an end than the workload does.
    """
    ends, most = set(workload.end_token_ids), workload.max_new_tokens
    allowed = f"the end tokens are {sorted(ends)}" if ends else "no token is an end"
    if ends.intersection(token_ids[:-1]) or len(token_ids) > most:
        raise EngineError(f"{who} went on for {len(token_ids)} tokens; {allowed}, and at most {most} were asked for")
    if len(token_ids) < most and token_ids[-1] not in ends:
        raise EngineError(f"{who} ended after {len(token_ids)} of {most} tokens, at token {token_ids[-1]}; {allowed}")
