"""What can be measured, and how it is asked: the protocol of an engine, and of what steers its rounds.

The torch engine, the recorded engine and the remembering wrapper all fit the first, a selector the second. Knows
records only.
"""

from typing import Protocol

from profiles.properties import Properties
from profiles.steering import Pick, Round
from profiles.terms import (
    Acceptance,
    Draft,
    Environment,
    Model,
    Prompt,
    Sample,
    Setup,
    StepTimes,
    TargetTrace,
    Workload,
)


class Engine(Protocol):
    """A target and its drafts on a device.

    A method measures one unit; a caller may stop between units and lose nothing. Every method raises `EngineError`
    when the device fails and `InputError` when the models do not allow the workload. What an engine cannot be asked
    its `properties` say.
    """

    @property
    def properties(self) -> Properties: ...

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
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], occasion: str
    ) -> tuple[Sample, ...]:
        """Real timed runs of a queue of prompts, one setup after another as given: a sample per setup and prompt.

        A batch of rows is kept full until the queue is empty; samples of one setup stand together. `occasion` names why
        (`race 0`, `proof 0`): evidence taken for one purpose never answers for another.
        """
        ...


class Pilot(Protocol):
    """Decides every round; `tuner.selector.Selector` is one."""

    def choose(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> Pick:
        """The setup to decode the next round with; for requests of several domains in a batch, `domain` is None."""
        ...

    def observe(self, report: Round) -> bool:
        """Hears how a round went; False: the report is impossible and was refused."""
        ...
