"""The cheap level of the search: forecasts alone decide among drafts, lengths, look-up windows and confidence stops.

All lengths of a draft are forecast in one pass, so every setup of a space is; no sampler is needed. A space of
thousands of setups promises more than it keeps, so setups are selected on some prompts and estimated again on others.
At batch 1: rounds in a batch are not replayed with a stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy

from profiles.acceptance.expected_rounds import catch_up_width, stop_rule
from profiles.acceptance.ngram import trace_lookup
from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Draft, Interval, Prompt, Setup, Workload
from profiles.records.errors import require
from profiles.records.evidence import AcceptanceTrace, StepShape
from profiles.stats import speedup_interval
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.lengths import Array, Lookup, Model, Prices, seconds_of_lengths

MAX_LENGTH = 64
WINDOWS = tuple((longest, shortest) for longest in range(1, 6) for shortest in range(1, longest + 1))
STOPS = (None, 0.3, 0.6)
NUM_ESTIMATED = 20  # setups that are estimated again on other prompts


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


def point_setup(draft: Draft, length: int, window: tuple[int, int] | None, stop: float | None) -> Setup:
    """A point of a space; without a window the draft's own."""
    if window is not None:
        draft = replace(draft, max_match=window[0], min_match=window[1])
    return Setup(draft=draft, length=length, stop_below=stop)


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
        ordered = sorted(evidence.prompts, key=lambda prompt: (prompt.domain, prompt.digest))
        halves = ordered[::2], ordered[1::2]
        setups = Space(drafts=evidence.drafts, max_length=longest, stops=tuple(stops)).setups()
        values = {setup: priced.speedup(setup, halves[0]) for setup in setups}
        ranked = sorted(values, key=values.__getitem__, reverse=True)[:NUM_ESTIMATED]
        if longest >= MAX_LENGTH or ranked[0].length < longest:
            break
        longest = min(MAX_LENGTH, 2 * longest)
    estimated = [
        Estimated(setup=setup, selected=values[setup], speedup=priced.interval(setup, halves[1])) for setup in ranked
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
        self._rows = {prompt.digest: row for row, prompt in enumerate(evidence.prompts)}
        self._sizes = numpy.array([len(evidence.traces[prompt.digest].token_ids) for prompt in evidence.prompts])
        self._plain_s = forecaster.round_s(PLAIN, StepShape(1)) * (self._sizes - 1)
        self._lookups: dict[Draft, Lookup] = {}
        self._priced: dict[Draft, Prices] = {}
        self._seconds: dict[tuple[Draft, float | None], Array] = {}

    def speedup(self, setup: Setup, prompts: Sequence[Prompt]) -> float:
        """Ratio of totals over the prompts."""
        rows = [self._rows[prompt.digest] for prompt in prompts]
        return float(self._plain_s[rows].sum() / self._of(setup)[rows].sum())

    def interval(self, setup: Setup, prompts: Sequence[Prompt]) -> Interval:
        """The speed-up with its 95 % interval over prompts; step times count as exact. InputError: under 2 prompts."""
        rows = [self._rows[prompt.digest] for prompt in prompts]
        tokens = (self._sizes[rows] - 1).tolist()
        columns = self._plain_s[rows].tolist(), tokens, self._of(setup)[rows].tolist(), tokens
        return speedup_interval(*columns, strata=[prompt.domain for prompt in prompts])[0]

    def _of(self, setup: Setup) -> Array:
        """Expected seconds of decoding every prompt's output."""
        assert setup.draft is not None
        key = setup.draft, setup.stop_below
        if key not in self._seconds:
            self._seconds[key] = self._walk(setup.draft, setup.stop_below)
        return self._seconds[key][:, setup.length - 1]

    def _walk(self, draft: Draft, stop: float | None) -> Array:
        lookup = model = None
        for part in draft.components:
            if part.kind == "ngram":
                lookup = self._lookup(part)
            else:
                model = self._model(part, stop)
        prices = self._prices(self._timed[_family(draft)])
        return seconds_of_lengths(self._sizes, self._workload.max_new_tokens, prices, lookup=lookup, model=model)

    def _lookup(self, part: Draft) -> Lookup:
        """What a window proposes at every token of every prompt's trace."""
        if part not in self._lookups:
            traces = [
                trace_lookup(part, prompt, self._evidence.traces[prompt.digest], self._max_length)
                for prompt in self._evidence.prompts
            ]
            self._lookups[part] = Lookup(
                proposed=_padded([trace.proposed for trace in traces]).astype(int),
                accepted=_padded([trace.accepted for trace in traces]).astype(int),
            )
        return self._lookups[part]

    def _model(self, part: Draft, stop: float | None) -> Model:
        acceptances = [self._evidence.acceptances[part.digest, prompt.digest] for prompt in self._evidence.prompts]
        traces = [acceptance for acceptance in acceptances if isinstance(acceptance, AcceptanceTrace)]
        probs = _padded([trace.accept_probs for trace in traces])
        if stop is None:
            return Model(accept_probs=probs)
        past_rejection = numpy.array([round(stop_rule(trace, stop).past_rejection) for trace in traces])
        confidences = _padded([trace.confidences for trace in traces], 1.0)
        return Model(accept_probs=probs, is_sure=confidences >= stop, past_rejection=past_rejection)

    def _prices(self, draft: Draft) -> Prices:
        """What rounds of a draft take; the width of a first step adds its time to the rest."""
        if draft not in self._priced:
            most, has_model = self._max_length, draft.kind != "ngram"

            def round_s(length: int, *shape: int) -> float:
                return self._forecaster.round_s(Setup(draft=draft, length=length), StepShape(*shape))

            widths = [catch_up_width(max(1, behind)) for behind in range(self._workload.max_new_tokens + 3)]
            first_s = {width: round_s(1, 2, 1, width) - round_s(1, 2, 1, 2) if has_model else 0.0 for width in widths}
            self._priced[draft] = Prices(
                looked_up=numpy.array([round_s(1, proposed + 1) for proposed in range(most + 1)]),
                modelled=numpy.array(
                    [[round_s(1, proposed + 1, proposed + more, 2) for more in (0, 1)] for proposed in range(most + 1)]
                ),
                catch_up=numpy.array([first_s[width] for width in widths]),
                per_length=numpy.array([round_s(length, 1) - round_s(1, 1) for length in range(1, most + 1)]),
            )
        return self._priced[draft]


def _padded(columns: Sequence[Sequence[float]], value: float = 0.0) -> Array:
    """Rows of unequal length as one array, (rows, longest)."""
    padded = numpy.full((len(columns), max(map(len, columns))), value)
    for row, column in zip(padded, columns, strict=True):
        row[: len(column)] = column
    return padded


def _family(draft: Draft) -> tuple[object, ...]:
    """What drafts that differ in their window alone share."""
    return draft.kind, draft.model, draft.num_layers, draft.method
