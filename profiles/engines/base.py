"""What engines do differently, as data: how times are read, how a request ends, what is counted, what can be trusted.

Knows records only; every adapter states its own.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from profiles.records.core import Draft, DraftKind, Environment, Model, Prompt, Setup, Workload
from profiles.records.evidence import Acceptance, RoundCount, Sample, StepTimes, TargetTrace

SERVED_KINDS: tuple[DraftKind, ...] = ("model", "ngram", "native")  # what serving engines draft with


Times = Literal["steps", "rounds"]


Change = Literal["in place", "restart"]


Batching = Literal["padded", "continuous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """An engine's ways, stated where it is adapted and asked for wherever they matter.

    `times`: the target's and the drafts' steps are timed apart, or only whole rounds. `past_end`: a round drafts its
    full length although the output has less room, and counts what it accepts beyond. `batching`: in a padded batch
    every row of a round costs what the widest does, a row that is done too, and rows are prefilled one after another;
    in a continuous one a row costs its own tokens and rows that come in together are prefilled in one step, so that a
    load is kept up with requests that nobody asked for until the last one of interest is done. `num_drafts`: what the
    engine's own counter of drafts counts. `traced_kinds`: drafts whose acceptance it tells over a trace; other kinds
    are really run at every length. `keeps_history`: methods whose pool outlives a request, so that runs depend on what
    ran before. `sampled_objection`: why sampled speculation is not to be trusted in this version, None where it is.
    `drops_short`: a look-up drafts nothing where it may not draft as many tokens as its match has. `origin`: whose
    arithmetic traces are; empty is our own engine's.
    """

    name: str
    times: Times
    past_end: bool
    batching: Batching
    num_drafts: Literal["rounds", "rounds that proposed"]
    draft_kinds: tuple[DraftKind, ...]
    traced_kinds: tuple[DraftKind, ...]
    length_change: Change
    keeps_history: tuple[str, ...] = ()
    sampled_objection: str | None = None
    drops_short: bool = False
    origin: str = ""

    def traces(self, draft: Draft) -> bool:
        """Whether a draft is traced and timed; others are only run."""
        return draft.kind in self.traced_kinds

    def timed(self, drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        """Of these drafts the ones that are."""
        return tuple(draft for draft in drafts if self.traces(draft))

    def drafts_with(self, setup: Setup) -> bool:
        """Whether a setup can propose anything at all."""
        draft = setup.draft
        if draft is None or draft.min_match is None or not self.drops_short:
            return draft is not None
        return setup.length >= draft.min_match

    def objection(self, workload: Workload, *, drafting: bool) -> str | None:
        """Why a workload cannot be run here, or None."""
        if drafting and workload.temperature > 0.0 and self.sampled_objection is not None:
            return f"temperature {workload.temperature:g} with a draft: {self.sampled_objection}"
        return None


TORCH = EngineCapabilities(
    name="torch",
    times="steps",
    past_end=False,
    batching="padded",
    num_drafts="rounds",
    draft_kinds=("model", "ngram", "early_exit", "composite"),
    traced_kinds=("model", "ngram", "early_exit", "composite"),
    length_change="in place",
)


class Engine(Protocol):
    """A target and its drafts on a device.

    A method measures one unit; a caller may stop between units and lose nothing. Every method raises `EngineError`
    when the device fails and `InputError` when the models do not allow the workload. What an engine cannot be asked
    its `capabilities` say.
    """

    @property
    def capabilities(self) -> EngineCapabilities: ...

    @property
    def environment(self) -> Environment: ...

    @property
    def target(self) -> Model: ...

    @property
    def drafts(self) -> tuple[Draft, ...]: ...

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run of the target, alone in its batch; not timed."""
        ...

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """A draft, or a part of one, over the target's trace of this prompt, for every length up to `max_length`."""
        ...

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """The staircases of the target (widths 1..max_length+1) and of all drafts' parts, interleaved; by part digest.

        Each step is that of a whole batch, with `context_length` tokens cached in every row. Where the properties say
        `rounds`, the target has width 1 alone, a plain round, and every traced draft has whole rounds by the tokens
        verified: 1 (it proposed nothing) where that happens, and 1 + k for every k.
        """
        ...

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        """Real timed runs of a queue of prompts, one setup after another as given: a sample per setup and prompt.

        A batch of rows is kept full until the queue is empty; samples of one setup stand together. `purpose` names why
        (`race 0`, `proof 0`): evidence taken for one purpose never answers for another.
        """
        ...


class RoundController(Protocol):
    """Decides every round; `tuner.selector.selector.Selector` is one."""

    def choose(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> RoundDecision:
        """The setup to decode the next round with; for requests of several domains in a batch, `domain` is None."""
        ...

    def observe(self, report: RoundReport) -> bool:
        """Hears how a round went; False: the report is impossible and was refused."""
        ...


TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code


if TYPE_CHECKING:
    from profiles.records.core import Setup


class RoundDecision(
    namedtuple(
        "Pick",
        ("setup", "covered", "batch_size", "context_length", "domain", "temperature", "probe", "score"),
        defaults=(False, None),
    )
):
    """The setup of the next round, for every row of the batch.

    `covered`: False where nothing measured covers the question, so plain decoding it is and nothing is learned.
    `batch_size`, `context_length`, `domain`, `temperature`: the measured point that it rests on. `probe`: the round is
    spent on finding out. `score`: an engine that can is asked to score this setup over text that is already there, once
    the round is done (see `RoundReport.scored`); others take no notice.
    """

    __slots__ = ()
    setup: Setup
    covered: bool
    batch_size: int
    context_length: int
    domain: str
    temperature: float
    probe: bool
    score: Setup | None


class RoundReport(namedtuple("Round", ("pick", "rows", "seconds", "scored"), defaults=(False,))):
    """How a round went.

    `rows`: (tokens proposed, of them accepted) of every row that took part. `seconds`: the whole round, drafting and
    catching up included. `scored`: `pick.score` was not run but scored over text that was there; each of `rows` is a
    round that it would have been, and `seconds` is what the scoring took.
    """

    __slots__ = ()
    pick: RoundDecision
    rows: tuple[RoundCount, ...]
    seconds: float
    scored: bool
