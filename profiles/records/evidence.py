"""Records of what was measured: traces, acceptance, step times and timed runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from profiles.records.core import CATCH_UP_WIDTHS, LOOKUP_LENGTH, Draft, Model, Setup, all_finite
from profiles.records.errors import require


class RoundCount(NamedTuple):
    """Tokens that one sequence's round proposed, and how many of them were accepted."""

    proposed: int
    accepted: int


class StepShape(NamedTuple):
    """What one round ran: tokens per sequence of the target's step, and the draft model's steps (0: it did not run).

    `first_draft_width` is the tokens per sequence of the draft model's first step, which also takes in what it missed.
    """

    target_width: int
    draft_steps: int = 0
    first_draft_width: int = 0


Rounds = Mapping[RoundCount, int]
Shapes = Mapping[StepShape, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTrace:
    """One plain run: emitted tokens, the target's probability of each, and the gap of its two largest logits.

    `target_probs` are taken after temperature, top-k and top-p (greedy: of the unfiltered softmax).
    """

    prompt_digest: str
    token_ids: tuple[int, ...]
    target_probs: tuple[float, ...]
    logit_gaps: tuple[float, ...]
    ended: bool  # the last token is an end token

    def __post_init__(self) -> None:
        size = len(self.token_ids)
        require(size > 0, "a target trace is empty")
        require(len(self.target_probs) == size == len(self.logit_gaps), "a target trace has columns of unequal length")
        require(
            all_finite(self.target_probs) and all_finite(self.logit_gaps), "a target trace holds a value not finite"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceTrace:
    """A draft model over a target trace: by position the probability of acceptance, and the draft's largest one.

    `accept_probs[i]` is `min(1, draft_prob / target_prob)` of the emitted token (Leviathan et al. 2023), 0 or 1 when
    greedy. Position 0 comes from the prefill and is never drafted.
    """

    prompt_digest: str
    draft_digest: str
    accept_probs: tuple[float, ...]
    confidences: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.accept_probs) > 0, "an acceptance trace is empty")
        require(len(self.accept_probs) == len(self.confidences), "an acceptance trace has columns of unequal length")
        require(all(0.0 <= value <= 1.0 for value in self.accept_probs), "an accept probability is outside 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupTrace:
    """Proposals over a target trace, of a look-up or recorded: for a round starting at i, tokens proposed and accepted.

    Both are for a speculation length of `max_length`; a shorter one proposes a prefix.
    """

    prompt_digest: str
    draft_digest: str
    max_length: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.proposed) == len(self.accepted) > 0, "a look-up trace has columns of unequal length")
        pairs = zip(self.accepted, self.proposed, strict=True)
        good = all(0 <= accepted <= proposed <= self.max_length for accepted, proposed in pairs)
        require(good, "a look-up trace accepts more than it proposed, or proposes more than its length")


