"""Plain decoding's output of a queue of prompts, and what each draft gets accepted of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.acceptance.expected_rounds import DraftAcceptance, combine
from profiles.engines.base import Engine
from profiles.records.core import Draft, Prompt, Workload
from profiles.records.evidence import TargetTrace


@dataclass(frozen=True)
class Plain:
    """By prompt; `accepted` by draft first, None is plain decoding."""

    workload: Workload
    prompts: Sequence[Prompt]
    traces: list[TargetTrace]
    accepted: dict[Draft | None, list[DraftAcceptance | None]]


def traced(engine: Engine, workload: Workload, prompts: Sequence[Prompt], max_length: int) -> Plain:
    traces = [engine.trace_target(workload, prompt) for prompt in prompts]
    accepted: dict[Draft | None, list[DraftAcceptance | None]] = {None: [None] * len(prompts)}
    for draft in engine.drafts:
        accepted[draft] = [
            combine([engine.trace_draft(workload, prompt, trace, part, max_length) for part in draft.components])
            for prompt, trace in zip(prompts, traces, strict=True)
        ]
    return Plain(workload=workload, prompts=prompts, traces=traces, accepted=accepted)


def to_limit_and_end(
    engine: Engine, workload: Workload, prompts: Sequence[Prompt], max_length: int
) -> dict[bool, Plain]:
    """To the limit (False) and to end tokens (True), which some outputs hold midway, some at once and some nowhere."""
    to_limit = traced(engine, workload, prompts, max_length)
    emitted = [trace.token_ids for trace in to_limit.traces]
    ends = (emitted[1][len(emitted[1]) // 2], emitted[4][0], emitted[6][-2])
    to_end = traced(engine, replace(workload, end_token_ids=ends), prompts, max_length)
    sizes = [len(trace.token_ids) for trace in to_end.traces]
    assert min(sizes) == 1
    assert any(1 < size < workload.max_new_tokens for size in sizes)
    return {False: to_limit, True: to_end}
