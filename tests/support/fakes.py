"""A made-up engine with known speeds, for every room that must be tested without a model.

Records are drawn from random numbers keyed by (seed, what is asked), so the same question gets the same answer in any
order and in any process; `calls` counts the questions.
"""

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from profiles.acceptance.batch_replay import draw_rounds, replay
from profiles.acceptance.expected_rounds import NO_END, RoundOutcome, combine
from profiles.engines.base import TORCH, EngineCapabilities
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Environment, Model, Prompt, Setup, Workload, digest_of
from profiles.records.evidence import Acceptance, AcceptanceTrace, LookupTrace, Sample, StepTimes, TargetTrace

TARGET = Model(name="fake-target", dtype="float32", digest=digest_of("fake-target"), num_params=8_000_000)
DRAFT_A = Draft(
    kind="model", model=Model(name="draft-a", dtype="float32", digest=digest_of("draft-a"), num_params=500_000)
)
NGRAM = Draft(kind="ngram", max_match=4, min_match=2)
MACHINE = Environment(
    device="fake cpu",
    device_count=1,
    memory_bytes=8 * 2**30,
    driver=None,
    cuda=None,
    threads=2,
    torch="2.13.0",
    engine="fake",
    engine_version="1",
)
GREEDY = Workload(context_length=256, max_new_tokens=64)

TARGET_STEP_S = 0.005
WIDER_BY = 0.03  # a target step takes this fraction longer for each further token
DRAFT_STEP_S = 0.0006
FIRST_STEP_S = 0.00065  # of a round; it takes in what the draft is behind
LOOK_UP_S = 0.00002
NOISE = 0.015


def prompts(count: int, domain: str = "code") -> tuple[Prompt, ...]:
    """Distinct prompts of eight tokens."""
    return tuple(
        Prompt(domain=domain, token_ids=tuple(random.Random(f"{domain} {index}").choices(range(5, 500), k=8)))
        for index in range(count)
    )


