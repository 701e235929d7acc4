"""Which whole rounds of vLLM are timed, in which order and over which texts; and how its worker's records are read.

Knows what the worker is asked; asks nothing.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.engines.vllm.config import kind_of, sampling_of
from profiles.records.core import PLAIN, Draft, Model, Prompt, Setup, Workload, digest_of
from profiles.records.evidence import RoundCount, Sample, StepShape

CYCLES, ROUNDS = 4, 3  # so many visits to every draft and length, of so many full rounds each
PATTERN = 97  # token ids of a text that repeats
SHIFT = 7  # from a row's text to the next
SPARE = 2  # rounds' worth of text beside those that count
SPARSE = 3  # a look-up finds its full length in one round of so many at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Rounds of a setup that drafted `drafted` tokens; `part` is the digest whose staircase they belong to."""

    part: str
    setup: Setup
    drafted: int

    @property
    def looks_up(self) -> bool:
        return self.setup.draft is not None and self.setup.draft.kind == "ngram"


def visits(target: Model, drafts: Sequence[Draft], max_length: int) -> list[Visit]:
    """Plain rounds, those of every draft at every length, and those in which a look-up finds nothing."""
    found = [Visit(part=target.run_digest, setup=PLAIN, drafted=0)]
    for draft in drafts:
        lengths = range(1, max_length + 1)
        found += [Visit(part=draft.digest, setup=Setup(draft=draft, length=k), drafted=k) for k in lengths]
        if draft.kind == "ngram":
            found.append(Visit(part=draft.digest, setup=Setup(draft=draft, length=1), drafted=0))
    return found


def in_turn(target: Model, all_visits: Sequence[Visit]) -> Iterator[Visit]:
    """Every visit once per cycle in a shuffled order, those of an engine together."""
    shuffled = random.Random(0)
    by_engine: dict[object, list[Visit]] = {}
    for visit in all_visits:
        by_engine.setdefault(kind_of(visit.setup, target, 1), []).append(visit)
    for _ in range(CYCLES):
        for own in shuffled.sample(list(by_engine.values()), len(by_engine)):
            yield from shuffled.sample(own, len(own))


def question(visit: Visit, workload: Workload, num_tokens: int) -> dict[str, Any]:
    """What the worker is asked for a visit, about the workload's context; a sequence has room for `num_tokens`.

    Rows of a look-up hold one text, so that all find what they draft from: with a window from 1 token on they soon do,
    with one as long as the prompt never.
    """
    length = visit.setup.length
    growth = (length + 1) * (ROUNDS + SPARE) * (SPARSE if visit.looks_up else 1)
    size = max(SPARE, min(workload.context_length - growth // 2, num_tokens - growth - 2 * (length + 1)))
    shift = 0 if visit.looks_up else SHIFT
    window = None
    if visit.looks_up:
        assert visit.setup.draft is not None
        window = [1, visit.setup.draft.max_match] if visit.drafted else [size - 1, size - 1]
    return {
        "prompts": [[(row * shift + place) % PATTERN for place in range(size)] for row in range(workload.batch_size)],
        "count": ROUNDS,
        "drafted": visit.drafted,
        "window": window,
        "sampling": sampling_of(workload) | {"max_tokens": growth, "stop_token_ids": []},
    }


def sample_of(setup: Setup, prompt: Prompt, run: dict[str, Any], disturbed: bool) -> Sample:
    """The sample of a request, from the worker's record of it."""
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompt.digest,
        ttft_s=run["first_s"] - run["started_s"],
        decode_s=run["last_s"] - run["first_s"],
        output_tokens=len(run["token_ids"]),
        rounds=Counter(RoundCount(*pair) for pair in run["rounds"]),
        shapes=Counter(StepShape(width) for width in run["widths"]),
        refills=run["refills"],
        output_digest=digest_of(run["token_ids"]),
        disturbed=disturbed,
    )
