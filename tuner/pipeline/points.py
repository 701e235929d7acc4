"""The operating points of a run: which prompts each uses for what, and what was decided there, stage by stage."""

import itertools
from collections import Counter
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

FEW_PROMPTS = 36  # of fewer a smaller share chooses
MIN_SELECTION = 4  # prompts that choose: a race needs as many


@dataclass(frozen=True, slots=True, kw_only=True)
class PointPlan:
    """An operating point that is to be decided, and the prompts of each stage; forecasts and race share theirs."""

    workload: Workload
    domain: str
    forecast_prompts: tuple[Prompt, ...]
    proof_prompts: tuple[Prompt, ...] = ()
    objective: Objective = "tpot"


@dataclass(frozen=True, slots=True, kw_only=True)
class PointDecision:
    """What every stage of an operating point came to; a stage that was not reached has None or nothing.

    `candidate` is the setup that went to the proof, `units` the digests of the proof's runs as stored. `rejected` are
    proofs of setups that were ruled out by them. `objection`: why the proof's runs are no fair comparison. `stopped`
    tells why the decision ended early.
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
    objection: str | None = None
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


def num_proof_prompts(num_prompts: int) -> int:
    """How many of the prompts of all domains are for the proof."""
    return num_prompts - round(_selection_share(num_prompts) * num_prompts)


def _selection_share(num_prompts: int) -> float:
    """The share of the prompts that choose: a third, of few prompts a little less.

    A dozen prompts tell a large gain's draft from the others sooner than they prove it.
    """
    third = num_prompts / 3
    if not 0 < num_prompts < FEW_PROMPTS:
        return 1 / 3
    return min(round(third), max(MIN_SELECTION, round(third - 1))) / num_prompts


def plan_points(workload: Workload, prompts: Sequence[Prompt], objective: Objective = "tpot") -> list[PointPlan]:
    """Plans the points of a workload: over all domains (`mixed`) first, then one per domain with 24 prompts or more.

    A third of the prompts, picked by digest within each domain, is for forecasts and race, the rest for the proof,
    which so has no prompt of the choice. A single domain is `mixed`.

    Raises:
        InputError: there are no prompts, or a domain is called `mixed`.
    """
    if not prompts:
        raise InputError("no prompts: at least one is needed")
    if any(prompt.domain == MIXED for prompt in prompts):
        raise InputError(f"domain {MIXED!r}: that name means all domains together; give the prompts another")
    domains = dict.fromkeys(prompt.domain for prompt in prompts)
    selection: dict[str, tuple[Prompt, ...]] = {}
    proof: dict[str, tuple[Prompt, ...]] = {}
    share, num_before = _selection_share(len(prompts)), 0
    for domain in domains:
        members = sorted((each for each in prompts if each.domain == domain), key=lambda prompt: prompt.digest)
        num_selection = round(share * (num_before + len(members))) - round(share * num_before)
        num_before += len(members)
        selection[domain], proof[domain] = tuple(members[:num_selection]), tuple(members[num_selection:])
    groups = {MIXED: list(domains)}
    if len(domains) > 1:
        sizes = Counter(prompt.domain for prompt in prompts)
        groups |= {domain: [domain] for domain in domains if sizes[domain] >= MIN_DOMAIN_PROMPTS}
    return [
        PointPlan(
            workload=workload,
            domain=name,
            forecast_prompts=tuple(itertools.chain.from_iterable(selection[domain] for domain in group))
            or tuple(prompts),
            proof_prompts=tuple(itertools.chain.from_iterable(proof[domain] for domain in group)),
            objective=objective,
        )
        for name, group in groups.items()
    ]
