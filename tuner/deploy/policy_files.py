"""Policies as files to ship, without paths, each named by target, device and engine; checks of documents in bundles."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select

from profiles.builtin import replace_mark
from profiles.records.errors import InputError, NotMeasuredError
from store import tables
from store.bundle.bundle import chosen
from store.bundle.rows import Documents
from store.bundle.sanitize import clean
from store.evidence_store import EvidenceStore
from tuner.policy import policy as policies
from tuner.report.data import ReportData

MOST_NAME_CHARACTERS = 60


def _check_policy(text: str) -> tuple[str, str, str]:
    policy = policies.from_json(text)
    return policies.to_json(policy), policy.target.run_digest, policy.environment.digest


DOCUMENTS = Documents(policy=_check_policy, report_data=lambda raw: ReportData.from_json(raw).to_json())


def export_policies(
    evidence_store: EvidenceStore,
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    environments: Sequence[str] | None = None,
) -> tuple[Path, ...]:
    """Writes the latest policy of every target and machine (or of those named, as `bundle.pack` takes them).

    Each file is replaced in one step; returns the files.

    Names like `target=llama,device_name=NVIDIA_H100_80GB_HBM3,engine=draftpick-torch-0.3.0.json`; a part of the
    digests is added where two policies, or a file of another policy that is there, have the same name.
    Raises: NotMeasuredError: there is no policy. InputError: a file cannot be written. StoreError: one is damaged.
    """
    latest = _latest(evidence_store, targets, environments)
    if not latest:
        about = " of what was asked" if targets or environments else ""
        raise NotMeasuredError(f"the store has no policy{about} to ship: run `tune.py run` first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}") from error
    shared = Counter(file_name(policy).lower() for policy in latest.values())
    written = []
    for key in sorted(latest):
        policy = latest[key]
        path = folder / file_name(policy)
        if shared[path.name.lower()] > 1 or not _may_replace(path, policy):
            path = folder / file_name(policy, with_digests=True)
        policies.write(path, policy)
        written.append(path)
    return tuple(written)


def _latest(
    evidence_store: EvidenceStore, targets: Sequence[str] | None, environments: Sequence[str] | None
) -> dict[tuple[str, str], policies.Policy]:
    texts: dict[tuple[str, str], str] = {}
    with evidence_store.reading() as connection:
        models = chosen(connection, tables.models, targets)
        machines = chosen(connection, tables.environments, environments)
        for row in connection.execute(select(tables.policies).where(tables.IS_NEWEST_POLICY)).mappings():
            if row["target_key"] in models and row["environment_digest"] in machines:
                texts[row["target_key"], row["environment_digest"]] = row["policy"]
    return {key: _cleaned(policies.from_json(text)) for key, text in texts.items()}


def _cleaned(policy: policies.Policy) -> policies.Policy:
    return policies.from_json(json.dumps(clean(json.loads(policies.to_json(policy)))))


def file_name(policy: policies.Policy, *, with_digests: bool = False) -> str:
    """A name that any file system takes; the engine's version is told without what it was built on."""
    machine = policy.environment
    version = machine.engine_version.split("+", maxsplit=1)[0]
    parts = {
        "target": replace_mark(policy.target.name),
        "device_name": machine.device,
        "engine": f"{machine.engine}-{version}",
    }
    spelled = [f"{name}={_plain(value)}" for name, value in parts.items()]
    if with_digests:
        spelled.append(f"digest={policy.target.run_digest[:12]}-{machine.digest[:12]}")
    return ",".join(spelled) + ".json"


def _plain(value: str) -> str:
    """Spaces and slashes to underscores, all else that is not plain dropped."""
    kept = re.sub(r"[^A-Za-z0-9._+-]", "", re.sub(r"[\s/\\:]+", "_", value.strip()))
    return kept.strip("._")[:MOST_NAME_CHARACTERS] or "unnamed"


def _may_replace(path: Path, policy: policies.Policy) -> bool:
    """Whether nothing is there, or a policy of the same target and machine."""
    if not path.exists():
        return True
    try:
        there = policies.read(path)
    except InputError:
        return False
    return there.target.run_digest == policy.target.run_digest and there.environment == policy.environment
