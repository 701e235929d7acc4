"""Requests as engines decoded them, and the samples that a checked queue of them makes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from profiles.engines.lossless import TraceTarget, check_queues
from profiles.records.core import Model, Prompt, Setup, Workload, digest_of
from profiles.records.evidence import Rounds, Sample, Shapes


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
