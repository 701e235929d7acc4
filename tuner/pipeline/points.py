"""One row of the policy in the making, and how prompts are shared out among the rows.

A row holds what was found of it; who measures and who judges is elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from profiles.records.core import PLAIN, Interval, Prompt, Setup, Workload
from profiles.records.errors import InputError
from profiles.records.evidence import Infeasible, Sample
from tuner.forecast.evidence import Evidence
from tuner.forecast.forecaster import Forecaster
from tuner.policy.estimates import Forecast, Measured
from tuner.policy.policy import MIN_DOMAIN_PROMPTS
from tuner.policy.query import MIXED
from tuner.search import race as search

MIN_FORECAST_PROMPTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounds:
    """What an anchor's forecasts rest on; kept so that a report can show it."""

    evidence: Evidence
    forecaster: Forecaster


@dataclass(slots=True, kw_only=True)
class PointDecision:
    """One row of the policy in the making."""

    workload: Workload
    domain: str
    forecast_pool: tuple[Prompt, ...]
    race_pool: tuple[Prompt, ...]
    proof_pool: tuple[Prompt, ...]
    grounds: Grounds | None = None
    forecasts: list[Forecast] = field(default_factory=list)
    race: search.Race | None = None
    candidate: Setup | None = None
    measured: Measured | None = None
    evidence: tuple[str, ...] = ()
    plain_samples: tuple[Sample, ...] = ()
    infeasible: list[Infeasible] = field(default_factory=list)
    stopped: str | None = None
    out_of_time: bool = False

    def ruled_out(self, setup: Setup) -> Infeasible | None:
        """Why a setup cannot be chosen here, or None."""
        return next((found for found in self.infeasible if found.setup == setup), None)

    def measured_rate(self, setup: Setup) -> Interval | None:
        """Tokens per second that the proof measured of a setup: its candidate, or plain decoding beside it."""
        if self.measured is None or setup not in (PLAIN, self.measured.setup):
            return None
        return self.measured.plain_tok_per_s if setup == PLAIN else self.measured.tok_per_s


def plan_points(workload: Workload, prompts: Sequence[Prompt]) -> list[PointDecision]:
    """The anchors of a workload, `mixed` first, each with prompts to race on and others to prove on.

    24 prompts are held for the proof before any go to the race, which gets at most half. Forecasts are made on the
    race's prompts too, so that the proof is fresh; where these are fewer than 12, on all. A single domain is `mixed`.
    Raises InputError without prompts, or with a domain called `mixed`.
    """
    if not prompts:
        raise InputError("no prompts: at least one is needed")
    if any(prompt.domain == MIXED for prompt in prompts):
        raise InputError(f"domain {MIXED!r}: that name means all domains together; give the prompts another")
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    share = max(0.0, min(0.5, (len(prompts) - MIN_DOMAIN_PROMPTS) / len(prompts)))
    pools: dict[str, tuple[list[Prompt], list[Prompt]]] = {}
    for domain, own in by_domain.items():
        ordered = sorted(own, key=lambda prompt: prompt.digest)
        num_race = int(len(own) * share)
        if len(own) >= MIN_DOMAIN_PROMPTS:
            num_race = min(num_race, len(own) - MIN_DOMAIN_PROMPTS)
        pools[domain] = (ordered[:num_race], ordered[num_race:])
    rows = [(MIXED, list(prompts), [pool[0] for pool in pools.values()], [pool[1] for pool in pools.values()])]
    if len(by_domain) > 1:
        large = [domain for domain, own in by_domain.items() if len(own) >= MIN_DOMAIN_PROMPTS]
        rows += [(domain, by_domain[domain], [pools[domain][0]], [pools[domain][1]]) for domain in large]
    anchors = []
    for domain, own, race, proofs in rows:
        race_pool = tuple(prompt for pool in race for prompt in pool)
        anchors.append(
            PointDecision(
                workload=workload,
                domain=domain,
                forecast_pool=race_pool if len(race_pool) >= MIN_FORECAST_PROMPTS else tuple(own),
                race_pool=race_pool,
                proof_pool=tuple(prompt for pool in proofs for prompt in pool),
            )
        )
    return anchors
