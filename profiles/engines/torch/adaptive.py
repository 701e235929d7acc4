"""A queue of prompts decoded under a pilot: every round another draft or length may be picked, for the whole batch.

Drafts stay ready between rounds: one that is switched to takes in the text it missed as part of its first round. The
loop is `decoding.Decoder`'s own. Knows nothing of how a pilot decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from profiles.acceptance.batch_replay import greedy_rounds
from profiles.engines.base import RoundController, RoundDecision, RoundReport
from profiles.engines.torch.batch_model import SMALLEST_VIEW, RowStepper, graph_view
from profiles.engines.torch.decoder import Decoder, Generation
from profiles.engines.torch.drafters import Drafted, Drafter, ModelDrafter, PartDrafter, Text, assembled
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import InputError
from profiles.timing.clock import Clock


class Turn(NamedTuple):
    """A round of a steered run.

    `rows` took part and `tokens` were emitted in `seconds`; what the pilot had scored after it took `scoring_s` more.
    """

    setup: Setup
    rows: int
    tokens: int
    seconds: float
    probe: bool
    scoring_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredRun:
    """What was emitted, by prompt in the order given, and the rounds in the order they were played."""

    generations: tuple[Generation, ...]
    timeline: tuple[Turn, ...]


class Drafters:
    """Every draft of an engine, one of them in use; fits `Drafter`.

    `make` gives the drafter of a part and raises InputError where it is not loaded; each is made once, and drafts that
    share a part share what it has taken in. `max_length` is the longest speculation length.
    """

    def __init__(self, make: Callable[[Draft], PartDrafter], max_length: int) -> None:
        self._make = make
        self._max_length = max_length
        self._parts: dict[str, PartDrafter] = {}
        self._made: dict[Setup, tuple[Drafter, list[ModelDrafter]] | None] = {PLAIN: None}
        self._setup = PLAIN
        self._in_use: Drafter | None = None

    def use(self, setup: Setup) -> Drafter | None:
        """From now on `setup` drafts; its drafter alone, None for plain decoding. Raises InputError."""
        if setup is not self._setup:
            self.prepare(setup)
            made = self._made[setup]
            self._in_use = None
            if made is not None:
                self._in_use, models = made
                for model in models:
                    model.stop_below = setup.stop_below
            self._setup = setup
        return self._in_use

    def prepare(self, setup: Setup) -> None:
        """Makes what drafts for `setup`. Raises InputError: it is not loaded, or its length is longer than allowed."""
        if setup in self._made:
            return
        if setup.length > self._max_length:
            raise InputError(f"{setup.name}: this run was made for speculation lengths up to {self._max_length}")
        assert setup.draft is not None
        parts = [self.part(part) for part in setup.draft.components]
        self._made[setup] = assembled(parts), [part for part in parts if isinstance(part, ModelDrafter)]

    def part(self, part: Draft) -> PartDrafter:
        """The drafter of one part of a draft. Raises InputError: it is not loaded."""
        if part.digest not in self._parts:
            self._parts[part.digest] = self._make(part)
        return self._parts[part.digest]

    def start(self, row: int, text: Text) -> None:
        """Only the draft in use takes in a new prompt; others do when they are switched to."""
        for part in self._parts.values():
            part.forget(row)
        if self._in_use is not None:
            self._in_use.start(row, text)

    def propose(self, text: Text, asked: list[int], places: torch.Tensor) -> Drafted:
        assert self._in_use is not None
        return self._in_use.propose(text, asked, places)

    def settle(self, text: Text) -> None:
        if self._in_use is not None:
            self._in_use.settle(text)


class Steered:
    """Steers `decoder`, whose drafter is `drafters`, as `controller` says."""

    def __init__(self, decoder: Decoder, drafters: Drafters, workload: Workload, controller: RoundController) -> None:
        self._decoder = decoder
        self._drafters = drafters
        self._workload = workload
        self._pilot = controller
        self._timeline: list[Turn] = []

    def run(self, prompts: Sequence[Prompt], clock: Clock) -> SteeredRun:
        """Decodes the queue. Raises BadNumbersError, and InputError for a pick that cannot be run."""
        # asked ahead, so that the first rows' prompts are taken in by the draft that is picked for them
        ahead: tuple[list[str], RoundDecision] | None = self._choose(prompts[: self._workload.batch_size])

        def play() -> None:
            nonlocal ahead
            in_use = [row.prompt for row in self._decoder.rows if row is not None]
            if ahead is None or ahead[0] != [prompt.domain for prompt in in_use]:
                ahead = self._choose(in_use)
            pick, ahead = ahead[1], None
            self._play(pick, clock)

        generations = self._decoder.run(prompts, clock, play)
        return SteeredRun(generations=tuple(generations), timeline=tuple(self._timeline))

    def _choose(self, prompts: Sequence[Prompt]) -> tuple[list[str], RoundDecision]:
        """(domains of the rows, the pick for them), which is made ready."""
        domains = [prompt.domain for prompt in prompts]
        pick = self._pilot.choose(
            batch_size=self._workload.batch_size,  # a step runs all rows, in use or not
            context_length=self._workload.context_length,
            domain=domains[0] if len(set(domains)) == 1 else None,
            temperature=self._workload.temperature,
        )
        if pick.score is not None:
            self._drafters.prepare(pick.score)
        self._drafters.use(pick.setup)
        self._decoder.length = pick.setup.length
        return domains, pick

    def _play(self, pick: RoundDecision, clock: Clock) -> None:
        text = self._decoder.text
        before = sum(map(len, text.host))
        started = clock.read()
        rows = self._decoder.round()
        seconds = clock.read() - started
        tokens = sum(map(len, text.host)) - before
        self._pilot.observe(RoundReport(pick, tuple(rows), seconds))
        scoring_s = 0.0
        if pick.score is not None and self._workload.temperature == 0.0:
            scoring_s = self._score(pick, pick.score, clock)
        self._timeline.append(Turn(pick.setup, len(rows), tokens, seconds, pick.probe, scoring_s))

    def _score(self, pick: RoundDecision, setup: Setup, clock: Clock) -> float:
        """Holds a draft model's choices against the rows' own outputs; seconds taken, 0.0 without anything new.

        The last round of a row is cut where its text ends, as at the end of an output. Look-ups are not scored.
        """
        parts = () if setup.draft is None else setup.draft.components
        match [self._drafters.part(part) for part in parts]:
            case [ModelDrafter() as draft]:
                pass
            case _:
                return 0.0
        firsts = {  # an output's first token is the prefill's; after an end token the device has text that is not kept
            number: row.prompt_tokens + 1
            for number, row in enumerate(self._decoder.rows)
            if row is not None and not row.run.ended
        }
        started = clock.read()
        flags = draft.score(self._decoder.text, firsts)
        seconds = clock.read() - started
        if not flags:
            return 0.0
        rows = tuple(one for kept in flags.values() for one in greedy_rounds(kept, setup.length))
        self._pilot.observe(RoundReport(pick, rows, seconds, scored=True))
        return seconds


def warm_up(target: RowStepper, drafts: Sequence[RowStepper], shape: tuple[int, int]) -> None:
    """Runs every kind of step once: a first one pays for allocation and, on a GPU, for the capture of its shape.

    `shape` is (context tokens, longest speculation length).
    """
    context_length, max_length = shape
    longest = context_length + max_length
    reaches, checks, widths = [longest], [1], []
    if target.device.type == "cuda":
        by_view = {graph_view(reach): reach for reach in (*range(SMALLEST_VIEW, longest, SMALLEST_VIEW), longest)}
        reaches, checks, widths = list(by_view.values()), list(range(1, max_length + 2)), list(CATCH_UP_WIDTHS)
    with torch.inference_mode():
        for reach in reaches:
            for width in checks:
                _run_once(target, reach, width, width)
            for draft in drafts:
                for width in (1, *widths):
                    _run_once(draft, reach, width, 1)
                    _run_once(draft, reach, width, width)


def _run_once(model: RowStepper, reach: int, width: int, keep: int) -> None:
    positions = torch.arange(reach - width, reach, device=model.device).expand(model.num_rows, -1)
    model.step(torch.zeros_like(positions), positions, reach, keep)
