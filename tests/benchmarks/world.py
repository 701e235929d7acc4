"""The family's evidence as a simulated server, and a policy made from half of the prompts: the other half is served.

Evidence is measured by the engine through a remembering store, so a second run on the same store measures nothing.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from profiles import builtin
from profiles.engines import workloads
from profiles.engines.bench import Bench, Question
from profiles.engines.torch import load as load_module
from profiles.records import draft_spec
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore
from tests.benchmarks.simulator import Simulator, World, noise_of
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.forecast.queues import spread_over_domains
from tuner.pipeline.build_prior import build_prior
from tuner.pipeline.decision import alternatives
from tuner.pipeline.points import PointDecision, PointPlan
from tuner.policy.policy import Choice, Policy
from tuner.policy.query import MIXED
from tuner.search.objective import candidates

LENGTHS = tuple(range(1, 17))
BATCHES = (1, 4, 8, 32)
DRAFTS = ("ngram", "builtin:draft-general", "builtin:draft-code", "builtin:draft-prose")  # composites take long at 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What was measured of the family, and what follows from it.

    `policy` holds for every batch, over all domains and for each, the best forecast on prompts that are not `served`;
    nothing in it is proven. `best[batch, domain]` are the best setups of those forecasts, `noise` the factors by which
    the target's steps scatter around their mean.
    """

    bench: Bench
    workload: Workload
    simulator: Simulator
    policy: Policy
    best: Mapping[tuple[int, str], Setup]
    setups: tuple[Setup, ...]
    served: tuple[Prompt, ...]
    noise: tuple[float, ...]
    _alone: dict[Prompt, tuple[Setup, int]] = field(default_factory=dict)

    def look_up(self, num_rows: int, domain: str | None) -> Setup:
        """The policy's answer, which never changes."""
        size = min(size for size, _ in self.best if size >= num_rows)
        return self.best[size, domain or MIXED]

    def best_alone(self, prompt: Prompt) -> tuple[Setup, int]:
        """The setup that takes the least time for a prompt at batch 1, and the tokens its rounds emit."""
        if prompt not in self._alone:
            forecaster = self.simulator.world.forecasters[1]
            seconds = {}
            for setup in self.setups:
                shapes = forecaster.rounds(setup, [prompt]).shapes
                seconds[setup] = sum(count * forecaster.round_s(setup, shape) for shape, count in shapes.items())
            tokens = len(self.simulator.world.evidence.traces[prompt.digest].token_ids) - 1
            self._alone[prompt] = min(seconds, key=lambda setup: seconds[setup]), tokens
        return self._alone[prompt]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that both benchmarks of the selector share."""
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--store", type=Path, help="folder of a store to keep evidence in; none: measure anew")
    parser.add_argument("--prompts", type=int, default=144, help="half make the policy, half are served")
    parser.add_argument("--tokens", type=int, default=48)


@contextmanager
def family(options: argparse.Namespace) -> Iterator[Family]:
    """Measures or recalls everything; the store is open meanwhile."""
    with (
        tempfile.TemporaryDirectory() as folder,
        EvidenceStore.open((options.store or Path(folder)) / "evidence.db") as evidence_store,
    ):
        bench = load_module.load(builtin.TARGET, [draft_spec.parse_draft(text) for text in DRAFTS], None, None)
        question = Question(lengths=LENGTHS, max_new_tokens=options.tokens, batch_sizes=BATCHES)
        loads, _ = workloads.workloads(bench, question, [builtin.ALL_PROMPTS])
        prompts = spread_over_domains(loads[0][1], options.prompts)
        engine = CachedEngine(bench.engine, evidence_store)
        measured = {}
        for workload, _ in loads:
            evidence = gather(engine, workload, prompts, LENGTHS)
            forecaster = Forecaster(evidence, workload, engine.target.run_digest, workload.seed)
            measured[workload] = evidence, forecaster
        yield _family(bench, measured, prompts)


def _family(
    bench: Bench, measured: Mapping[Workload, tuple[Evidence, Forecaster]], prompts: Sequence[Prompt]
) -> Family:
    alone = next(iter(measured))
    evidence, _ = measured[alone]
    setups = candidates(evidence.drafts, LENGTHS)
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    tuned_on = {domain: in_domain[::2] for domain, in_domain in by_domain.items()}
    pools = {MIXED: [prompt for in_domain in tuned_on.values() for prompt in in_domain], **tuned_on}
    points = [
        PointDecision(
            plan=PointPlan(workload=workload, domain=domain, forecast_prompts=tuple(pool)),
            evidence=gathered,
            forecaster=forecaster,
            forecasts=tuple(forecaster.forecast(setup, pool) for setup in setups),
        )
        for workload, (gathered, forecaster) in measured.items()
        for domain, pool in pools.items()
    ]
    choices = tuple(_choice(point) for point in points)
    return Family(
        bench=bench,
        workload=alone,
        simulator=Simulator(
            World(
                workload=alone,
                evidence=evidence,
                forecasters={load.batch_size: forecaster for load, (_, forecaster) in measured.items()},
            )
        ),
        policy=Policy(
            created=datetime.now(UTC).isoformat(),
            target=bench.engine.target,
            environment=bench.engine.environment,
            choices=choices,
            prior=build_prior(points, LENGTHS),
        ),
        best={(choice.batch_size, choice.domain): choice.setup for choice in choices},
        setups=setups,
        served=tuple(prompt for in_domain in by_domain.values() for prompt in in_domain[1::2]),
        noise=noise_of(evidence.steps[bench.engine.target.run_digest]),
    )


def _choice(point: PointDecision) -> Choice:
    """The best forecast of a point by its low end; plain decoding where none beats it."""
    best = next(iter(alternatives(point.forecasts)), None)
    return Choice(
        batch_size=point.workload.batch_size,
        context_length=point.workload.context_length,
        domain=point.domain,
        temperature=point.workload.temperature,
        setup=PLAIN if best is None else best.setup,
        reason="The best forecast; nothing was run to prove it.",
        forecast=best,
    )