def sql(path: Path, query: str) -> list[Any]:
    """What raw SQL says about a store, for tests that do not trust the code under test."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(query).fetchall()
        connection.commit()
        return rows


def sample(setup: Setup = PLAIN, decode_s: float = 1.0, **fields: Any) -> Sample:
    """A run of prompt `p`: ten tokens after the first, in as many rounds by default."""
    tokens = fields.get("output_tokens", 11)
    others = {"prompt_digest": "p", "ttft_s": 0.5, "output_tokens": tokens, "rounds": {(0, 0): tokens - 1}}
    return Sample(setup_digest=setup.digest, decode_s=decode_s, output_digest="o", **(others | fields))


class FakeEngine:
    """Fits `Engine`: plain steps take 5 ms, draft-a's tokens are accepted with probability `keep` (by domain if given).

    Real runs follow the walk exactly and take the sum of their step times with 1.5 % noise. While `failure` is set,
    every question raises it; while `disturbed` is, timings say that other programs used the machine.
    """

    def __init__(self, seed: int = 0, keep: float = 0.7, keep_by_domain: Mapping[str, float] | None = None) -> None:
        self.environment = MACHINE
        self.target = TARGET
        self.drafts: tuple[Draft, ...] = (DRAFT_A, NGRAM)
        self.capabilities: EngineCapabilities = TORCH
        self.calls: Counter[str] = Counter()
        self.failure: BaseException | None = None
        self.disturbed = False
        self._seed = seed
        self._keep = keep
        self._keep_by_domain = dict(keep_by_domain or {})

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        self._asked("trace_target")
        return self._trace(workload, prompt)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        self._asked("trace_draft")
        return self._acceptance(workload, prompt, trace, draft, max_length)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        self._asked("time_steps")
        lengths = range(1, max_length + 1)
        typical = {
            TARGET.run_digest: {width: target_step_s(width) for width in range(1, max_length + 2)},
            DRAFT_A.digest: {1: DRAFT_STEP_S, **dict.fromkeys(self._first_widths(), FIRST_STEP_S)},
            NGRAM.digest: dict.fromkeys(lengths, LOOK_UP_S),
        }
        rng = self._random("steps", workload.batch_size, context_length, max_length)
        return self._timed(typical, workload, context_length, lambda step_s: _noisy(step_s, rng))

    def _timed(
        self,
        typical: Mapping[str, Mapping[int, float]],
        workload: Workload,
        context_length: int,
        noisy: Callable[[float], float],
    ) -> dict[str, StepTimes]:
        """Seven samples of the typical seconds by component and width."""
        return {
            part: StepTimes(
                component_digest=part,
                batch_size=workload.batch_size,
                context_length=context_length,
                samples_s={width: tuple(noisy(step_s) for _ in range(7)) for width, step_s in steps.items()},
                disturbed=self.disturbed,
            )
            for part, steps in typical.items()
        }

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        self._asked("run_together")
        return tuple(sample for setup in setups for sample in self._runs(workload, prompts, setup, purpose))

    def _first_widths(self) -> tuple[int, ...]:
        return CATCH_UP_WIDTHS[: None if any(draft.kind == "composite" for draft in self.drafts) else 1]

    def _asked(self, what: str) -> None:
        self.calls[what] += 1
        if self.failure is not None:
            raise self.failure

    def _random(self, *key: object) -> random.Random:
        return random.Random(f"{self._seed} {key}")

    def _trace(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        rng = self._random("target", workload.sampling_digest, prompt.digest)
        size = workload.max_new_tokens
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(rng.randrange(5, 500) for _ in range(size)),
            target_probs=tuple(rng.uniform(0.3, 1.0) for _ in range(size)),
            logit_gaps=tuple(rng.uniform(0.1, 5.0) for _ in range(size)),
            ended=False,
        )

    def _acceptance(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        keep = self._keep_by_domain.get(prompt.domain, self._keep)
        rng = self._random("draft", workload.sampling_digest, prompt.digest, draft.digest)
        size = len(trace.token_ids)
        names = {"prompt_digest": prompt.digest, "draft_digest": draft.digest}
        if draft.kind == "ngram":
            matches = [rng.random() < 0.5 for _ in range(size)]
            matching = [sum(rng.random() < 0.6 for _ in range(8)) for _ in range(size)]
            proposed = tuple(max_length if hit else 0 for hit in matches)
            accepted = tuple(
                min(wanted, match, size - start)
                for start, (wanted, match) in enumerate(zip(proposed, matching, strict=True))
            )
            return LookupTrace(**names, max_length=max_length, proposed=proposed, accepted=accepted)
        draws = [rng.random() for _ in range(size)]
        if workload.temperature == 0.0:
            accept_probs = tuple(float(draw < keep) for draw in draws)
        else:
            accept_probs = tuple(min(1.0, 2.0 * keep * draw) for draw in draws)
        return AcceptanceTrace(
            **names, accept_probs=accept_probs, confidences=tuple(0.3 + 0.7 * draw for draw in draws)
        )

    def _runs(self, workload: Workload, prompts: tuple[Prompt, ...], setup: Setup, purpose: str) -> list[Sample]:
        """A queue replayed over its traces; in a batch every step takes as long as alone."""
        rounds = [self._rounds(workload, prompt, setup) for prompt in prompts]
        samples = []
        for prompt, run in zip(prompts, replay(rounds, workload.batch_size, self.capabilities), strict=True):
            rng = self._random("run", workload.timing_digest, prompt.digest, setup.digest, purpose)
            trace = self._trace(workload, prompt)
            prefill_s = 0.020 if setup.draft is None or setup.draft.kind == "ngram" else 0.023
            decode_s = run.refills * prefill_s
            for (width, steps, first_width), count in run.shapes.items():
                decode_s += count * (target_step_s(width) + drafting_s(setup.draft, steps, first_width))
            samples.append(
                Sample(
                    setup_digest=setup.digest,
                    prompt_digest=prompt.digest,
                    ttft_s=_noisy(prefill_s, rng),
                    decode_s=_noisy(decode_s, rng),
                    output_tokens=len(trace.token_ids),
                    rounds=Counter((each.proposed, each.accepted) for each in run.rounds),
                    shapes=run.shapes,
                    refills=run.refills,
                    output_digest=digest_of(list(trace.token_ids)),
                    disturbed=self.disturbed,
                )
            )
        return samples

    def _rounds(self, workload: Workload, prompt: Prompt, setup: Setup) -> list[RoundOutcome]:
        trace = self._trace(workload, prompt)
        components = [
            self._drawn(workload, prompt, self._acceptance(workload, prompt, trace, part, setup.length))
            for part in (setup.draft.components if setup.draft is not None else ())
        ]
        acceptance = combine(components) if components else None
        most = NO_END if self.capabilities.past_end else workload.max_new_tokens
        return draw_rounds(trace, acceptance, setup.length, most, rng=random.Random(0))

    def _drawn(self, workload: Workload, prompt: Prompt, acceptance: Acceptance) -> Acceptance:
        """The acceptance of one run: every accept probability drawn to 0 or 1 (greedy ones are already)."""
        if isinstance(acceptance, LookupTrace):
            return acceptance
        rng = self._random("luck", workload.sampling_digest, prompt.digest, acceptance.draft_digest)
        return AcceptanceTrace(
            prompt_digest=acceptance.prompt_digest,
            draft_digest=acceptance.draft_digest,
            accept_probs=tuple(float(rng.random() < keep) for keep in acceptance.accept_probs),
            confidences=acceptance.confidences,
        )


def target_step_s(width: int) -> float:
    return TARGET_STEP_S * (1.0 + WIDER_BY * (width - 1))


def drafting_s(draft: Draft | None, steps: int, first_width: int) -> float:
    if draft is None:
        return 0.0
    look_up_s = LOOK_UP_S if draft.looks_up else 0.0
    return look_up_s + (FIRST_STEP_S + DRAFT_STEP_S * (steps - 1) if first_width else 0.0)


def _noisy(seconds: float, rng: random.Random) -> float:
    return seconds * rng.gauss(1.0, NOISE)