Acceptance = AcceptanceTrace | LookupTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of one step at each width (tokens per sequence), with `context_length` tokens cached.

    For an n-gram draft, width is the speculation length and the time is the host's search.
    """

    component_digest: str  # the target's or the draft's
    batch_size: int
    context_length: int
    samples_s: Mapping[int, tuple[float, ...]]
    disturbed: bool = False  # other processes used the machine although the sweep was repeated

    def __post_init__(self) -> None:
        require(len(self.samples_s) > 0, "step times without a width")
        for width, samples in self.samples_s.items():
            good = width >= 1 and len(samples) > 0 and all_finite(samples) and min(samples) > 0.0
            require(good, f"step times at width {width} are {list(samples)[:3]}: positive seconds are needed")
        object.__setattr__(self, "samples_s", MappingProxyType(dict(sorted(self.samples_s.items()))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One timed run of one prompt, in a row of a batch."""

    setup_digest: str
    prompt_digest: str
    ttft_s: float  # from the request (without a server: from when its row was free) to its first token
    decode_s: float  # first token to last
    output_tokens: int
    rounds: Rounds  # its own
    shapes: Shapes = field(default_factory=dict)  # steps of the whole batch meanwhile; older evidence has none
    refills: int = 0  # other rows' prefills that it waited for
    output_digest: str
    disturbed: bool = False  # other processes used the machine although the run was repeated
    cores: float | None = field(default=None, compare=False)  # processor seconds per second of the run; not stored
    threads: int | None = field(default=None, compare=False)  # of the process that ran it, where it says; not stored

    def __post_init__(self) -> None:
        require(self.output_tokens >= 1, f"a run emitted {self.output_tokens} tokens")
        good = all_finite((self.ttft_s, self.decode_s)) and self.ttft_s > 0.0 and self.decode_s >= 0.0
        require(good, f"a run took {self.ttft_s} + {self.decode_s} s")
        rounds = {RoundCount(*pair): count for pair, count in sorted(self.rounds.items())}
        shapes = {StepShape(*shape): count for shape, count in sorted(self.shapes.items())}
        for (proposed, accepted), count in rounds.items():
            require(0 <= accepted <= proposed and count >= 1, f"round ({proposed}, {accepted}) counted {count} times")
        for shape, count in shapes.items():
            require(min(shape) >= 0 and count >= 1, f"{shape} counted {count} times")
        require(self.refills >= 0, f"a run waited for {self.refills} prefills")
        object.__setattr__(self, "rounds", MappingProxyType(rounds))
        object.__setattr__(self, "shapes", MappingProxyType(shapes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasible:
    """A setup that could not be measured, and why: never a number."""

    setup: Setup
    reason: str
    detail: str


def sparse_lengths(max_length: int) -> list[int]:
    """Powers of two and the longest length: where whole rounds are timed; those between are interpolated."""
    return sorted({2**power for power in range(max_length.bit_length())} | {max_length})


def between_widths(by_width: Mapping[int, Any], width: int) -> Any:
    """The value (a number, or an array) at a width, on a line between those that were timed; None: beyond them."""
    low = max((timed for timed in by_width if timed <= width), default=None)
    high = min((timed for timed in by_width if timed >= width), default=None)
    if low is None or high is None:
        return None
    share = (width - low) / (high - low) if high > low else 0.0
    return (1.0 - share) * by_width[low] + share * by_width[high]


def covers(times: Mapping[str, StepTimes], target: Model, drafts: tuple[Draft, ...], max_length: int) -> bool:
    """Whether step times, by component digest, are enough for every length up to `max_length` of all `drafts`.

    The target is needed at widths 1 to max_length + 1, every component of a draft too, and the model of a composite
    draft at all widths of a first step. Where whole rounds are timed (the target has width 1 alone), every component is
    needed at the widths of `sparse_lengths` or a wider last one, a composite's look-up as far as it drafts. `drafts`
    are those that are timed (`EngineCapabilities.timed`).
    """
    target_times = times.get(target.run_digest)
    if target_times is None:
        return False
    if set(target_times.samples_s) == {1}:
        longest = {part.digest: max_length for draft in drafts for part in draft.components}
        longest |= {
            draft.components[0].digest: max(max_length, LOOKUP_LENGTH) for draft in drafts if draft.kind == "composite"
        }
        widths = {part: times[part].samples_s.keys() if part in times else () for part in longest}
        return all(
            max(widths[part], default=0) > length and {k + 1 for k in sparse_lengths(length)[:-1]} <= set(widths[part])
            for part, length in longest.items()
        )
    if not set(range(1, max_length + 2)) <= target_times.samples_s.keys():
        return False
    if not all(component.digest in times for draft in drafts for component in draft.components):
        return False
    models = [draft.components[1].digest for draft in drafts if draft.kind == "composite"]
    return all(set(CATCH_UP_WIDTHS) <= times[model].samples_s.keys() for model in models)
