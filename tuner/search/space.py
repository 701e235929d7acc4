"""The cheap level of the search: forecasts alone decide among drafts, lengths, look-up windows and confidence stops.

A space of thousands of setups promises more than it keeps, so setups are selected on some prompts and estimated again
on others. At batch 1: rounds in a batch are not replayed with a stop.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from profiles.acceptance.expected_rounds import combine, expected_rounds
from profiles.acceptance.ngram import trace_lookup
from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Draft, Interval, Prompt, Setup, Workload
from profiles.records.errors import require
from profiles.records.evidence import Acceptance, StepShape
from profiles.stats import speedup_interval
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.search.objective import candidates

MAX_LENGTH = 64
WINDOWS = tuple((longest, shortest) for longest in range(1, 6) for shortest in range(1, longest + 1))
STOPS = (None, 0.2, 0.4, 0.6, 0.8)
EVALUATIONS = 400  # forecasts beyond the grid
NUM_ESTIMATED = 20  # setups that are estimated again on other prompts
Speedup = Callable[[Setup], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Drafts at every length, with every window (longest and shortest match) of a look-up and every stop of a model."""

    drafts: tuple[Draft, ...]
    max_length: int = MAX_LENGTH
    windows: tuple[tuple[int, int], ...] = WINDOWS
    stops: tuple[float | None, ...] = STOPS

    def choices(self, draft: Draft) -> tuple[Sequence[tuple[int, int] | None], Sequence[float | None]]:
        """The windows and the stops that a draft can have."""
        has_stop = draft.kind in ("model", "composite", "early_exit")
        return self.windows if draft.looks_up else (None,), self.stops if has_stop else (None,)

    def setups(self) -> list[Setup]:
        """Every setup once."""
        made = (
            point_setup(draft, length, window, stop)
            for draft in self.drafts
            for window, stop in product(*self.choices(draft))
            for length in range(1, self.max_length + 1)
        )
        return list(dict.fromkeys(made))

    def neighbours(self, setup: Setup) -> list[Setup]:
        """The setups that differ in one thing: draft, length by one, a quarter or twice, window or stop by one step."""
        draft, length, stop = setup.draft, setup.length, setup.stop_below
        assert draft is not None
        window = (draft.max_match or 0, draft.min_match or 0)
        near = []
        for other in self.drafts:
            windows, stops = self.choices(other)
            near.append(
                point_setup(other, length, window if window in windows else None, stop if stop in stops else None)
            )
        windows, stops = self.choices(draft)
        lengths = sorted({length - 1, length + 1, length * 3 // 4, length * 5 // 4, length // 2, length * 2})
        near += [point_setup(draft, k, None, stop) for k in lengths if 1 <= k <= self.max_length]
        beside = [pair for pair in windows if pair and abs(pair[0] - window[0]) + abs(pair[1] - window[1]) == 1]
        near += [point_setup(draft, length, pair, stop) for pair in beside]
        at = stops.index(stop)
        near += [
            point_setup(draft, length, None, other) for other in (*stops[max(0, at - 1) : at], *stops[at + 1 : at + 2])
        ]
        return [other for other in dict.fromkeys(near) if other != setup]


def point_setup(draft: Draft, length: int, window: tuple[int, int] | None, stop: float | None) -> Setup:
    """A point of a space; without a window the draft's own."""
    if window is not None:
        draft = replace(draft, max_match=window[0], min_match=window[1])
    return Setup(draft=draft, length=length, stop_below=stop)


def climb(space: Space, speedup: Speedup, starts: Iterable[Setup], evaluations: int) -> dict[Setup, float]:
    """Speed-ups of `evaluations` setups at most: of the starts, then uphill from the best that was not left yet."""
    values: dict[Setup, float] = {}
    for setup in starts:
        if len(values) < evaluations:
            values[setup] = speedup(setup)
    left: set[Setup] = set()
    while len(values) < evaluations and len(left) < len(values):
        best = max((setup for setup in values if setup not in left), key=values.__getitem__)
        left.add(best)
        for setup in space.neighbours(best):
            if setup not in values and len(values) < evaluations:
                values[setup] = speedup(setup)
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """A setup that a search found: the speed-up on the prompts that selected it, and on those that did not."""

    setup: Setup
    selected: float
    speedup: Interval


def search_space(
    engine: Engine, workload: Workload, prompts: Sequence[Prompt], lengths: Sequence[int], stops: Sequence[float | None]
) -> list[Estimated]:
    """The best setups by their speed-up on the half of the prompts that did not select them, best first.

    Lengths are extended up to 64 while the best is the longest; of a caching engine only the longer step times and
    look-ups are measured then. Raises: InputError: a batch, or an engine that times whole rounds. EngineError.
    """
    require(workload.batch_size == 1, f"batch size {workload.batch_size}: the space is searched at batch 1")
    capabilities = engine.capabilities
    require(capabilities.times == "steps", f"engine {capabilities.name}: only the torch engine times steps apart")
    longest = max(lengths)
    while True:
        evidence = gather(engine, workload, prompts, sorted({*lengths, longest}))
        forecaster = Forecaster(evidence, workload, engine.target.run_digest)
        priced = SpaceForecaster(evidence, workload, forecaster, longest)
        space = Space(drafts=evidence.drafts, max_length=longest, stops=tuple(stops))
        ordered = sorted(evidence.prompts, key=lambda prompt: (prompt.domain, prompt.digest))
        halves = ordered[::2], ordered[1::2]
        grid = candidates(evidence.drafts, lengths)[1:]
        values = climb(space, partial(priced.speedup, prompts=halves[0]), grid, len(grid) + EVALUATIONS)
        ranked = sorted(values, key=values.__getitem__, reverse=True)
        if longest >= MAX_LENGTH or ranked[0].length < longest:
            break
        longest = min(MAX_LENGTH, 2 * longest)
    estimated = [
        Estimated(setup=setup, selected=values[setup], speedup=priced.interval(setup, halves[1]))
        for setup in ranked[:NUM_ESTIMATED]
    ]
    return sorted(estimated, key=lambda row: row.speedup.estimate, reverse=True)


class SpaceForecaster:
    """Speed-ups of a space's setups on any of the traced prompts, at batch 1.

    A look-up's other windows are traced here, from the target's trace, and take the time and the overhead of the window
    that was timed.
    """

    def __init__(self, evidence: Evidence, workload: Workload, forecaster: Forecaster, max_length: int) -> None:
        self._evidence, self._workload, self._forecaster = evidence, workload, forecaster
        self._max_length = max_length
        self._timed = {_family(draft): draft for draft in evidence.drafts}
        self._acceptances: dict[tuple[str, str], Acceptance] = {}
        self._round_s: dict[tuple[Draft | None, int, StepShape], float] = {}
        self._plain_s = forecaster.round_s(PLAIN, StepShape(1))

    def seconds(self, setup: Setup, prompt: Prompt) -> float:
        """Expected seconds of decoding a prompt's output; per setup and prompt, and linear in its rounds."""
        trace = self._evidence.traces[prompt.digest]
        assert setup.draft is not None
        acceptance = combine([self._acceptance(part, prompt) for part in setup.draft.components])
        rounds = expected_rounds(
            trace, acceptance, setup.length, self._workload.max_new_tokens, stop_below=setup.stop_below
        )
        timed = self._timed[_family(setup.draft)]
        return sum(count * self._seconds_of(timed, setup.length, shape) for shape, count in rounds.shapes.items())

    def speedup(self, setup: Setup, prompts: Sequence[Prompt]) -> float:
        """Ratio of totals over the prompts."""
        plain_s = sum(self.plain_seconds(prompt) for prompt in prompts)
        return plain_s / sum(self.seconds(setup, prompt) for prompt in prompts)

    def interval(self, setup: Setup, prompts: Sequence[Prompt]) -> Interval:
        """The speed-up with its 95 % interval over prompts; step times count as exact. InputError: under 2 prompts."""
        plain_s = [self.plain_seconds(prompt) for prompt in prompts]
        tokens = [len(self._evidence.traces[prompt.digest].token_ids) - 1 for prompt in prompts]
        seconds = [self.seconds(setup, prompt) for prompt in prompts]
        domains = [prompt.domain for prompt in prompts]
        return speedup_interval(plain_s, tokens, seconds, tokens, strata=domains)[0]

    def plain_seconds(self, prompt: Prompt) -> float:
        """Seconds of decoding a prompt's output plainly."""
        return self._plain_s * (len(self._evidence.traces[prompt.digest].token_ids) - 1)

    def _acceptance(self, part: Draft, prompt: Prompt) -> Acceptance:
        if part.kind != "ngram":
            return self._evidence.acceptances[part.digest, prompt.digest]
        key = part.digest, prompt.digest
        if key not in self._acceptances:
            trace = self._evidence.traces[prompt.digest]
            self._acceptances[key] = trace_lookup(part, prompt, trace, self._max_length)
        return self._acceptances[key]

    def _seconds_of(self, draft: Draft, length: int, shape: StepShape) -> float:
        key = draft, length, shape
        if key not in self._round_s:
            self._round_s[key] = self._forecaster.round_s(Setup(draft=draft, length=length), shape)
        return self._round_s[key]


def _family(draft: Draft) -> tuple[object, ...]:
    """What drafts that differ in their window alone share."""
    return draft.kind, draft.model, draft.num_layers, draft.method
