"""The family's evidence as a simulated server, and a policy made from half of the prompts: the other half is served.

Traces are the engine's, taken through a caching store. Times are stated prices, so that a replay gives the same figures
on every machine; measured ones (`measured=True`) go with runs on the real engine, and with `tuned_family` the prices
are those of the prior that a `make tune` wrote.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from profiles.acceptance.expected_rounds import WIDEST_CATCH_UP
from profiles.engines.bench import Bench
from profiles.records.core import PLAIN, Draft, Interval, Prompt, Setup, Workload
from profiles.records.evidence import StepShape
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore
from tests.benchmarks import traffic
from tests.benchmarks.common import DRAFTS as TUNED_DRAFTS
from tests.benchmarks.common import LENGTHS as TUNED_LENGTHS
from tests.benchmarks.common import load_family
from tests.benchmarks.controllers import Fixed, Table
from tests.benchmarks.simulator import Simulator
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import spread_over_domains
from tuner.pipeline.build_prior import build_prior
from tuner.pipeline.points import PointDecision, PointPlan
from tuner.policy import policy as policies
from tuner.policy.estimates import Forecast
from tuner.policy.policy import Choice, Policy
from tuner.policy.prior import DraftAcceptance, Prior, RoundTimes
from tuner.policy.query import MIXED
from tuner.search.objective import candidates

LENGTHS = tuple(range(1, 17))
BATCHES = (1, 4, 8, 32)
DRAFTS = ("ngram", "builtin:draft-general", "builtin:draft-code", "builtin:draft-prose")  # composites take long at 32
ODDS = 3.0  # by which acceptance that is too good is off
CLIFF, CLIFF_FACTOR = 4, 1.3  # tokens beyond which rounds take so many times longer than stored
LOADED_LOG_STD = 0.3  # of the times of drafts measured under load


class StatedPrices(Forecaster):
    """Seconds by a stated rule in place of timed steps.

    A step of the target takes 4.8 ms and 0.3 ms a token, one of the general draft 0.85 ms, of a small one 0.35 ms, with
    0.01 ms a token; a prefill 8 ms, and a draft's a fifth of its share of a target's.
    """

    def _calibrated(self) -> tuple[dict[Draft | None, object], dict[Draft | None, object]]:  # type: ignore[override]
        return {}, {}

    def round_s(self, setup: Setup, shape: StepShape) -> float:
        rows = self._workload.batch_size
        draft_s = 0.0
        if shape.draft_steps:
            step_s = self._draft_step_s(setup.draft)
            draft_s = shape.draft_steps * (step_s + 1e-5 * rows) + 1e-5 * rows * shape.first_draft_width
        lookup_s = 4e-5 * rows if setup.draft is not None and setup.draft.looks_up else 0.0
        return 0.0048 + 0.0003 * rows * shape.target_width + draft_s + lookup_s

    def refill_s(self, draft: Draft | None) -> float:
        return 0.008 + (4.0 * self._draft_step_s(draft) if draft is not None and draft.kind != "ngram" else 0.0)

    @staticmethod
    def _draft_step_s(draft: Draft | None) -> float:
        return 0.00085 if draft is not None and "general" in draft.name else 0.00035


class PriorPrices(StatedPrices):
    """The round times of a policy's prior at batch 1."""

    def __init__(self, evidence: Evidence, workload: Workload, target_component: str, prior: Prior) -> None:
        super().__init__(evidence, workload, target_component)
        self._times = {None if row.draft is None else prior.drafts[row.draft]: row for row in prior.round_times}

    def round_s(self, setup: Setup, shape: StepShape) -> float:
        row = self._times[setup.draft]
        late = min(WIDEST_CATCH_UP, max(0, shape.first_draft_width - 2)) if shape.draft_steps else 0
        return row.seconds[shape.target_width - 1] + late * row.catch_up_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What was traced of the family, and what follows from it.

    `policy` holds for every batch, over all domains and for each, the setup that serves the prompts which are not
    `served` the fastest; nothing in it is proven.
    """

    bench: Bench
    workload: Workload
    simulator: Simulator
    policy: Policy
    setups: tuple[Setup, ...]
    served: tuple[Prompt, ...]
    _alone: dict[Prompt, dict[Setup, float]] = field(default_factory=dict)

    def alone(self, prompt: Prompt) -> dict[Setup, float]:
        """Seconds that each setup takes for a prompt at batch 1."""
        if prompt not in self._alone:
            forecaster = self.simulator.forecasters[1]
            self._alone[prompt] = {
                setup: sum(
                    count * forecaster.round_s(setup, shape)
                    for shape, count in forecaster.rounds(setup, [prompt]).shapes.items()
                )
                for setup in self.setups
            }
        return self._alone[prompt]

    def best_alone(self, prompt: Prompt) -> tuple[Setup, int]:
        """The setup that takes the least time for a prompt at batch 1, and the tokens its rounds emit."""
        seconds = self.alone(prompt)
        return min(seconds, key=lambda setup: seconds[setup]), self.output_tokens(prompt)

    def output_tokens(self, prompt: Prompt) -> int:
        return len(self.simulator.evidence.traces[prompt.digest].token_ids) - 1


def lookup_table(policy: Policy) -> Table:
    """The policy's answers, which never change."""
    return Table(lambda num_rows, domain: policy.look_up(batch_size=num_rows, domain=domain).choice.setup)


