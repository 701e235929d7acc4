"""A queue of prompts decoded under a round controller: every round may use another draft or length, for all rows.

Drafts stay ready between rounds: one that is switched to takes in the text it missed as part of its first round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from profiles.engines.base import RequestInfo, RoundController, RoundDecision, RoundReport
from profiles.engines.torch.batch_model import SMALLEST_VIEW, RowModel, graph_view
from profiles.engines.torch.decoder import Decoder, Generation
from profiles.engines.torch.drafters import ComponentDrafter, Drafted, Drafter, ModelDrafter, Text, combined_drafter
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Prompt, Setup
from profiles.records.errors import InputError
from profiles.timing.clock import Clock


class AdaptiveRound(NamedTuple):
    """One round: `rows` took part and `tokens` were emitted in `seconds`."""

    setup: Setup
    rows: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveRun:
    """What was emitted, by prompt in the order given, and the rounds in the order they were run."""

    generations: tuple[Generation, ...]
    rounds: tuple[AdaptiveRound, ...]


class SwitchableDrafter:
    """All drafts of an engine, one of them in use; fits `Drafter`.

    Drafts that share a component share what it has taken in.

    Args:
        make: Makes the drafter of a component; raises InputError where the component is not loaded.
        max_length: The longest speculation length.
    """

    def __init__(self, make: Callable[[Draft], ComponentDrafter], max_length: int) -> None:
        self._make = make
        self._max_length = max_length
        self._components: dict[str, ComponentDrafter] = {}
        self._setup = PLAIN
        self._in_use: Drafter | None = None
        self._by_setup: dict[Setup, tuple[Drafter | None, list[ModelDrafter]]] = {PLAIN: (None, [])}

    def use(self, setup: Setup) -> Drafter | None:
        """Makes `setup` the one in use; returns its drafter, None for plain decoding.

        Raises InputError: its draft is not loaded, or its length is longer than allowed.
        """
        if setup is not self._setup:
            if setup not in self._by_setup:
                self._by_setup[setup] = self._prepare(setup)
            self._in_use, models = self._by_setup[setup]
            for model in models:
                model.stop_below = setup.stop_below
            self._setup = setup
        return self._in_use

    def _prepare(self, setup: Setup) -> tuple[Drafter, list[ModelDrafter]]:
        if setup.length > self._max_length:
            raise InputError(f"{setup.name}: this run was made for speculation lengths up to {self._max_length}")
        assert setup.draft is not None
        drafters = []
        for component in setup.draft.components:
            if component.digest not in self._components:
                self._components[component.digest] = self._make(component)
            drafters.append(self._components[component.digest])
        return combined_drafter(drafters), [drafter for drafter in drafters if isinstance(drafter, ModelDrafter)]

    def start(self, row: int, text: Text) -> float:
        """Only the draft in use takes in a new prompt; others do when they are switched to."""
        for component in self._components.values():
            component.forget(row)
        return 0.0 if self._in_use is None else self._in_use.start(row, text)

    def propose(self, text: Text, limits: list[int], positions: torch.Tensor) -> Drafted:
        assert self._in_use is not None
        return self._in_use.propose(text, limits, positions)

    def settle(self, text: Text) -> None:
        if self._in_use is not None:
            self._in_use.settle(text)


class AdaptiveLoop:
    """Runs `decoder`, whose drafter is `drafter`, as `controller` decides."""

    def __init__(self, decoder: Decoder, drafter: SwitchableDrafter, controller: RoundController) -> None:
        self._decoder = decoder
        self._drafter = drafter
        self._controller = controller
        self._rounds: list[AdaptiveRound] = []

    def run(self, prompts: Sequence[Prompt], clock: Clock) -> AdaptiveRun:
        """Decodes the queue. Raises BadNumbersError, and InputError for a setup that cannot be run."""
        # decided ahead, so that the first rows' prompts are taken in by the draft that was chosen for them
        first = prompts[: self._decoder.workload.batch_size]
        ahead: RoundDecision | None = self._decide({id(prompt): prompt for prompt in first})
        served: set[int] = set()

        def run_round() -> None:
            nonlocal ahead, served
            # a row's generation tells its request apart
            in_use = {id(row.run): row.prompt for row in self._decoder.rows if row is not None}
            self._controller.finish(served - in_use.keys())
            if ahead is None or [prompt.domain for prompt in first] != [prompt.domain for prompt in in_use.values()]:
                ahead = self._decide(in_use)
            decision, ahead, served = ahead, None, set(in_use)
            self._run_round(decision, clock, tuple(in_use))

        generations = self._decoder.run(prompts, clock, run_round)
        self._controller.finish(served)
        return AdaptiveRun(generations=tuple(generations), rounds=tuple(self._rounds))

    def _decide(self, prompts: Mapping[int, Prompt]) -> RoundDecision:
        """The decision for requests of these prompts; its draft and lengths are the ones in use from now on."""
        workload, domains = self._decoder.workload, {prompt.domain for prompt in prompts.values()}
        decision = self._controller.choose(
            batch_size=workload.batch_size,  # a step runs all rows, in use or not
            context_length=workload.context_length,
            domain=domains.pop() if len(domains) == 1 else None,
            temperature=workload.temperature,
            requests=[
                RequestInfo(number, prompt.domain, workload.context_length, workload.temperature)
                for number, prompt in prompts.items()
            ],
        )
        self._drafter.use(decision.setup)
        self._decoder.length = decision.setup.length
        return decision

    def _run_round(self, decision: RoundDecision, clock: Clock, ids: tuple[int, ...]) -> None:
        text = self._decoder.text
        numbers = [number for number, row in enumerate(self._decoder.rows) if row is not None]
        self._decoder.row_lengths = dict(zip(numbers, decision.lengths, strict=bool(decision.lengths)))
        before = sum(map(len, text.host))
        started_s = clock.read()
        rows = self._decoder.round()
        seconds = clock.read() - started_s
        tokens = sum(map(len, text.host)) - before
        self._controller.observe(RoundReport(decision, tuple(rows), seconds, ids=ids))
        self._rounds.append(AdaptiveRound(decision.setup, len(rows), tokens, seconds))


def warm_up(target: RowModel, drafts: Sequence[RowModel], *, context_length: int, max_length: int) -> None:
    """Runs every kind of step once: a first one pays for allocation and, on a GPU, for the capture of its shape."""
    longest = context_length + max_length
    reaches, verify_widths, draft_widths = [longest], [1], [1]
    if target.device.type == "cuda":
        by_view = {graph_view(reach): reach for reach in (*range(SMALLEST_VIEW, longest, SMALLEST_VIEW), longest)}
        reaches, verify_widths = list(by_view.values()), list(range(max_length + 1, 0, -1))
        draft_widths = [1, *CATCH_UP_WIDTHS]
    with torch.inference_mode():
        for reach in reaches:
            for width in verify_widths:
                _run_once(target, reach, width, width)
            for draft in drafts:
                for width in draft_widths:
                    _run_once(draft, reach, width, 1)


def _run_once(model: RowModel, reach: int, width: int, keep: int) -> None:
    positions = torch.arange(reach - width, reach, device=model.device).expand(model.num_rows, -1)
    model.step(torch.zeros_like(positions), positions, reach, keep)
