"""Step times: how long a step of a whole batch takes at each width, for the target and every draft, in turn.

All components and widths are visited in every cycle, so that drift of the machine falls on all alike. What is timed is
what a round does: run the forward, choose as the workload says (greedily, or by sampling and rejection), and for the
target bring the choice to the host. The order is that of rounds too, because a step runs 8 to 40 % faster when its
weights are still in the cache: a draft's single tokens follow its first step, that a step of the target.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from profiles.acceptance.ngram_index import NgramIndex
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.sampling import KeyedRandom, Proposal, accept_sampled, draw, sampling_probs
from profiles.records.core import CATCH_UP_WIDTHS, Draft, Workload
from profiles.records.evidence import StepTimes
from profiles.timing.clock import Clock

WARM_UP_CYCLES = 3
CYCLES, MIN_CYCLES = 16, 4
MAX_SWEEP_S = 120.0  # after which the least cycles must do: the machine is busy, or the model large and its noise small
SECONDS_BETWEEN_LINES = 30.0
_LOG = logging.getLogger(__name__)
CHAIN = 4  # a draft's single-token steps follow each other: so many are timed together


class _TimedStep(NamedTuple):
    """A step, or `repeats` of them in a row; 0: it is run once and not timed."""

    component: str
    width: int
    run: Callable[[], object]
    repeats: int = 1


class _Sweep(NamedTuple):
    """Steps by their place in a round: the target's by width, a draft's first and following ones, all others."""

    target: list[_TimedStep]
    drafting: list[tuple[_TimedStep, _TimedStep]]
    others: list[_TimedStep]

    def cycle(self, rng: random.Random) -> Iterator[_TimedStep]:
        """Rounds of every width with one draft after another, then the others, then two rounds of plain decoding."""
        plain, *verifying = self.target
        verifying, drafting = rng.sample(verifying, len(verifying)), rng.sample(self.drafting, len(self.drafting))
        for number in range(max(len(verifying), len(drafting))):
            if drafting:
                yield from drafting[number % len(drafting)]
            yield verifying[number % len(verifying)]
        yield from rng.sample(self.others, len(self.others))
        yield from (plain._replace(repeats=0), plain)


def time_steps(
    components: Mapping[str, RowModel | Draft],
    clock: Clock,
    workload: Workload,
    *,
    target: str,
    context_length: int,
    max_length: int,
) -> dict[str, StepTimes]:
    """Step times by component digest, of models and of n-gram drafts; `target` is the target's digest.

    With `context_length` tokens cached in every row, the target is timed at widths 1..max_length+1; a draft model at 1
    (a single-token step among others) and as wide as a first step can be, because a draft that is switched to may be
    any number of tokens behind; a look-up in every row at limits of 1..max_length tokens.
    """
    token_ids = [index % 97 for index in range(context_length)]
    models = {digest: model for digest, model in components.items() if not isinstance(model, Draft)}
    batch_size = models[target].num_rows
    rng = KeyedRandom(batch_size, workload, models[target].device)
    sweep = _Sweep([], [], [])
    with torch.inference_mode():
        for digest, model in models.items():
            _fill(model, token_ids)
            if digest == target:
                for width in range(1, max_length + 2):
                    sweep.target.append(_TimedStep(digest, width, _verify(model, context_length, width, rng)))
            else:
                first, *wider = (
                    _TimedStep(digest, width, _first(model, context_length, width, rng)) for width in CATCH_UP_WIDTHS
                )
                sweep.drafting.append((first, _TimedStep(digest, 1, _single_steps(model, context_length, rng), CHAIN)))
                sweep.others.extend(wider)
        for digest, draft in components.items():
            if isinstance(draft, Draft):
                for limit in range(1, max_length + 1):
                    sweep.others.append(_TimedStep(digest, limit, _look_up(draft, token_ids, limit, batch_size)))
        samples = _run_cycles(sweep, clock)
    return {
        digest: StepTimes(
            component_digest=digest,
            batch_size=batch_size,
            context_length=context_length,
            samples_s={width: tuple(values) for (owner, width), values in samples.items() if owner == digest},
        )
        for digest in components
    }


def _fill(model: RowModel, token_ids: list[int]) -> None:
    """Puts the same text into every row."""
    tokens = torch.tensor([token_ids], device=model.device)
    positions = torch.arange(len(token_ids), device=model.device)[None]
    for row in range(model.num_rows):
        model.step(tokens, positions, len(token_ids), row=row)


def _inputs(model: RowModel, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions, (B, width)."""
    positions = torch.arange(start, start + width, device=model.device).expand(model.num_rows, -1)
    return torch.zeros_like(positions), positions


