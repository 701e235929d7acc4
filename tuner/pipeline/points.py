"""The operating points of a run: which prompts each uses for what, and what was decided there, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from profiles.records.core import PLAIN, Interval, Prompt, Setup, Workload
from profiles.records.errors import InputError
from profiles.records.evidence import Infeasible
from tuner.forecast.evidence import Evidence
from tuner.forecast.forecaster import Forecaster
from tuner.policy.estimates import Forecast, Measured
from tuner.policy.policy import MIN_DOMAIN_PROMPTS
from tuner.policy.query import MIXED
from tuner.search.race import RaceResult

MIN_FORECAST_PROMPTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPlan:
    """An operating point that is to be decided, and the prompts of each stage."""

    workload: Workload
    domain: str
    forecast_prompts: tuple[Prompt, ...]
    race_prompts: tuple[Prompt, ...] = ()
    proof_prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PointForecasts:
    """The forecasts of every candidate at a point, best score first, and what they were computed from."""

    evidence: Evidence
    forecaster: Forecaster
    forecasts: tuple[Forecast, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofResult:
    """The paired runs that were to prove the winner; `units` are the digests of the runs as stored."""

    measured: Measured
    units: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A race and a proof of some finalists; a stage that was not reached is None.

    `candidate` is the setup that goes to the proof. `stopped` tells why the attempt ended early.
    """

    race: RaceResult | None = None
    candidate: Setup | None = None
    proof: ProofResult | None = None
    stopped: str | None = None
    out_of_time: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDecision:
    """All stages of one operating point: plan, forecasts, the last attempt, and the setups that were ruled out."""

    plan: PointPlan
    stage: PointForecasts | None = None
    attempt: Attempt = Attempt()
    infeasible: tuple[Infeasible, ...] = ()

    @property
    def workload(self) -> Workload:
        return self.plan.workload

    @property
    def domain(self) -> str:
        return self.plan.domain

    @property
    def forecasts(self) -> tuple[Forecast, ...]:
        return () if self.stage is None else self.stage.forecasts

    @property
    def race(self) -> RaceResult | None:
        return self.attempt.race

    @property
    def candidate(self) -> Setup | None:
        return self.attempt.candidate

    @property
    def measured(self) -> Measured | None:
        return None if self.attempt.proof is None else self.attempt.proof.measured

    @property
    def stopped(self) -> str | None:
        return self.attempt.stopped

    def ruled_out(self, setup: Setup) -> Infeasible | None:
        """Why a setup cannot be chosen here, or None."""
        return next((infeasible for infeasible in self.infeasible if infeasible.setup == setup), None)

    def measured_rate(self, setup: Setup) -> Interval | None:
        """Tokens per second that the proof measured of its candidate, or of plain decoding beside it."""
        if self.measured is None or setup not in (PLAIN, self.measured.setup):
            return None
        return self.measured.plain_tok_per_s if setup == PLAIN else self.measured.tok_per_s


def plan_points(workload: Workload, prompts: Sequence[Prompt]) -> list[PointPlan]:
    """Plans the points of a workload: over all domains (`mixed`) first, then one per domain with 24 prompts or more.

    24 prompts are reserved for the proof before any go to the race, which gets at most half. Forecasts use the race's
    prompts, or all where these are fewer than 12. A single domain is `mixed`.

    Raises:
        InputError: there are no prompts, or a domain is called `mixed`.
    """
    if not prompts:
        raise InputError("no prompts: at least one is needed")
    if any(prompt.domain == MIXED for prompt in prompts):
        raise InputError(f"domain {MIXED!r}: that name means all domains together; give the prompts another")
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    race_share = max(0.0, min(0.5, (len(prompts) - MIN_DOMAIN_PROMPTS) / len(prompts)))
    race_prompts: dict[str, list[Prompt]] = {}
    proof_prompts: dict[str, list[Prompt]] = {}
    for domain, members in by_domain.items():
        num_race = int(len(members) * race_share)
        if len(members) >= MIN_DOMAIN_PROMPTS:
            num_race = min(num_race, len(members) - MIN_DOMAIN_PROMPTS)
        ordered = sorted(members, key=lambda prompt: prompt.digest)
        race_prompts[domain], proof_prompts[domain] = ordered[:num_race], ordered[num_race:]
    groups = {MIXED: list(by_domain)}
    if len(by_domain) > 1:
        groups |= {domain: [domain] for domain, members in by_domain.items() if len(members) >= MIN_DOMAIN_PROMPTS}
    plans = []
    for name, domains in groups.items():
        race_pool = tuple(prompt for domain in domains for prompt in race_prompts[domain])
        everything = tuple(prompts) if name == MIXED else tuple(by_domain[name])
        plans.append(
            PointPlan(
                workload=workload,
                domain=name,
                forecast_prompts=race_pool if len(race_pool) >= MIN_FORECAST_PROMPTS else everything,
                race_prompts=race_pool,
                proof_prompts=tuple(prompt for domain in domains for prompt in proof_prompts[domain]),
            )
        )
    return plans
