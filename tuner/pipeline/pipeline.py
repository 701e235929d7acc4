"""The decision: for each operating point evidence, forecasts, race and proof; then a choice for every point.

Everything is measured first and judged last, because Holm's step-down looks at all points together. Plain decoding is
the choice wherever no win is proven.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible, Sample
from profiles.records.keys import run_point, unit_digest
from tuner.forecast.evidence import Evidence, Progress, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import purpose_of, queues, spread_over_domains
from tuner.pipeline.build_prior import build_prior
from tuner.pipeline.decision import judge
from tuner.pipeline.points import PointDecision, PointPlan, plan_points
from tuner.pipeline.standings import LiveStandings, Show
from tuner.policy.estimates import Measured, Objective
from tuner.policy.policy import Choice
from tuner.policy.prior import Prior
from tuner.search import proof, race
from tuner.search.limits import Limits
from tuner.search.objective import among_equals, candidates, worth_racing
from tuner.search.pairs import Pair, Queue, pair_order, run_pairs, speedup_so_far
from tuner.search.studies import Storage, search_forecasts

MIN_RACE_PROMPTS = 4
RACE_QUEUES, RACE_BATCHES = 4, 2  # in a batch: how many queues, and their length in batches
PROOF_QUEUES, PROOF_BATCHES = 6, 4


class OutOfTimeError(Exception):
    """The budget ended between two units; the caller of `Tuner` never sees it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is tried and how much is measured.

    Args:
        lengths: speculation lengths.
        num_finalists: drafts raced at each point.
        race_prompts: prompts of a race, at most.
        proof_prompts: prompts of a proof at batch 1, at most.
        objective: `tpot` compares seconds of decoding, `throughput` seconds of whole requests.
        limits: what a setup must not exceed.
        needed_bytes: memory of a setup's weights and caches; None is unknown.
        refused: drafts that were asked for and cannot be used.
        storage: keeps Optuna's studies.
        run_name: the studies' names begin with it.
    """

    lengths: tuple[int, ...] = tuple(range(1, 9))
    num_finalists: int = 3
    race_prompts: int = 12
    proof_prompts: int = 30
    objective: Objective = "tpot"
    limits: Limits = field(default_factory=Limits)
    needed_bytes: Callable[[Setup, Workload], int | None] = lambda *_: None
    refused: tuple[RefusedDraft, ...] = ()
    storage: Storage | None = None
    run_name: str = "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The choices, the points they came from, and what was infeasible.

    `grid_seconds_estimate` is what really running every candidate would have taken. `prior` is what a selector starts
    from; None where no draft was forecast.
    """

    choices: tuple[Choice, ...]
    points: tuple[PointDecision, ...]
    infeasible: tuple[Infeasible, ...]
    grid_seconds_estimate: float | None
    prior: Prior | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Callbacks of a run: `progress` before every unit, `out_of_time` with it, `show` at every change of standings."""

    progress: Progress = lambda *_: None
    out_of_time: Callable[[], bool] = lambda: False
    show: Show = lambda _: None


class Tuner:
    """Runs the whole decision over an engine."""

    def __init__(self, engine: Engine, options: Options, watch: Watch | None = None) -> None:
        self._engine = engine
        self._options = options
        self._watch = watch or Watch()
        self._standings = LiveStandings(self._watch.show)

    def tune(self, loads: Sequence[tuple[Workload, tuple[Prompt, ...]]]) -> Outcome:
        """Decides every point of every workload.

        Raises:
            EngineError: the target itself fails; a draft that fails is left out and listed.
        """
        points: list[PointDecision] = []
        infeasible: list[Infeasible] = []
        grid_seconds: float | None = None
        for workload, prompts in loads:
            plans = plan_points(workload, prompts, self._options.objective)
            traced = tuple({prompt.digest: prompt for plan in plans for prompt in plan.forecast_prompts}.values())
            try:
                evidence = gather(self._engine, workload, traced, self._options.lengths, progress=self._progress)
            except OutOfTimeError:
                stopped = "the budget ended before the evidence was complete"
                points += [PointDecision(plan=plan, stopped=stopped, out_of_time=True) for plan in plans]
                continue
            forecaster = Forecaster(
                evidence,
                workload,
                self._engine.target.run_digest,
                workload.seed,
                objective=self._options.objective,
            )
            decided = [self._decide(plan, evidence, forecaster) for plan in plans]
            points += decided
            infeasible += (*evidence.infeasible, *(failure for point in decided for failure in point.infeasible))
            if decided[0].forecasts:
                grid_seconds = (grid_seconds or 0.0) + _grid_seconds(decided[0], evidence, len(prompts))
        return Outcome(
            choices=tuple(judge(points)),
            points=tuple(points),
            infeasible=tuple(infeasible),
            grid_seconds_estimate=grid_seconds,
            prior=build_prior(points, self._options.lengths),
        )

    def _decide(self, plan: PointPlan, evidence: Evidence, forecaster: Forecaster) -> PointDecision:
        load = plan.workload
        point = PointDecision(plan=plan, evidence=evidence, forecaster=forecaster)
        if all(len(evidence.traces[prompt.digest].token_ids) < 2 for prompt in plan.forecast_prompts):
            return replace(point, stopped="every output ended with its first token, so there is no time per token")
        name = f"{self._options.run_name} batch {load.batch_size} context {load.context_length} {plan.domain}"
        forecasts = search_forecasts(
            [setup for setup in candidates(evidence.drafts, self._options.lengths) if evidence.can_forecast(setup)],
            lambda setup: forecaster.forecast(setup, plan.forecast_prompts),
            study_name=f"forecasts, {name}",
            storage=self._options.storage,
        )
        self._standings.open(plan.domain, forecasts)
        trial = _PointTrial(self._engine, plan, self._options, self._standings, progress=self._progress)
        return trial.decide(replace(point, forecasts=tuple(forecasts)), evidence, name)

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self._watch.out_of_time():
            raise OutOfTimeError
        self._watch.progress(stage, done, total)


class _PointTrial:
    """Race and proof at one operating point, and what they ruled out so far."""

    def __init__(
        self, engine: Engine, plan: PointPlan, options: Options, standings: LiveStandings, *, progress: Progress
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._workload = plan.workload
        self._options = options
        self._standings = standings
        self._progress = progress
        self._infeasible: dict[Setup, Infeasible] = {}
        self._plain_samples: Sequence[Sample] = ()  # of the latest stage
        self._rejected: list[Measured] = []

    def decide(self, point: PointDecision, evidence: Evidence, name: str) -> PointDecision:
        """Attempts race and proof until an attempt rules out nothing new.

        A setup that turns out infeasible, or a draft that makes requests slower end to end, may have beaten others, so
        these are tried again without it. Runs that were made before are recalled, so that only new finalists cost time.
        """
        limits = self._options.limits
        for forecast in point.forecasts:
            needed_bytes = self._options.needed_bytes(forecast.setup, self._workload)
            self._rule_out(limits.memory_breach(forecast.setup, needed_bytes))
        self._plain_samples = [run for setup, run in evidence.calibration if setup == PLAIN]
        decided = point
        for number in itertools.count(1):
            num_infeasible = len(self._infeasible)
            feasible = [forecast for forecast in point.forecasts if forecast.setup not in self._infeasible]
            hopeful = worth_racing(feasible)
            if not hopeful:
                break
            decided = self._attempt(point, hopeful, name if number == 1 else f"{name}, again {number}")
            if decided.out_of_time or len(self._infeasible) == num_infeasible:
                break
        if PLAIN not in self._infeasible:
            self._rule_out(limits.latency_breach(PLAIN, self._plain_samples))
        return replace(decided, infeasible=tuple(self._infeasible.values()), rejected=tuple(self._rejected))

    def _attempt(self, point: PointDecision, hopeful: Sequence[Setup], name: str) -> PointDecision:
        """One race and one proof; whatever was reached when the budget ends is kept."""
        try:
            point = self._race(point, hopeful, f"race, {name}")
            if point.candidate is not None:
                point = self._prove(point, point.candidate)
        except OutOfTimeError:
            return replace(point, out_of_time=True, stopped="the budget ended before it was proven")
        except EngineError as error:
            assert point.candidate is not None  # the race lists its own failures
            self._rule_out(Infeasible(setup=point.candidate, reason=type(error).__name__, detail=str(error)))
            return replace(point, stopped=f"it failed in the proof: {error}")
        return point

    def _race(self, point: PointDecision, hopeful: Sequence[Setup], name: str) -> PointDecision:
        """Takes the race's winner as candidate; without a race (too few prompts, one finalist) the best forecast."""
        prompts = spread_over_domains(self._plan.race_prompts, self._options.race_prompts)
        if len(prompts) < MIN_RACE_PROMPTS or len(hopeful) == 1:
            return replace(point, candidate=hopeful[0])
        planned = queues(
            prompts,
            self._workload.batch_size,
            max_alone=len(prompts),
            num_queues=RACE_QUEUES,
            batches_per_queue=RACE_BATCHES,
        )
        objective = self._options.objective
        num_setups = min(len(hopeful), self._options.num_finalists + race.MORE_LENGTHS)
        num_units = len(planned) * num_setups + min(len(planned), race.NOISE_QUEUES)
        units = itertools.count()
        pairs: dict[Setup, list[Pair]] = {}

        def run(queue: Queue, setup: Setup) -> list[Pair]:
            self._progress(f"race {self._plan.domain}", next(units), num_units)
            ran = pairs.setdefault(setup, [])
            purpose = purpose_of("race", self._workload, len(ran) // len(queue))
            more = run_pairs(self._engine, self._workload, queue, setup, purpose)
            ran += more
            if setup != PLAIN:
                self._standings.note(
                    setup, f"racing {len(ran)}/{sum(map(len, planned))}", speedup_so_far(ran, objective)
                )
            return more

        result = race.race(
            run,
            planned,
            hopeful,
            num_finalists=self._options.num_finalists,
            study_name=name,
            storage=self._options.storage,
            objective=objective,
        )
        self._plain_samples = [pair.plain for ran in pairs.values() for pair in ran]
        for failure in result.failed:
            if failure.setup != PLAIN:  # plain against plain only shows the noise
                self._rule_out(failure)
        for setup in result.pruned:
            self._standings.note(setup, "pruned in the race")
        for setup in result.speedups:
            self._standings.note(setup, "raced")
            self._rule_out(self._options.limits.latency_breach(setup, [pair.chosen for pair in pairs[setup]]))
        feasible = {setup: speedup for setup, speedup in result.speedups.items() if setup not in self._infeasible}
        winner = among_equals(feasible)
        is_faster = winner is not None and feasible[winner] > 1.0
        return replace(point, race=result, candidate=winner if is_faster else None)

    def _prove(self, point: PointDecision, setup: Setup) -> PointDecision:
        planned = queues(
            self._plan.proof_prompts,
            self._workload.batch_size,
            max_alone=self._options.proof_prompts,
            num_queues=PROOF_QUEUES,
            batches_per_queue=PROOF_BATCHES,
        )
        queue_size = len(planned[0])
        pairs: list[Pair] = []
        units: list[str] = []
        for number, queue in enumerate(planned):
            self._progress(f"proof {self._plan.domain}", number, len(planned))
            purpose = purpose_of("proof", self._workload, number)
            pairs += run_pairs(self._engine, self._workload, queue, setup, purpose)
            order = pair_order(self._workload, queue, setup)
            key = run_point(self._workload, queue, order, purpose)
            units.append(unit_digest(self._engine.target, self._engine.environment, key))
            self._standings.note(
                setup, f"proving {number + 1}/{len(planned)}", speedup_so_far(pairs, self._options.objective)
            )
        self._plain_samples = [pair.plain for pair in pairs]
        self._rule_out(self._options.limits.latency_breach(setup, [pair.chosen for pair in pairs]))
        if (num_timed := proof.num_timed_prompts(pairs, queue_size)) < 2:
            return replace(point, stopped=f"only {num_timed} outputs had a second token to time")
        greedy = self._workload.temperature == 0.0
        measured = proof.measure(
            setup,
            pairs,
            greedy=greedy,
            queue_size=queue_size,
            domains={prompt.digest: prompt.domain for prompt in self._plan.proof_prompts},
            objective=self._options.objective,
            num_compared=1 if self._plan.is_fresh else sum(each.setup != PLAIN for each in point.forecasts),
        )
        self._standings.note(setup, "measured", measured.speedup)
        if measured.end_to_end.estimate < 1.0:
            self._rejected.append(measured)
            detail = f"with {setup.name} it is slower end to end ({measured.end_to_end.estimate:.3f}), prefill included"
            for forecast in point.forecasts:
                if forecast.setup.draft == setup.draft:
                    self._rule_out(Infeasible(setup=forecast.setup, reason="end to end", detail=detail))
        return replace(point, measured=measured, units=tuple(units))

    def _rule_out(self, infeasible: Infeasible | None) -> None:
        if infeasible is not None:
            self._infeasible[infeasible.setup] = infeasible
            self._standings.note(infeasible.setup, "infeasible")


def _grid_seconds(mixed: PointDecision, evidence: Evidence, num_prompts: int) -> float:
    """Seconds that really running every candidate on every prompt would take, by forecasts and measured prefills."""
    traced = [len(evidence.traces[prompt.digest].token_ids) - 1 for prompt in mixed.plan.forecast_prompts]
    tokens = sum(traced) * num_prompts / len(traced)
    prefills_s: dict[object, list[float]] = {}
    for setup, sample in evidence.calibration:
        prefills_s.setdefault(setup.draft, []).append(sample.ttft_s)
    seconds = 0.0
    for forecast in mixed.forecasts:
        prefill_s = prefills_s[forecast.setup.draft]
        seconds += tokens / (mixed.workload.batch_size * forecast.tok_per_s.estimate)
        seconds += num_prompts * sum(prefill_s) / len(prefill_s)
    return seconds
