"""From evidence to choices: for each anchor forecast, race, proof, and a sentence saying why.

Everything is measured first and judged last, because Holm's step-down looks at all anchors together. Plain decoding
is the choice wherever no win is proven. Knows the engine protocol, not which engine it is or where evidence is kept.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from profiles.engines.base import Engine
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import EngineError
from profiles.records.evidence import Infeasible
from profiles.records.keys import run_point, unit_digest
from tuner.forecast.evidence import Evidence, Progress, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import purpose_of, spread_over_domains
from tuner.forecast.queues import queues as queues_of
from tuner.pipeline.build_prior import summarise
from tuner.pipeline.decision import judge
from tuner.pipeline.points import Grounds, PointDecision, plan_points
from tuner.pipeline.standings import LiveStandings, Show
from tuner.policy.policy import Choice
from tuner.policy.prior import Prior
from tuner.search import proof, race, studies
from tuner.search.limits import Limits
from tuner.search.objective import among_equals, candidates, finalists

MIN_RACE_PROMPTS = 4
RACE_QUEUES, PROOF_QUEUES = (4, 2), (6, 4)  # in a batch: how many queues, and their length in batches


class OutOfTimeError(Exception):
    """The budget ended between two units; caught here, never by the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is tried and how much is measured: lengths, finalists per anchor, prompts per race and per proof, limits.

    `needed_bytes` says what a setup's weights and caches take; None is not known. `refused` are drafts that were asked
    for and cannot be used.
    """

    lengths: tuple[int, ...] = tuple(range(1, 9))
    num_finalists: int = 3
    race_prompts: int = 12
    proof_prompts: int = 30
    limits: Limits = field(default_factory=Limits)
    needed_bytes: Callable[[Setup, Workload], int | None] = lambda *_: None
    refused: tuple[RefusedDraft, ...] = ()
    storage: studies.Storage | None = None
    run_name: str = "run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The choices, the anchors they came from, what was infeasible, and what the exhaustive grid would have cost.

    `prior`: what a selector starts from; None where no draft was forecast.
    """

    choices: tuple[Choice, ...]
    anchors: tuple[PointDecision, ...]
    infeasible: tuple[Infeasible, ...]
    grid_seconds_estimate: float | None
    prior: Prior | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who is told what happens: `progress` at every unit, `show` at every change; `out_of_time` is asked in between."""

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
        """Choices for every (workload, prompts): one over all domains and one per domain of 24 prompts or more.

        Raises EngineError when the target itself fails; a failing draft is dropped and listed.
        """
        anchors: list[PointDecision] = []
        infeasible: list[Infeasible] = []
        grid_seconds: float | None = None
        for workload, prompts in loads:
            own = plan_points(workload, prompts)
            anchors += own
            traced = tuple({prompt.digest: prompt for anchor in own for prompt in anchor.forecast_pool}.values())
            try:
                evidence = gather(self._engine, workload, traced, self._options.lengths, progress=self._progress)
            except OutOfTimeError:
                for anchor in own:
                    anchor.out_of_time, anchor.stopped = True, "the budget ended before the evidence was complete"
                continue
            infeasible += evidence.infeasible
            forecaster = Forecaster(evidence, workload, self._engine.target.run_digest, workload.seed)
            for anchor in own:
                anchor.grounds = Grounds(evidence=evidence, forecaster=forecaster)
                self._decide(anchor, anchor.grounds)
                infeasible += anchor.infeasible
            if own[0].forecasts:
                grid_seconds = (grid_seconds or 0.0) + _grid_seconds(own[0], evidence, len(prompts))
        return Outcome(
            choices=tuple(judge(anchors)),
            anchors=tuple(anchors),
            infeasible=tuple(infeasible),
            grid_seconds_estimate=grid_seconds,
            prior=summarise(anchors, self._options.lengths),
        )

    def _decide(self, anchor: PointDecision, grounds: Grounds) -> None:
        """Forecast, race and proof of one anchor."""
        load, options, evidence = anchor.workload, self._options, grounds.evidence
        where = f"{options.run_name} batch {load.batch_size} context {load.context_length} {anchor.domain}"
        if all(len(evidence.traces[prompt.digest].token_ids) < 2 for prompt in anchor.forecast_pool):
            anchor.stopped = "every output ended with its first token, so there is no time per token"
            return
        anchor.forecasts = studies.search_forecasts(
            [setup for setup in candidates(evidence.drafts, options.lengths) if evidence.can_forecast(setup)],
            lambda setup: grounds.forecaster.forecast(setup, anchor.forecast_pool),
            f"forecasts, {where}",
            options.storage,
        )
        self._standings.open(anchor.domain, anchor.forecasts)
        for one in anchor.forecasts:
            self._rule_out(anchor, options.limits.memory_breach(one.setup, options.needed_bytes(one.setup, load)))
        anchor.plain_samples = tuple(sample for setup, sample in evidence.calibration if setup == PLAIN)
        self._measure_feasible(anchor, where)
        if anchor.ruled_out(PLAIN) is None:
            self._rule_out(anchor, options.limits.latency_breach(PLAIN, anchor.plain_samples))

    def _measure_feasible(self, anchor: PointDecision, where: str) -> None:
        """Races and proves, and again without those that turned out infeasible: they may have beaten feasible ones.

        Known runs are recalled, so that only new finalists cost time.
        """
        for number in itertools.count(1):
            num_ruled_out = len(anchor.infeasible)
            feasible = [one for one in anchor.forecasts if anchor.ruled_out(one.setup) is None]
            hopeful = finalists(feasible, self._options.num_finalists)
            if not hopeful:
                return
            anchor.candidate = anchor.measured = anchor.race = anchor.stopped = None
            anchor.evidence = ()
            self._measure(anchor, hopeful, where if number == 1 else f"{where}, again {number}")
            if anchor.out_of_time or len(anchor.infeasible) == num_ruled_out:
                return

    def _rule_out(self, anchor: PointDecision, found: Infeasible | None) -> None:
        if found is not None:
            anchor.infeasible.append(found)
            self._standings.note(found.setup, "infeasible")

    def _measure(self, anchor: PointDecision, hopeful: Sequence[Setup], where: str) -> None:
        """Race and proof of the finalists; what was reached when the budget ends is kept."""
        try:
            anchor.candidate = self._race(anchor, hopeful, f"race, {where}")
            if anchor.candidate is not None:
                self._prove(anchor, anchor.candidate)
        except OutOfTimeError:
            anchor.out_of_time, anchor.stopped = True, "the budget ended before it was proven"
        except EngineError as error:
            assert anchor.candidate is not None  # the race lists its own failures
            self._rule_out(anchor, Infeasible(setup=anchor.candidate, reason=type(error).__name__, detail=str(error)))
            anchor.stopped = f"it failed in the proof: {error}"

    def _race(self, anchor: PointDecision, hopeful: Sequence[Setup], name: str) -> Setup | None:
        """The finalist to prove: the race's winner, or the best forecast where too few prompts are left to race."""
        prompts = spread_over_domains(anchor.race_pool, self._options.race_prompts) if anchor.race_pool else ()
        if len(prompts) < MIN_RACE_PROMPTS or len(hopeful) == 1:
            return hopeful[0]
        queues = queues_of(
            prompts, anchor.workload.batch_size, max_alone=len(prompts), num_queues=4, batches_per_queue=2
        )
        total, done = len(queues) * len(hopeful) + min(len(queues), race.NOISE_QUEUES), 0
        ran: dict[Setup, list[proof.Pair]] = {}

        def run(queue: race.Queue, setup: Setup) -> list[proof.Pair]:
            nonlocal done
            self._progress(f"race {anchor.domain}", done, total)
            done += 1
            purpose = purpose_of("race", anchor.workload, len(ran.get(setup, ())) // len(queue))
            found = race.run_pairs(self._engine, anchor.workload, queue, setup, purpose)
            pairs = ran.setdefault(setup, [])
            pairs += found
            if setup != PLAIN:
                place = f"{len(pairs)}/{sum(map(len, queues))}"
                self._standings.note(setup, f"racing {place}", proof.speedup_so_far(pairs))
            return found

        anchor.race = race.race(run, queues, hopeful, name, self._options.storage)
        anchor.plain_samples = tuple(plain for pairs in ran.values() for plain, _ in pairs)
        for failed in anchor.race.failed:
            if failed.setup != PLAIN:  # plain against plain only shows the noise
                self._rule_out(anchor, failed)
        for setup in anchor.race.pruned:
            self._standings.note(setup, "pruned in the race")
        for setup in anchor.race.speedups:
            chosen = [pair[1] for pair in ran[setup]]
            self._standings.note(setup, "raced")
            self._rule_out(anchor, self._options.limits.latency_breach(setup, chosen))
        known = {setup: ratio for setup, ratio in anchor.race.speedups.items() if anchor.ruled_out(setup) is None}
        winner = among_equals(known)
        return winner if winner is not None and known[winner] > 1.0 else None

    def _prove(self, anchor: PointDecision, setup: Setup) -> None:
        most, batch_size = self._options.proof_prompts, anchor.workload.batch_size
        queues = queues_of(anchor.proof_pool, batch_size, max_alone=most, num_queues=6, batches_per_queue=4)
        pairs: list[proof.Pair] = []
        for done, queue in enumerate(queues):
            self._progress(f"proof {anchor.domain}", done, len(queues))
            pairs += race.run_pairs(
                self._engine, anchor.workload, queue, setup, purpose_of("proof", anchor.workload, done)
            )
            self._standings.note(setup, f"proving {done + 1}/{len(queues)}", proof.speedup_so_far(pairs))
        anchor.plain_samples = tuple(plain for plain, _ in pairs)
        self._rule_out(anchor, self._options.limits.latency_breach(setup, [chosen for _, chosen in pairs]))
        if (num_timed := proof.num_timed(pairs, len(queues[0]))) < 2:
            anchor.stopped = f"only {num_timed} outputs had a second token to time"
            return
        greedy = anchor.workload.temperature == 0.0
        anchor.measured = proof.measure(setup, pairs, greedy=greedy, queue_size=len(queues[0]))
        anchor.evidence = tuple(
            self._unit(anchor.workload, queue, setup, purpose_of("proof", anchor.workload, number))
            for number, queue in enumerate(queues)
        )
        self._standings.note(setup, "measured", anchor.measured.speedup)

    def _unit(self, workload: Workload, queue: race.Queue, setup: Setup, purpose: str) -> str:
        point = run_point(workload, queue, race.pair_order(workload, queue, setup), purpose)
        return unit_digest(self._engine.target, self._engine.environment, point)

    def _progress(self, stage: str, done: int, total: int) -> None:
        if self._watch.out_of_time():
            raise OutOfTimeError
        self._watch.progress(stage, done, total)


def _grid_seconds(mixed: PointDecision, evidence: Evidence, num_prompts: int) -> float:
    """Seconds that really running every candidate on every prompt would take, by the forecasts and seen prefills."""
    seen = [len(evidence.traces[prompt.digest].token_ids) - 1 for prompt in mixed.forecast_pool]
    tokens = sum(seen) * num_prompts / len(seen)
    prefills: dict[object, list[float]] = {}
    for setup, sample in evidence.calibration:
        prefills.setdefault(setup.draft, []).append(sample.ttft_s)
    seconds = 0.0
    for one in mixed.forecasts:
        own = prefills[one.setup.draft]
        seconds += tokens / (mixed.workload.batch_size * one.tok_per_s.estimate) + num_prompts * sum(own) / len(own)
    return seconds
