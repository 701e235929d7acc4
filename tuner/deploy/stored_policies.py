"""The policies of a store: of which targets, from which machines, and what the last run of each left."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, bindparam, select

from profiles.hardware.device import ENGINE, Machine, drop_unknown, on_gpu
from profiles.records.core import Model
from profiles.records.errors import InputError, NotMeasuredError, PolicyError, StoreError
from profiles.records.text import command
from store import tables
from store.evidence_store import EvidenceStore, targets_named
from store.location import existing_store
from tuner.deploy.match import Match, match
from tuner.policy.policy import Policy, from_json
from tuner.report.data import ReportData


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPolicy:
    """The latest policy of a target on one machine, not read yet, and how well that machine matches."""

    target: Model
    match: Match
    policy_id: int


def open_for_reading(option: str | None) -> EvidenceStore:
    """The store that `--store` names, without changing it; one of an older schema is upgraded where that is allowed.

    Raises: NotMeasuredError: it is not there. StoreError: it cannot be read, or not upgraded.
    """
    location = existing_store(option)
    try:
        return EvidenceStore.open_read_only(location)
    except StoreError:
        return EvidenceStore.open(location)


def find_targets(evidence_store: EvidenceStore, name: str | None) -> list[Model]:
    """As `targets_named`; without a name only the one tuned last. Raises NotMeasuredError: there is none."""
    with evidence_store.reading() as connection:
        targets = targets_named(connection, name)
    if not targets:
        target = "any target" if name is None else f"target {name!r}"
        is_path = os.path.exists(name or "")
        moved = f"; a moved model has its old name (`{command('show')}`) until then" if is_path else ""
        raise NotMeasuredError(
            f"the store {evidence_store.name} does not know {target}: run `{command('run')}` first{moved}"
        )
    return targets if name is not None else targets[:1]


@functools.cache
def _latest_query() -> Select[Any]:
    """The latest policy of every target in `keys` on every machine of a device, or of a compute capability, or all."""
    policies, machines = tables.policies.c, tables.environments.c
    capability = machines.compute_capability
    return (
        select(policies.target_key, policies.id, *machines)
        .join_from(tables.policies, tables.environments)
        .where(
            tables.IS_NEWEST_POLICY,
            policies.target_key.in_(bindparam("keys", expanding=True)),
            (machines.device == bindparam("device"))
            | bindparam("every")
            | (bindparam("on_gpu") & ((capability == bindparam("capability")) | capability.is_(None))),
        )
    )


def rank(evidence_store: EvidenceStore, targets: Sequence[Model], here: Machine) -> list[StoredPolicy]:
    """The latest policy of every machine that matches `here`, the best match first.

    Of many machines only those are read that may match: of this device, and on a GPU of its compute capability.
    """
    by_key = {target.run_digest: target for target in targets}
    names = [column.name for column in tables.environments.c]
    capability = here.get("compute_capability")
    values = {
        "keys": list(by_key),
        "device": str(here.get("device")),
        "on_gpu": capability is not None,
        "every": capability is None and on_gpu(here),
        "capability": str(capability),
    }
    ranked = []
    with evidence_store.reading() as connection:
        for key, policy_id, *columns in connection.execute(_latest_query(), values):
            fit = match(here, drop_unknown(dict(zip(names, columns, strict=True))))
            if fit.level != "none":
                ranked.append(StoredPolicy(target=by_key[key], match=fit, policy_id=policy_id))
    ranked.sort(key=lambda policy: policy.policy_id, reverse=True)
    return sorted(ranked, key=lambda policy: policy.match.order)


def only_engine(evidence_store: EvidenceStore, target: str | None) -> str:
    """The engine with which the target was tuned; draftpick's own where it was tuned with none.

    Raises: NotMeasuredError: no such target. InputError: it was tuned with several engines.
    """
    targets = find_targets(evidence_store, target)
    engines = tuned_on(evidence_store, targets, "engine")
    if len(engines) > 1:
        names = ", ".join(engine.removeprefix("draftpick-") for engine in engines)
        raise InputError(f"target {targets[0].name!r} was tuned with several engines: name one with --engine: {names}")
    return engines[0] if engines else ENGINE


def tuned_on(evidence_store: EvidenceStore, targets: Sequence[Model], column: str) -> list[str]:
    """What a column of `environments` holds of the machines on which the targets were tuned."""
    keys = [target.run_digest for target in targets]
    values = tables.environments.c[column]
    query = select(values).join(tables.policies).where(tables.policies.c.target_key.in_(keys)).distinct()
    with evidence_store.reading() as connection:
        return list(connection.scalars(query.order_by(values)))


def read_stored(evidence_store: EvidenceStore, stored: StoredPolicy) -> Policy:
    """Raises PolicyError: it is damaged."""
    policies = tables.policies.c
    with evidence_store.reading() as connection:
        text = str(connection.scalar(select(policies.policy).where(policies.id == stored.policy_id)))
    return read_policy(evidence_store, text)


def read_policy(evidence_store: EvidenceStore, text: str) -> Policy:
    """A policy from the store's JSON. Raises PolicyError, naming the store."""
    try:
        return from_json(text)
    except PolicyError as error:
        raise PolicyError(f"the policy in store {evidence_store.name}: {error}") from error


def find_policy(evidence_store: EvidenceStore, target: str | None) -> Policy:
    """The latest policy of the target, of any when None. Raises NotMeasuredError: there is none."""
    text = evidence_store.latest_policy(target)
    if text is None:
        subject = f"no policy of target {target!r}" if target else "no policy"
        raise NotMeasuredError(f"{subject} in store {evidence_store.name}: run `{command('run')}` first")
    return read_policy(evidence_store, text)


def find_report_data(evidence_store: EvidenceStore, policy: Policy) -> ReportData:
    """What the target's last finished run left to report.

    Raises: NotMeasuredError: no run finished, or it ended before a forecast. InputError: the data are damaged.
    """
    raw = evidence_store.latest_outcome(policy.target, policy.environment).get("dossier")
    name = policy.target.name
    if raw is None:
        raise NotMeasuredError(f"no finished run of {name} is in the store: run `{command('run')}` first")
    try:
        report_data = ReportData.from_json(raw)
    except InputError as error:
        raise InputError(f"the last run in store {evidence_store.name}: {error}") from error
    if not any(anchor.candidates for anchor in report_data.points):
        raise NotMeasuredError(f"the last run of {name} ended before a forecast: run it again, for longer")
    return report_data
