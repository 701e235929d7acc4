"""The plan that a look-up offers on a machine where nothing was measured; never proven. Loads no torch or numpy."""

from typing import Any

from profiles.hardware.device import Machine
from profiles.records.errors import InputError
from tuner.deploy.lookup import Query
from tuner.plan.acceptance import Acceptance, RoundMean
from tuner.plan.plan import PlanQuery, make_plan
from tuner.plan.shape import is_at_hand
from tuner.policy.policy import Policy
from tuner.policy.prior import Prior
from tuner.policy.query import MIXED


def offer_plan(policy: Policy, query: Query, here: Machine) -> dict[str, Any]:
    """As `make_plan`, with the acceptance that a policy of any machine has.

    Raises InputError, NotMeasuredError: also where a config is on the hub alone, because a look-up answers at once.
    """
    headline, prior = policy.headline, policy.prior
    temperature = headline.temperature if query.temperature is None else query.temperature
    if prior is None or not is_at_hand(policy.target.name):
        raise InputError(f"no acceptance or no config of {policy.target.name} is at hand: run `plan --target CONFIG`")
    accepted = _acceptance(prior, query.domain or MIXED, temperature)
    return make_plan(
        PlanQuery(
            target=policy.target.name,
            drafts=[row.draft for row in accepted],
            hardware=f"{here.get('device')}x{here.get('device_count', 1)}",
            engine=str(here.get("engine")),
            dtype=policy.target.weights_type,
            batch_sizes=(query.batch_size,),
            context=query.context_length or headline.context_length,
            lengths=prior.lengths,
            acceptance=accepted,
        )
    )


def _acceptance(prior: Prior, domain: str, temperature: float) -> list[Acceptance]:
    """Of every draft that a plan can take, on the domain, else on all text. Raises InputError: there is none."""
    rows = [row for row in prior.acceptance if row.temperature == temperature]
    rows = [row for row in rows if row.domain == domain] or [row for row in rows if row.domain == MIXED]
    accepted = []
    for row in rows:
        draft = prior.drafts[row.draft]
        if draft.kind == "composite" or not (draft.model is None or is_at_hand(draft.model.name)):
            continue
        shares = row.propose_prob, 1.0 - row.propose_prob
        rounds = {
            length: RoundMean(tokens=mean, low=mean, high=mean, drafted=dict(zip((length, 0), shares, strict=True)))
            for length, mean in zip(prior.lengths, row.mean_tokens, strict=True)
        }
        source = f"exact, from {row.num_rounds:.0f} measured rounds"
        accepted.append(Acceptance(draft=draft.name, domain=row.domain, kind="store", source=source, rounds=rounds))
    if not accepted:
        raise InputError(f"no draft with a measured acceptance can be planned at temperature {temperature:g}")
    return accepted
