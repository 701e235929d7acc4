"""The Engine protocol, what engines do differently, and the protocol between an engine and a round controller."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from profiles.records.core import Draft, DraftKind, Environment, Model, Prompt, Setup, Workload
from profiles.records.evidence import Acceptance, RoundCount, Sample, StepTimes, TargetTrace

SERVED_KINDS: tuple[DraftKind, ...] = ("model", "ngram", "native")  # what serving engines draft with
Times = Literal["steps", "rounds"]
Batching = Literal["padded", "continuous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine can measure, and how its rounds work.

    A `padded` round costs every row what the widest one does, finished rows included, and rows are prefilled one after
    another. In a `continuous` batch a row costs its own tokens, and new rows share one prefill; more requests than
    asked for keep the load constant until the last measured one is done.
    """

    name: str
    times: Times = "rounds"  # steps of the target and of the drafts are timed apart, or only whole rounds are
    past_end: bool  # a round drafts its full length even where the output needs less, and counts it as accepted
    batching: Batching = "continuous"
    traced_kinds: tuple[DraftKind, ...]  # whose acceptance is computed over a trace; others are run at every length
    untraced: frozenset[str] = frozenset()  # digests of drafts of these kinds that are run at every length all the same
    sampling_objection: str | None = None  # why sampled speculation is not lossless in this version; None where it is
    drops_short: bool = False  # a look-up drafts nothing when it may draft fewer tokens than its shortest match
    origin: str = ""  # whose arithmetic the traces are; empty for the torch engine

    def traces(self, draft: Draft) -> bool:
        """Whether a draft is traced and timed; others are only run."""
        return draft.kind in self.traced_kinds and draft.digest not in self.untraced

    def timed(self, drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        """The drafts among these that are traced and timed."""
        return tuple(draft for draft in drafts if self.traces(draft))

    def drafts_with(self, setup: Setup) -> bool:
        """Whether a setup can propose anything at all."""
        draft = setup.draft
        if draft is None or draft.min_match is None or not self.drops_short:
            return draft is not None
        return setup.length >= draft.min_match

    def objection(self, workload: Workload, *, drafting: bool) -> str | None:
        """Why a workload cannot be run here, or None."""
        if drafting and workload.temperature > 0.0 and self.sampling_objection is not None:
            return f"temperature {workload.temperature:g} with a draft: {self.sampling_objection}"
        return None


TORCH = EngineCapabilities(
    name="torch",
    times="steps",
    past_end=False,
    batching="padded",
    traced_kinds=("model", "ngram", "early_exit", "composite"),
)


class Engine(Protocol):
    """A target and its drafts on a device.

    A method measures one unit, so a caller may stop between units and lose nothing. Every method raises `EngineError`
    when the device fails and `InputError` when the models do not allow the workload.
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

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """The acceptance of one component of a draft over the target's trace, for every length up to `max_length`."""

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Step times by component digest: the target at widths 1..max_length+1 and all drafts' components, interleaved.

        Each step is one of a whole batch with `context_length` tokens cached in every row. Where the capabilities say
        `rounds`, the target has width 1 alone, a plain round, and every traced draft has whole rounds by the tokens
        verified: 1 + k for every k, and 1 (nothing proposed) where that happens.
        """

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        """Timed runs of a queue of prompts, one setup after another: a sample per setup and prompt, by setup.

        A batch of rows is kept full until the queue is empty. `purpose` says what the runs are for (`race 0`,
        `proof 0`): evidence taken for one purpose never answers for another.
        """


class RequestInfo(NamedTuple):
    """A request of a batch, as a controller is told of it.

    `id` is unique while it is served. `domain`: its label, None when not known. `context_length`: tokens of prompt and
    output, as far as known.
    """

    id: Hashable
    domain: str | None = None
    context_length: int | None = None
    temperature: float = 0.0


class RoundDecision(NamedTuple):
    """The setup of the next round and the measured operating point that it rests on.

    `covered`: False where nothing measured covers the query; the round is then plain decoding and is not learned from.
    `probe`: the round is spent on finding out. `requests`: as they were given. `lengths`: by request, where they differ
    from the setup's; none of them is longer. `catch_up`: the draft first reads text that it missed.
    """

    setup: Setup
    covered: bool
    batch_size: int
    context_length: int
    domain: str
    temperature: float
    probe: bool = False
    requests: tuple[RequestInfo, ...] = ()
    lengths: tuple[int, ...] = ()
    catch_up: bool = False


class RoundReport(NamedTuple):
    """How a round went, by row that took part.

    `seconds`: of the whole round, drafting and catching up included; None where they cannot be told from other work,
    such as a prefill in the same step. `extra_s`: what rows waited besides for the draft to read prompts, and plain
    decoding would not. `ids`: the rows' requests; None: those of the decision, all of them and in its order.
    """

    decision: RoundDecision
    rows: tuple[RoundCount, ...]
    seconds: float | None
    extra_s: float = 0.0
    ids: tuple[Hashable, ...] | None = None


class RoundController(Protocol):
    """Decides every round; `tuner.selector.selector.Selector` is one."""

    def choose(
        self,
        *,
        batch_size: int | None = None,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
        requests: Sequence[RequestInfo] = (),
        per_request: bool = False,
    ) -> RoundDecision:
        """The setup of the next round; `domain` is None when the requests in the batch are of several domains."""

    def observe(self, report: RoundReport) -> bool:
        """Learns from a round; False: the report is impossible and was refused."""

    def finish(self, requests: Iterable[Hashable]) -> None:
        """Forgets requests that ended."""