Task, Answer = TypeVar("Task"), TypeVar("Answer")


def add_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    """The flags that both benchmarks of the selector share."""
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument(
        "--first-seed",
        type=int,
        default=2000,
        help="the selector's constants were set at seeds 0 to 3 and 1000 to 1005",
    )
    parser.add_argument("--traces", type=Path, help="folder of a store to keep traces in; none: trace anew")
    parser.add_argument("--prompts", type=int, default=144, help="half make the policy, half are served")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--processes", type=int, default=1)


def spread(
    family: Family, processes: int, play: Callable[..., Answer], tasks: Sequence[Task], *arguments: object
) -> Iterator[tuple[Task, Answer]]:
    """Every task with what `play` makes of it, in their order; processes are forked, so they share the family."""
    if processes == 1:
        yield from ((task, play(family, task, *arguments)) for task in tasks)
        return
    _shared["family"] = family
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        yield from zip(tasks, pool.map(partial(_played, play, arguments), tasks), strict=True)


_shared: dict[str, Family] = {}


def _played(play: Callable[..., Any], arguments: Sequence[object], task: object) -> Any:
    return play(_shared["family"], task, *arguments)


@contextmanager
def family(options: argparse.Namespace, *, measured: bool = False) -> Iterator[Family]:
    """Traces and, where asked for, measures or recalls everything; the store is open meanwhile."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EvidenceStore.open((options.traces or Path(folder)) / "evidence.db") as evidence_store,
    ):
        bench, loads = load_family(DRAFTS, lengths=LENGTHS, max_new_tokens=options.tokens, batch_sizes=BATCHES)
        prompts = spread_over_domains(loads[0][1], options.prompts)
        engine = CachedEngine(bench.engine, evidence_store)
        target = engine.target.run_digest
        forecasters: dict[int, Forecaster] = {}
        if measured:
            gathered = {load: gather(engine, load, prompts, LENGTHS) for load, _ in loads}
            evidence = gathered[loads[0][0]]
            for load, measured_evidence in gathered.items():
                forecasters[load.batch_size] = Forecaster(measured_evidence, load, target, load.seed)
        else:
            evidence = traced(engine, loads[0][0], prompts)
            for load, _ in loads:
                forecasters[load.batch_size] = StatedPrices(evidence, load, target)
        yield _family(bench, loads[0][0], evidence, forecasters)


def traced(engine: CachedEngine, workload: Workload, prompts: Sequence[Prompt]) -> Evidence:
    """Evidence without any time."""
    traces = {prompt.digest: engine.trace_target(workload, prompt) for prompt in prompts}
    components = {part.digest: part for draft in engine.drafts for part in draft.components}
    acceptances = {
        (part.digest, prompt.digest): engine.trace_draft(workload, prompt, traces[prompt.digest], part, max(LENGTHS))
        for prompt in prompts
        for part in components.values()
    }
    return Evidence(
        prompts=tuple(prompts),
        traces=traces,
        acceptances=acceptances,
        steps={},
        calibration=(),
        drafts=engine.drafts,
        infeasible=(),
    )


@contextmanager
def tuned_family(options: argparse.Namespace, store: Path) -> Iterator[Family]:
    """A policy that `make tune` wrote into `store`, on the prompts that it was made from, at its own prices."""
    path = max(store.glob("policy-*[0-9a-f].json"), key=lambda file: file.stat().st_mtime)
    policy = policies.read(path)
    assert policy.prior is not None
    tokens = 64  # of `make tune`
    with EvidenceStore.open(store / "evidence.db") as evidence_store:
        bench, loads = load_family(TUNED_DRAFTS, composites=True, lengths=TUNED_LENGTHS, max_new_tokens=tokens)
        ((workload, prompts),) = loads
        engine = CachedEngine(bench.engine, evidence_store)
        evidence = traced(engine, workload, prompts)
        forecaster = PriorPrices(evidence, workload, engine.target.run_digest, policy.prior)
        simulator = Simulator(workload, evidence, {1: forecaster})
        usable = tuple(draft for draft in evidence.drafts if draft in policy.prior.drafts)
        setups = candidates(usable, TUNED_LENGTHS)
        yield Family(
            bench=bench, workload=workload, simulator=simulator, policy=policy, setups=setups, served=tuple(prompts)
        )


def _family(bench: Bench, workload: Workload, evidence: Evidence, forecasters: Mapping[int, Forecaster]) -> Family:
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in evidence.prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    tuned_on = {domain: in_domain[::2] for domain, in_domain in by_domain.items()}
    pools = {MIXED: [prompt for in_domain in tuned_on.values() for prompt in in_domain], **tuned_on}
    setups = candidates(evidence.drafts, LENGTHS)
    simulator = Simulator(workload, evidence, forecasters)
    exact = Interval(estimate=1.0, low=1.0, high=1.0)
    points = [
        PointDecision(
            plan=PointPlan(
                workload=replace(workload, batch_size=batch_size), domain=domain, forecast_prompts=tuple(pool)
            ),
            evidence=evidence,
            forecaster=forecaster,
            forecasts=tuple(
                Forecast(setup=setup, tok_per_s=exact, speedup=exact, acceptance_length=None) for setup in setups
            ),
        )
        for batch_size, forecaster in forecasters.items()
        for domain, pool in pools.items()
    ]
    prior = build_prior(points, LENGTHS)
    assert prior is not None
    policy = Policy(
        created=datetime.now(UTC).isoformat(),
        target=bench.engine.target,
        environment=bench.engine.environment,
        choices=_choices(prior, workload),
        prior=prior,
    )
    choices = []
    for choice in policy.choices:
        pool = pools[choice.domain]
        phase = traffic.Phase(num_requests=max(len(pool), 3 * choice.batch_size), concurrency=choice.batch_size)
        stream = traffic.stream_of("tuning", [phase], pool, 0)
        shortlist = (PLAIN, *sorted(setups, key=lambda setup: -_rate(prior, choice, setup))[:12])
        best = max(shortlist, key=lambda setup: simulator.serve(stream, Fixed(setup)).tok_per_s)
        choices.append(replace(choice, setup=best))
    return Family(
        bench=bench,
        workload=workload,
        simulator=simulator,
        policy=replace(policy, choices=tuple(choices)),
        setups=setups,
        served=tuple(prompt for in_domain in by_domain.values() for prompt in in_domain[1::2]),
    )


def _choices(prior: Prior, workload: Workload) -> tuple[Choice, ...]:
    """For every domain and batch of a prior the setup of the highest expected goodput."""
    choices = []
    for batch_size in sorted({row.batch_size for row in prior.round_times}):
        for domain in dict.fromkeys(row.domain for row in prior.acceptance):
            choice = Choice(
                batch_size=batch_size,
                context_length=workload.context_length,
                domain=domain,
                temperature=workload.temperature,
                setup=PLAIN,
                reason="The best by its evidence; nothing was run to prove it.",
            )
            setups = (PLAIN, *(Setup(draft=draft, length=k) for draft in prior.drafts for k in prior.lengths))
            choices.append(replace(choice, setup=max(setups, key=lambda setup: _rate(prior, choice, setup))))
    return tuple(choices)


def _rate(prior: Prior, choice: Choice, setup: Setup) -> float:
    """Tokens per second of a row by a prior."""
    times = {row.draft: row for row in prior.round_times if row.batch_size == choice.batch_size}
    if setup.draft is None:
        return 1.0 / times[None].seconds[0]
    number = prior.drafts.index(setup.draft)
    accepted = next(row for row in prior.acceptance if row.draft == number and row.domain == choice.domain)
    if number not in times or setup.length not in prior.lengths:
        return 0.0
    proposes = 1.0 - (1.0 - accepted.propose_prob) ** choice.batch_size
    seconds = times[number].seconds
    round_s = proposes * seconds[setup.length] + (1.0 - proposes) * seconds[0]
    return accepted.mean_tokens[prior.lengths.index(setup.length)] / round_s


def wrong_policies(family: Family, seed: int) -> dict[str, Policy]:
    """Policies as wrong evidence gives them, under names of what is wrong."""
    prior, rng = family.policy.prior, random.Random(f"{seed} wrong evidence")
    drafts = {number: rng.gauss(0.0, LOADED_LOG_STD) for number in range(len(prior.drafts))}
    domains = [name for name in dict.fromkeys(row.domain for row in prior.acceptance) if name != MIXED]
    renamed = {MIXED: MIXED, **dict(zip(domains, (*domains[1:], *domains[:1]), strict=True))}
    priors = {
        "acceptance_too_good": replace(prior, acceptance=tuple(_too_good(prior, row) for row in prior.acceptance)),
        "late_positions_too_good": replace(
            prior,
            acceptance=tuple(
                _too_good(prior, row, first=2) if row.domain == domains[0] else row for row in prior.acceptance
            ),
        ),
        "cliff": replace(prior, round_times=tuple(_without_cliff(row) for row in prior.round_times)),
        "labels_permuted": replace(
            prior, acceptance=tuple(replace(row, domain=renamed[row.domain]) for row in prior.acceptance)
        ),
        "times_under_load": replace(
            prior,
            round_times=tuple(
                _loaded(row, drafts.get(-1 if row.draft is None else row.draft, 0.0)) for row in prior.round_times
            ),
        ),
    }
    return {
        name: replace(family.policy, prior=wrong, choices=_choices(wrong, family.workload))
        for name, wrong in priors.items()
    }


def _too_good(prior: Prior, row: DraftAcceptance, first: int = 0) -> DraftAcceptance:
    """Model drafts accepted at three times the odds, from a position on."""
    if prior.drafts[row.draft].kind == "ngram":
        return row
    better = (ODDS * prob / (1.0 + (ODDS - 1.0) * prob) for prob in row.accept_probs[first:])
    probs = (*row.accept_probs[:first], *better)
    reached, tokens = row.propose_prob, [1.0]
    for prob in probs:
        reached *= prob
        tokens.append(tokens[-1] + reached)
    return replace(row, accept_probs=probs, mean_tokens=tuple(tokens[length] for length in prior.lengths))


def _without_cliff(row: RoundTimes) -> RoundTimes:
    """Long rounds stored faster than they are."""
    return replace(
        row, seconds=(*row.seconds[: CLIFF + 1], *(value / CLIFF_FACTOR for value in row.seconds[CLIFF + 1 :]))
    )


def _loaded(row: RoundTimes, log_factor: float) -> RoundTimes:
    factor = 2.718281828459045**log_factor
    return replace(row, seconds=tuple(seconds * factor for seconds in row.seconds))