def _verify(model: RowModel, context_length: int, width: int, rng: KeyedRandom) -> Callable[[], object]:
    """The target's step over a token and `width` - 1 proposals, accepted as in a round."""
    tokens, positions = _inputs(model, context_length, width)
    counts = torch.full_like(tokens[:, 0], width - 1)
    proposal = Proposal(token_ids=tokens[:, 1:], counts=counts, draft_probs=None, certain=counts >= 0)
    first_position = torch.zeros_like(counts)

    def run() -> object:
        logits = model.step(tokens, positions, context_length + width, keep=width)
        if rng.is_greedy:
            return logits.argmax(-1).tolist()
        return torch.stack(accept_sampled(proposal, sampling_probs(logits, rng.workload), rng, first_position)).tolist()

    return run


def _first(model: RowModel, context_length: int, width: int, rng: KeyedRandom) -> Callable[[], object]:
    tokens, positions = _inputs(model, max(0, context_length - width), width)
    return lambda: _draft_token(model.step(tokens, positions, max(context_length, width)), rng)


def _single_steps(model: RowModel, context_length: int, rng: KeyedRandom) -> Callable[[], object]:
    tokens, positions = _inputs(model, context_length, 1)

    def run() -> None:
        token = tokens
        for ahead in range(CHAIN):
            token = _draft_token(model.step(token, positions + ahead, context_length + ahead + 1), rng)[:, None]

    return run


def _draft_token(logits: torch.Tensor, rng: KeyedRandom) -> torch.Tensor:
    """(B,) tokens from a draft's logits (B, 1, V)."""
    if rng.is_greedy:
        return logits[:, 0].argmax(-1)
    first_position = torch.zeros((len(logits), 1), dtype=torch.long, device=logits.device)
    return draw(sampling_probs(logits[:, 0], rng.workload), rng.at("draft", first_position)[:, 0])


def _look_up(draft: Draft, token_ids: list[int], limit: int, num_rows: int) -> Callable[[], object]:
    assert draft.max_match is not None
    assert draft.min_match is not None
    indexes = [NgramIndex(draft.max_match, draft.min_match) for _ in range(num_rows)]
    return lambda: [index.look_up(token_ids, limit) for index in indexes]


def _run_cycles(sweep: _Sweep, clock: Clock) -> dict[tuple[str, int], list[float]]:
    """Seconds by component and width."""
    samples: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    rng = random.Random(0)
    began_s = line_at_s = clock.read()
    for cycle in range(WARM_UP_CYCLES + CYCLES):
        spent_s = clock.read() - began_s
        if cycle >= WARM_UP_CYCLES + MIN_CYCLES and spent_s > MAX_SWEEP_S:
            break
        if cycle > 0 and began_s + spent_s - line_at_s > SECONDS_BETWEEN_LINES:
            line_at_s = began_s + spent_s
            left_s = max(0.0, min(MAX_SWEEP_S, spent_s / cycle * (WARM_UP_CYCLES + CYCLES)) - spent_s)
            _LOG.info("step times: cycle %d of %d, about %.0f s left", cycle, WARM_UP_CYCLES + CYCLES, left_s)
        for step in sweep.cycle(rng):
            started_s = clock.read()
            step.run()
            elapsed_s = clock.read() - started_s
            if cycle >= WARM_UP_CYCLES and step.repeats:
                samples[step.component, step.width].append(elapsed_s / step.repeats)
    return samples
