"""The operating points of a run: which prompts each uses for what, and what was decided there, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass

from profiles.records.core import PLAIN, Interval, Prompt, Setup, Workload
from profiles.records.errors import InputError
from profiles.records.evidence import Infeasible
from tuner.forecast.evidence import Evidence
from tuner.forecast.forecaster import Forecaster
from tuner.policy.estimates import Forecast, Measured, Objective
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
    objective: Objective = "tpot"

    @property
    def is_fresh(self) -> bool:
        """Whether the proof uses prompts that had no part in the choice."""
        return not {prompt.digest for prompt in self.forecast_prompts} & {
            prompt.digest for prompt in self.proof_prompts
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDecision:
    """What every stage of an operating point came to; a stage that was not reached has None or nothing.

    `candidate` is the setup that went to the proof, `units` the digests of the proof's runs as stored. `rejected` are
    proofs of setups that were ruled out by them. `stopped` tells why the decision ended early.
    """

    plan: PointPlan
    evidence: Evidence | None = None
    forecaster: Forecaster | None = None
    forecasts: tuple[Forecast, ...] = ()
    race: RaceResult | None = None
    candidate: Setup | None = None
    measured: Measured | None = None
    units: tuple[str, ...] = ()
    rejected: tuple[Measured, ...] = ()
    infeasible: tuple[Infeasible, ...] = ()
    stopped: str | None = None
    out_of_time: bool = False

    @property
    def workload(self) -> Workload:
        return self.plan.workload

    @property
    def domain(self) -> str:
        return self.plan.domain

    def ruled_out(self, setup: Setup) -> Infeasible | None:
        """Why a setup cannot be chosen here, or None."""
        return next((infeasible for infeasible in self.infeasible if infeasible.setup == setup), None)

    def measured_rate(self, setup: Setup) -> Interval | None:
        """Tokens per second that the proof measured of its candidate, or of plain decoding beside it."""
        if self.measured is None or setup not in (PLAIN, self.measured.setup):
            return None
        return self.measured.plain_tok_per_s if setup == PLAIN else self.measured.tok_per_s


def plan_points(workload: Workload, prompts: Sequence[Prompt], objective: Objective = "tpot") -> list[PointPlan]:
    """Plans the points of a workload: over all domains (`mixed`) first, then one per domain with 24 prompts or more.

    24 prompts are reserved for the proof before any go to forecasts and race, which get at most half. Where fewer than
    12 are left for these, there is no race, and forecasts and proof both use all prompts: such a proof is not fresh
    and is corrected for the setups that were compared. A single domain is `mixed`.

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
        if len(members) >= MIN_DOMAIN_PROMPTS + MIN_FORECAST_PROMPTS:
            num_race = min(num_race, len(members) - MIN_DOMAIN_PROMPTS)
        ordered = sorted(members, key=lambda prompt: prompt.digest)
        race_prompts[domain], proof_prompts[domain] = ordered[:num_race], ordered[num_race:]
    groups = {MIXED: list(by_domain)}
    if len(by_domain) > 1:
        groups |= {domain: [domain] for domain, members in by_domain.items() if len(members) >= MIN_DOMAIN_PROMPTS}
    plans = []
    for name, domains in groups.items():
        selection = tuple(prompt for domain in domains for prompt in race_prompts[domain])
        proof = tuple(prompt for domain in domains for prompt in proof_prompts[domain])
        if len(selection) < MIN_FORECAST_PROMPTS or len(proof) < MIN_DOMAIN_PROMPTS:
            selection, proof = (), tuple(prompts) if name == MIXED else tuple(by_domain[name])
        plan = PointPlan(
            workload=workload,
            domain=name,
            forecast_prompts=selection or proof,
            race_prompts=selection,
            proof_prompts=proof,
            objective=objective,
        )
        plans.append(plan)
    return plans
