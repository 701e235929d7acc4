"""The decision: for each operating point evidence, forecasts, race and proof; then a choice for every point.

Everything is measured first and judged last, because Holm's step-down looks at all points together. Plain decoding is
the choice wherever no win is proven.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from profiles.engines.base import Engine
from profiles.records.core import Prompt, Workload
from profiles.records.evidence import Infeasible
from profiles.stats import holm
from tuner.forecast.evidence import Evidence, Progress, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import spread_over_domains
from tuner.pipeline.build_prior import build_prior
from tuner.pipeline.decision import judge
from tuner.pipeline.points import PointDecision, PointPlan, plan_points
from tuner.pipeline.trial import Options, OutOfTimeError, PointTrial
from tuner.policy.policy import Choice
from tuner.policy.prior import Prior
from tuner.search import proof
from tuner.search.objective import candidates
from tuner.search.studies import search_forecasts

TRACES_SHARE, RACES_SHARE = 0.3, 0.5  # of the budget that is left then
MIN_SAMPLE = 12  # prompts, whatever the budget: fewer prove nothing
Load = tuple[Workload, tuple[Prompt, ...]]
_LOG = logging.getLogger(__name__)


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
    """Callbacks of a run: `progress` before every unit, `out_of_time` with it.

    `seconds_left` of the budget, infinite without one, are shared among the stages.
    """

    progress: Progress = lambda *_: None
    out_of_time: Callable[[], bool] = lambda: False
    seconds_left: Callable[[], float] = lambda: math.inf

    def share(self, part: float) -> Callable[[], bool]:
        """Whether this part of what is left of the budget now is used up then; never without a budget."""
        end_s = (1.0 - part) * self.seconds_left()
        return lambda: self.seconds_left() < end_s


class Tuner:
    """Runs the whole decision over an engine."""

    def __init__(self, engine: Engine, options: Options, watch: Watch | None = None) -> None:
        self._engine = engine
        self._options = options
        self._watch = watch or Watch()
        self._unit = "loading"  # what was done last

    def tune(self, loads: Sequence[tuple[Workload, tuple[Prompt, ...]]]) -> Outcome:
        """Decides every point of every workload.

        Raises:
            EngineError: the target itself fails; a draft that fails is left out and listed.
        """
        loads = [self._sampled(load, len(loads) - number) for number, load in enumerate(loads)]
        plans = [plan_points(workload, prompts, self._options.objective) for workload, prompts in loads]
        trials: list[PointTrial] = []
        infeasible: list[Infeasible] = []
        grid_seconds: float | None = None
        for number, (workload, prompts) in enumerate(loads):
            of_load = self._race_all(workload, plans[number])
            trials += of_load
            self._prove_all(trials, num_later=sum(map(len, plans[number + 1 :])))
            mixed = of_load[0].decision
            if mixed.evidence is not None:
                infeasible += mixed.evidence.infeasible
                if mixed.forecasts:
                    grid_seconds = (grid_seconds or 0.0) + _grid_seconds(mixed, mixed.evidence, len(prompts))
        points = tuple(trial.decision for trial in trials)
        return Outcome(
            choices=tuple(judge(points)),
            points=points,
            infeasible=(*infeasible, *(failure for point in points for failure in point.infeasible)),
            grid_seconds_estimate=grid_seconds,
            prior=build_prior(points, self._options.lengths),
        )

    def _sampled(self, load: Load, num_left: int) -> Load:
        """With a budget a sample of every domain: the prompts whose traces take a share of it, 12 at least."""
        workload, prompts = load
        if math.isinf(self._watch.seconds_left()) or len(prompts) <= MIN_SAMPLE:
            return load
        enough = self._watch.share(TRACES_SHARE / num_left)
        ordered = spread_over_domains(sorted(prompts, key=lambda prompt: prompt.digest), len(prompts))
        with contextlib.suppress(OutOfTimeError):  # it is raised again where the traces are needed
            for number, prompt in enumerate(ordered):
                if number >= MIN_SAMPLE and enough():
                    _LOG.warning("budget: %d of %d prompts are used, a sample of every domain", number, len(prompts))
                    return workload, ordered[:number]
                self._progress("target traces within the budget", number, len(ordered))
                self._engine.trace_target(workload, prompt)
        return load

    def _race_all(self, workload: Workload, plans: Sequence[PointPlan]) -> list[PointTrial]:
        """The points of a workload with their evidence, forecasts and races."""
        traced = tuple({prompt.digest: prompt for plan in plans for prompt in plan.forecast_prompts}.values())
        try:
            evidence = gather(self._engine, workload, traced, self._options.lengths, progress=self._progress)
        except OutOfTimeError:
            stopped = f"the budget ended before anything could be compared, after {self._unit}: give more"
            undecided = [PointDecision(plan=plan, stopped=stopped, out_of_time=True) for plan in plans]
            return [self._trial(point, "") for point in undecided]
        target_component = self._engine.target.run_digest
        objective = self._options.objective
        forecaster = Forecaster(evidence, workload, target_component, workload.seed, objective=objective)
        return [
            self._race_point(
                PointDecision(plan=plan, evidence=evidence, forecaster=forecaster),
                self._watch.share(RACES_SHARE / (len(plans) - number)),
            )
            for number, plan in enumerate(plans)
        ]

    def _race_point(self, point: PointDecision, enough_races: Callable[[], bool]) -> PointTrial:
        plan, load, evidence, forecaster = point.plan, point.workload, point.evidence, point.forecaster
        assert evidence is not None
        assert forecaster is not None
        name = f"{self._options.run_name} batch {load.batch_size} context {load.context_length} {plan.domain}"
        if all(len(evidence.traces[prompt.digest].token_ids) < 2 for prompt in plan.forecast_prompts):
            stopped = "every output ended with its first token, so there is no time per token"
            return self._trial(replace(point, stopped=stopped), name)
        forecasts = search_forecasts(
            [setup for setup in candidates(evidence.drafts, self._options.lengths) if evidence.can_forecast(setup)],
            lambda setup: forecaster.forecast(setup, plan.forecast_prompts),
            study_name=f"forecasts, {name}",
            storage=self._options.storage,
        )
        trial = self._trial(replace(point, forecasts=tuple(forecasts)), name, enough_races)
        trial.select()
        return trial

    def _trial(self, point: PointDecision, name: str, enough_races: Callable[[], bool] = lambda: False) -> PointTrial:
        return PointTrial(
            self._engine,
            point,
            self._options,
            progress=self._progress,
            name=name,
            enough_races=enough_races,
        )

    def _prove_all(self, trials: Sequence[PointTrial], num_later: int) -> None:
        """The first look at every proof, then the next at those that Holm's step-down does not reject, and so on.

        A rejected point's share of the level goes to the others (Maurer and Bretz 2013); points of later workloads
        count as not rejected, those of earlier runs with their p-values.
        """
        others = (*self._options.standing_p_values, *itertools.repeat(1.0, num_later))
        while True:
            tested = [trial for trial in trials if trial.decision.candidate is not None]
            rejected = holm([*(trial.p_value for trial in tested), *others], proof.LEVEL)
            pending = [trial for trial, passes in zip(tested, rejected, strict=False) if not passes and trial.goes_on]
            if not pending:
                return
            level = proof.LEVEL / (len(rejected) - sum(rejected))
            min(pending, key=lambda trial: trial.num_looks).look(level)

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self._watch.out_of_time():
            raise OutOfTimeError
        self._unit = f"{stage} ({done + 1} of {total})"
        self._watch.progress(stage, done, total)


def _grid_seconds(mixed: PointDecision, evidence: Evidence, num_prompts: int) -> float:
    """Seconds that really running every candidate on every prompt would take, by forecasts and measured prefills."""
    traced = [len(evidence.traces[prompt.digest].token_ids) - 1 for prompt in mixed.plan.forecast_prompts]
    tokens = sum(traced) * num_prompts / len(traced)
    prefills_s: dict[object, list[float]] = {}
    for setup, sample in evidence.calibration:
        prefills_s.setdefault(setup.draft, []).append(sample.ttft_s)
    seconds = 0.0
    for forecast in mixed.forecasts:
        draft = forecast.setup.draft
        # a composite that was not run has the prefills of its model
        prefill_s = prefills_s[draft.components[-1] if draft and draft not in prefills_s else draft]
        seconds += tokens / (mixed.workload.batch_size * forecast.tok_per_s.estimate)
        seconds += num_prompts * sum(prefill_s) / len(prefill_s)
    return seconds
