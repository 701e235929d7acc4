"""Which whole rounds of vLLM are timed, in which order and over which texts."""

import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.engines.vllm.config import sampling_of
from profiles.records.core import Draft, Setup, Workload

CYCLES, ROUNDS = 4, 3  # visits to every draft and length, full rounds of each
PATTERN = 97  # token ids of a text that repeats
SHIFT = 7  # from a row's text to the next
SPARE = 2  # rounds' worth of text beside those that count
SPARSE = 3  # a look-up finds its full length in one of so many rounds at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Rounds of a setup that drafted `num_drafted` tokens, timed for a component (digest)."""

    component: str
    setup: Setup
    num_drafted: int

    @property
    def looks_up(self) -> bool:
        return self.setup.draft is not None and self.setup.draft.kind == "ngram"


def visits(draft: Draft, lengths: Iterable[int]) -> list[Visit]:
    """Rounds of a draft at these lengths, and those in which a look-up finds nothing."""
    setups = [Setup(draft=draft, length=length) for length in lengths]
    all_visits = [Visit(component=draft.digest, setup=setup, num_drafted=setup.length) for setup in setups]
    if draft.kind == "ngram":
        all_visits.append(Visit(component=draft.digest, setup=setups[0], num_drafted=0))
    return all_visits


def in_turn(
    all_visits: Sequence[Visit], engine_of: Callable[[Setup], Hashable], *, alone: bool
) -> Iterator[list[Visit]]:
    """Every visit once per cycle, those of an engine together, in a shuffled order.

    Where an engine runs `alone` it runs all its cycles before the next one is started.
    """
    rng = random.Random(0)
    by_engine: dict[Hashable, list[Visit]] = {}
    for visit in all_visits:
        by_engine.setdefault(engine_of(visit.setup), []).append(visit)
    for _ in range(1 if alone else CYCLES):
        for group in rng.sample(list(by_engine.values()), len(by_engine)):
            for _ in range(CYCLES if alone else 1):
                yield rng.sample(group, len(group))


def in_texts(group: Sequence[Visit], context_length: int) -> Iterator[list[Visit]]:
    """Visits of one engine that follow each other in one text, which grows by no more than the context."""
    text: list[Visit] = []
    for visit in group:
        if text and sum(map(growth, [*text, visit])) > context_length:
            yield text
            text = []
        text.append(visit)
    if text:
        yield text


def growth(visit: Visit) -> int:
    """The most tokens by which a text grows in a visit."""
    return (visit.setup.length + 1) * (ROUNDS + SPARE) * (SPARSE if visit.looks_up else 1)


def rounds_request(text: Sequence[Visit], workload: Workload, num_tokens: int, *, in_place: bool) -> dict[str, Any]:
    """Arguments of the worker's `rounds`, about the workload's context; a sequence may have `num_tokens`.

    Rows of a look-up have one text, so that all of them find a draft: soon with a window from 1 token on, never with
    one as long as the prompt.
    """
    longest, grown = max(visit.setup.length for visit in text), sum(map(growth, text))
    size = max(SPARE, min(workload.context_length - grown // 2, num_tokens - grown - 2 * (longest + 1)))
    shift = 0 if text[0].looks_up else SHIFT

    def window(visit: Visit) -> list[int] | None:
        if not visit.looks_up:
            return None
        assert visit.setup.draft is not None
        assert visit.setup.draft.max_match is not None
        return [1, visit.setup.draft.max_match] if visit.num_drafted else [size - 1, size - 1]

    return {
        "prompts": [
            [(row * shift + position) % PATTERN for position in range(size)] for row in range(workload.batch_size)
        ],
        "visits": [
            {
                "length": visit.setup.length if in_place else None,
                "window": window(visit),
                "drafted": visit.num_drafted,
                "count": ROUNDS,
            }
            for visit in text
        ],
        "sampling": sampling_of(workload) | {"max_tokens": grown, "stop_token_ids": []},
    }
