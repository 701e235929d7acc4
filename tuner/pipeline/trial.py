"""One operating point: its race, its proof look by look, and what they ruled out."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible, Sample
from profiles.records.keys import run_point, unit_digest
from profiles.stats import LogRatio, speedup_interval
from tuner.forecast.evidence import Progress, trace_more
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import purpose_of, queues, spread_over_domains
from tuner.pipeline.points import PointDecision
from tuner.policy.estimates import Measured, Objective
from tuner.search import control, proof, race
from tuner.search.limits import Limits
from tuner.search.objective import MIN_SPEEDUP, among_equals, worth_racing
from tuner.search.pairs import Pair, Queue, columns, pair_order, run_beside, run_pairs, timed_pairs
from tuner.search.sequential import Look
from tuner.search.studies import Storage

MIN_RACE_PROMPTS = 4
RACE_QUEUES, RACE_BATCHES = 4, 2  # in a batch: how many queues, and their length in batches
PROOF_BATCHES = 4  # of a queue of the proof
FORECAST_TOLERANCE = 0.05  # in the log speed-up, within which a race confirms a forecast


class OutOfTimeError(Exception):
    """The budget ended between two units; the caller of `Tuner` never sees it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is tried and how much is measured.

    Args:
        lengths: speculation lengths.
        num_finalists: drafts raced at each point.
        race_prompts: prompts of a race, at most.
        proof_prompts: prompts of a proof at batch 1, at most; None: all that had no part in the choice.
        objective: `tpot` compares seconds of decoding, `throughput` seconds of whole requests.
        limits: what a setup must not exceed.
        needed_bytes: memory of a setup's weights and caches; None is unknown.
        refused: drafts that were asked for and cannot be used.
        storage: keeps Optuna's studies.
        run_name: the studies' names begin with it.
        standing_p_values: of earlier runs' proofs that stay in the policy; Holm's step-down is over these too.
    """

    lengths: tuple[int, ...] = tuple(range(1, 9))
    num_finalists: int = 3
    race_prompts: int = 12
    proof_prompts: int | None = None
    objective: Objective = "tpot"
    limits: Limits = field(default_factory=Limits)
    needed_bytes: Callable[[Setup, Workload], int | None] = lambda *_: None
    refused: tuple[RefusedDraft, ...] = ()
    storage: Storage | None = None
    run_name: str = "run"
    standing_p_values: tuple[float, ...] = ()


class PointTrial:
    """Race and proof at one operating point, and what they ruled out so far; `decision` is what they came to."""

    def __init__(
        self,
        engine: Engine,
        point: PointDecision,
        options: Options,
        *,
        progress: Progress,
        name: str,
        enough_races: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._plan = point.plan
        self._workload = point.plan.workload
        self._options = options
        self._progress = progress
        self._name = name
        self._enough_races = enough_races
        self._point = point
        self._num_races = 0
        self._infeasible: dict[Setup, Infeasible] = {}
        self._plain_samples: Sequence[Sample] = ()  # of the latest stage
        self._race_pairs: dict[Setup, list[Pair]] = {}
        self._rejected: list[Measured] = []
        self._unproven: list[PointDecision] = []  # candidates that the last look did not prove
        self._proof: _Proof | None = None
        self._race_ratios: dict[Setup, LogRatio] = {}
        self._share_left = 1.0  # of the point's level
        for forecast in point.forecasts:
            needed_bytes = options.needed_bytes(forecast.setup, self._workload)
            self._rule_out(options.limits.memory_breach(forecast.setup, needed_bytes))
        if point.evidence is not None:
            self._plain_samples = [run for setup, run in point.evidence.calibration if setup == PLAIN]

    @property
    def decision(self) -> PointDecision:
        """What was reached with the candidate that counts, and what was ruled out."""
        breach = None
        if self._point.forecasts and PLAIN not in self._infeasible:
            breach = self._options.limits.latency_breach(PLAIN, self._plain_samples)
        infeasible = (*self._infeasible.values(), *([breach] if breach is not None else []))
        return replace(self._closest(), infeasible=infeasible, rejected=tuple(self._rejected))

    @property
    def p_value(self) -> float:
        """Of the candidate that counts; 1 as long as it was not looked at."""
        return _p_value(self._closest())

    @property
    def num_looks(self) -> int:
        return 0 if self._proof is None else len(self._proof.looks)

    @property
    def goes_on(self) -> bool:
        """Whether there is another look, or a runner-up to prove."""
        if self._point.candidate is None or self._point.out_of_time or self._point.candidate in self._infeasible:
            return False
        return self._proof is None or not self._proof.is_over or self._runner_up() is not None

    def select(self) -> None:
        """Races the feasible setups until a race rules out nothing new; its winner is the candidate.

        A setup that turns out infeasible, or a draft that makes requests slower end to end, may have beaten others, so
        these are tried again without it. Runs that were made before are recalled, so that only new finalists cost time.
        """
        self._proof = None
        while True:
            num_infeasible = len(self._infeasible)
            hopeful = worth_racing([each for each in self._point.forecasts if each.setup not in self._infeasible])
            if not hopeful:
                return
            self._num_races += 1
            name = self._name if self._num_races == 1 else f"{self._name}, again {self._num_races}"
            self._point = replace(_unmeasured(self._point, None), race=None)
            try:
                self._race(hopeful, f"race, {name}")
            except OutOfTimeError:
                self._end("the budget ended before it was proven")
                return
            if len(self._infeasible) == num_infeasible:
                return

    def look(self, level: float) -> None:
        """One more look at the proof, at Holm's level; what rules the candidate out makes way for another.

        Whatever was reached when the budget ends is kept.
        """
        if self._proof is not None and self._proof.is_over:
            runner_up, self._proof = self._runner_up(), None
            self._unproven.append(self._point)
            self._point = _unmeasured(self._point, runner_up)
        candidate = self._point.candidate
        assert candidate is not None
        try:
            self._proof = self._proof or self._plan_proof(candidate)
            self._run_proof(self._proof)
        except OutOfTimeError:
            self._end("the budget ended before it was proven")
        except EngineError as error:
            self._rule_out(Infeasible(setup=candidate, reason=type(error).__name__, detail=str(error)))
            self._point = replace(self._point, stopped=f"it failed in the proof: {error}")
        running = self._proof
        if running is not None and len(running.pairs) > running.num_measured and candidate not in self._infeasible:
            self._measure(running, level)
        if candidate in self._infeasible and not self._point.out_of_time:
            self.select()

    def _closest(self) -> PointDecision:
        """The present candidate; of a runner-up that is not proven either the first one."""
        if not self._unproven or _p_value(self._point) <= proof.LEVEL:
            return self._point
        if not self._point.out_of_time or self._point.candidate is None:
            return self._unproven[0]
        stopped = f"the budget ended before {self._point.candidate.name} was proven"
        return replace(self._unproven[0], out_of_time=True, stopped=stopped)

    def _end(self, stopped: str) -> None:
        self._point = replace(self._point, out_of_time=True, stopped=stopped)

    def _runner_up(self) -> Setup | None:
        """The fastest finalist of another draft, while no runner-up was tried; None where there is none to be tried."""
        race_result, first, num_prompts = self._point.race, self._point.candidate, len(self._plan.proof_prompts)
        if race_result is None or first is None or self._unproven or num_prompts < proof.MIN_RUNNER_UP_PROMPTS:
            return None
        others = {
            setup: speedup
            for setup, speedup in race_result.speedups.items()
            if setup.draft != first.draft and speedup >= MIN_SPEEDUP and setup not in self._infeasible
        }
        return among_equals(others)

    def _race(self, hopeful: Sequence[Setup], name: str) -> None:
        """Takes the race's winner as candidate; without a race (too few prompts, one finalist) the best forecast."""
        prompts = spread_over_domains(self._plan.forecast_prompts, self._options.race_prompts)
        if len(prompts) < MIN_RACE_PROMPTS or len(hopeful) == 1:
            self._point = replace(self._point, candidate=hopeful[0])
            return
        planned = queues(
            prompts,
            self._workload.batch_size,
            max_alone=len(prompts),
            num_queues=RACE_QUEUES,
            batches_per_queue=RACE_BATCHES,
        )
        objective = self._options.objective
        num_units = 2 * len(planned)
        units = itertools.count()
        pairs = self._race_pairs

        def run(number: int, setups: Sequence[Setup]) -> dict[Setup, Sequence[Pair]]:
            """Setups that ran in an earlier race are not run again."""
            self._progress(f"race {self._plan.domain}", min(next(units), num_units - 1), num_units)
            queue = planned[number]
            start = number * len(queue)
            if missing := [setup for setup in setups if len(pairs.get(setup, ())) <= start]:
                purpose = purpose_of("race", self._workload, number)
                ran = run_beside(self._engine, self._workload, queue, missing, purpose)
                for setup, more in ran.items():
                    pairs.setdefault(setup, []).extend(more)
            return {setup: pairs[setup][start : start + len(queue)] for setup in setups}

        result = race.race(
            run,
            len(planned),
            hopeful,
            num_finalists=self._options.num_finalists,
            study_name=name,
            storage=self._options.storage,
            objective=objective,
            enough=self._enough_races,
            more_lengths=lambda fastest: not self._forecast_holds(fastest),
        )
        self._plain_samples = [pair.plain for ran in pairs.values() for pair in ran]
        for failure in result.failed:
            if failure.setup != PLAIN:  # plain against plain only shows the noise
                self._rule_out(failure)
        for setup in result.speedups:
            self._rule_out(self._options.limits.latency_breach(setup, [pair.chosen for pair in pairs[setup]]))
        self._race_ratios = {setup: self._race_ratio(setup, result) for setup in result.speedups}
        result = replace(result, speedups={setup: math.exp(each.value) for setup, each in self._race_ratios.items()})
        feasible = {setup: speedup for setup, speedup in result.speedups.items() if setup not in self._infeasible}
        candidate = among_equals(feasible)
        if candidate is None and not result.pruned and self._enough_races():  # none was raced: the best forecast
            candidate = next((setup for setup in hopeful if setup not in self._infeasible), None)
        elif candidate is not None and not proof.is_worth_proving(self._race_ratios[candidate]):
            candidate = None
        self._point = replace(self._point, race=result, candidate=candidate)

    def _forecast_holds(self, setup: Setup) -> bool:
        """Whether the race confirms the forecast on its prompts: those of other lengths are then trusted too."""
        evidence, forecaster, pairs = self._point.evidence, self._point.forecaster, timed_pairs(self._race_pairs[setup])
        assert evidence is not None
        assert forecaster is not None
        if len(pairs) < 2 or self._workload.batch_size > 1 or not evidence.is_traced(setup.draft):
            return False
        forecasts = _forecast_seconds(forecaster, setup, self._raced_prompts(pairs))[self._options.objective]
        plain_s, chosen_s = (sum(column) for column in zip(*forecasts.values(), strict=True))
        measured, _ = speedup_interval(*columns(pairs, self._options.objective))
        return abs(math.log(measured.estimate * chosen_s / plain_s)) <= FORECAST_TOLERANCE

    def _raced_prompts(self, pairs: Sequence[Pair]) -> list[Prompt]:
        digests = {pair.plain.prompt_digest for pair in pairs}
        return [prompt for prompt in self._plan.forecast_prompts if prompt.digest in digests]

    def _race_ratio(self, setup: Setup, result: race.RaceResult) -> LogRatio:
        """Over all prompts with forecasts, of which the race timed two or more; else, and in batches, over its runs."""
        evidence, forecaster, prompts = self._point.evidence, self._point.forecaster, self._plan.forecast_prompts
        assert evidence is not None
        assert forecaster is not None
        if len(timed_pairs(self._race_pairs[setup])) < 2:
            return LogRatio(math.log(result.speedups[setup]), 0.0, 1.0)
        seconds = None
        if self._workload.batch_size == 1 and evidence.is_traced(setup.draft):
            seconds = _forecast_seconds(forecaster, setup, prompts)
        domains = {prompt.digest: prompt.domain for prompt in prompts}
        return proof.race_ratio(self._race_pairs[setup], seconds, domains, self._options.objective)

    def _share(self, setup: Setup) -> float:
        """Of the point's level, that the setup may spend: all where no other draft can be tried after it."""
        if len({forecast.setup.draft for forecast in self._point.forecasts if forecast.setup != PLAIN}) == 1:
            return 1.0
        return self._share_left * proof.share_of_level(self._race_ratios, setup, self._runner_up())

    def _plan_proof(self, setup: Setup) -> "_Proof":
        prompts = self._plan.proof_prompts or self._plan.forecast_prompts
        is_batch = self._workload.batch_size > 1
        planned = queues(
            prompts,
            self._workload.batch_size,
            max_alone=self._options.proof_prompts or len(prompts),
            num_queues=max(proof.QUEUE_LOOKS[-1], -(-len(prompts) // (PROOF_BATCHES * self._workload.batch_size))),
            batches_per_queue=PROOF_BATCHES,
        )
        looks = proof.look_sizes(len(planned), proof.QUEUE_LOOKS if is_batch else proof.LOOKS)
        design = proof.Design(
            setup=setup,
            greedy=self._workload.temperature == 0.0,
            queue_size=len(planned[0]),
            domains={prompt.digest: prompt.domain for prompt in prompts},
            objective=self._options.objective,
            forecasts=None if is_batch or len(looks) == 1 else self._forecasts(setup, [queue[0] for queue in planned]),
            num_pairs=sum(map(len, planned)),
            share=self._share(setup),
        )
        return _Proof(design=design, planned=planned, sizes=looks)

    def _forecasts(self, setup: Setup, prompts: Sequence[Prompt]) -> proof.Forecasts | None:
        """Forecasts of the proof's prompts, which are traced for it; None where they would not help."""
        evidence, forecaster, race_pairs = self._point.evidence, self._point.forecaster, self._race_pairs.get(setup, [])
        assert evidence is not None
        assert forecaster is not None
        if not evidence.is_traced(setup.draft):
            return None
        race_prompts = self._raced_prompts(race_pairs)
        domains = {prompt.digest: prompt.domain for prompt in race_prompts}
        weights = proof.weights(race_pairs, _forecast_seconds(forecaster, setup, race_prompts), domains)
        if weights[self._options.objective] == 0.0:
            return None
        more = trace_more(
            self._engine,
            self._workload,
            evidence,
            prompts,
            setup=setup,
            max_length=max(self._options.lengths),
            progress=self._progress,
        )
        seconds = _forecast_seconds(forecaster.extended(more), setup, prompts)
        return proof.Forecasts(seconds=seconds, weights=weights)

    def _run_proof(self, running: "_Proof") -> None:
        """Runs the queues up to the next look."""
        setup, size = running.design.setup, running.sizes[len(running.looks)]
        for number in range(len(running.units), size):
            self._progress(f"proof {self._plan.domain}", number, size)
            queue, purpose = running.planned[number], purpose_of("proof", self._workload, number)
            running.pairs += run_pairs(self._engine, self._workload, queue, setup, purpose)
            order = pair_order(self._workload, queue, setup)
            key = run_point(self._workload, queue, order, purpose)
            running.units.append(unit_digest(self._engine.target, self._engine.environment, key))

    def _measure(self, running: "_Proof", level: float) -> None:
        """Takes stock of a proof; a setup that breaks a limit or is slower end to end is ruled out."""
        setup, pairs, objective = running.design.setup, running.pairs, self._options.objective
        running.num_measured = len(pairs)
        self._plain_samples = [pair.plain for pair in pairs]
        self._rule_out(self._options.limits.latency_breach(setup, [pair.chosen for pair in pairs]))
        if (missing := proof.missing_runs(pairs, running.design.queue_size)) is not None:
            self._point = replace(self._point, stopped=self._point.stopped or missing)
            running.is_over = True
            return
        if not running.looks:  # a proof that ended without a look spent nothing
            self._share_left -= running.design.share
        measured, running.looks = proof.measure(running.design, pairs, running.looks, level=level)
        design = running.design
        self._point = replace(
            self._point,
            measured=measured,
            units=tuple(running.units),
            objection=control.objection(setup, pairs, batch_size=self._workload.batch_size, greedy=design.greedy),
        )
        is_slower = measured.compared(objective).estimate < 1.0 and measured.p_value <= level
        running.is_over = is_slower or len(running.looks) == len(running.sizes)
        if measured.end_to_end.high < 1.0 or (
            measured.end_to_end.estimate < 1.0 and (running.is_over or measured.p_value <= level)
        ):
            self._rejected.append(measured)
            if measured.p_value <= level:  # what a rejected hypothesis spent goes to the next (Bretz et al. 2009)
                self._share_left += design.share
            detail = f"with {setup.name} it is slower end to end ({measured.end_to_end.estimate:.3f}), prefill included"
            for forecast in self._point.forecasts:
                if forecast.setup.draft == setup.draft:
                    self._rule_out(Infeasible(setup=forecast.setup, reason="end to end", detail=detail))

    def _rule_out(self, infeasible: Infeasible | None) -> None:
        if infeasible is not None:
            self._infeasible[infeasible.setup] = infeasible


@dataclass(slots=True, kw_only=True)
class _Proof:
    """A proof under way: `sizes` are the queues run by each look; `units` the digests of those that were run."""

    design: proof.Design
    planned: tuple[Queue, ...]
    sizes: tuple[int, ...]
    pairs: list[Pair] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    looks: tuple[Look, ...] = ()
    num_measured: int = 0
    is_over: bool = False


def _p_value(point: PointDecision) -> float:
    """Of a win: 1 for a setup that was slower, or not looked at."""
    measured = point.measured
    return 1.0 if measured is None or measured.compared(point.plan.objective).estimate < 1.0 else measured.p_value


def _forecast_seconds(forecaster: Forecaster, setup: Setup, prompts: Sequence[Prompt]) -> proof.Seconds:
    """(plain decoding, setup) by objective and prompt digest."""

    def seconds(end_to_end: bool) -> dict[str, tuple[float, float]]:
        plain, chosen = (forecaster.prompt_seconds(each, prompts, end_to_end=end_to_end) for each in (PLAIN, setup))
        return {digest: (plain[digest], chosen[digest]) for digest in plain}

    return {"tpot": seconds(end_to_end=False), "throughput": seconds(end_to_end=True)}


def _unmeasured(point: PointDecision, candidate: Setup | None) -> PointDecision:
    """The point with another candidate, of which no proof was run."""
    return replace(point, candidate=candidate, measured=None, units=(), objection=None, stopped=None)
