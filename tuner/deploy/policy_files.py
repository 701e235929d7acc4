"""Policies as files to ship, without paths, each named by target, device and engine; checks of documents in bundles."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select

from profiles.builtin import replace_mark
from profiles.records.errors import InputError, NotMeasuredError
from profiles.records.text import command
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
    """Writes the newest policy of every target and machine, or of those named, as `bundle.pack` takes them.

    Files are called like `target=llama,device_name=NVIDIA_H100_80GB_HBM3,engine=draftpick-torch-0.6.0.json`; digests
    are added where two policies, or another file that is there, have the same name. Returns the files.
    Raises: NotMeasuredError: there is no policy. InputError: a file cannot be written. StoreError: a row is damaged.
    """
    newest = _newest(evidence_store, targets, environments)
    if not newest:
        raise NotMeasuredError(
            f"the store has no policy of these targets and machines to ship: run `{command('run')}` first"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made: {error.strerror}") from error
    counts = Counter(file_name(policy).lower() for policy in newest)
    paths = []
    for policy in newest:
        path = folder / file_name(policy)
        if counts[path.name.lower()] > 1 or not _may_replace(path, policy):
            path = folder / file_name(policy, with_digests=True)
        policies.write(path, policy)
        paths.append(path)
    return tuple(paths)


def _newest(
    evidence_store: EvidenceStore, targets: Sequence[str] | None, environments: Sequence[str] | None
) -> list[policies.Policy]:
    columns = tables.policies.c
    with evidence_store.reading() as connection:
        query = select(columns.policy).where(
            tables.IS_NEWEST_POLICY,
            columns.target_key.in_(chosen(connection, tables.models, targets)),
            columns.environment_digest.in_(chosen(connection, tables.environments, environments)),
        )
        texts = connection.scalars(query.order_by(columns.target_key, columns.environment_digest)).all()
    return [policies.from_json(json.dumps(clean(json.loads(text)))) for text in texts]


def file_name(policy: policies.Policy, *, with_digests: bool = False) -> str:
    """A name that any file system takes; the engine's version without its build."""
    machine = policy.environment
    version = machine.engine_version.split("+", maxsplit=1)[0]
    parts = {
        "target": replace_mark(policy.target.name),
        "device_name": machine.device,
        "engine": f"{machine.engine}-{version}",
    }
    names = [f"{key}={_file_part(value)}" for key, value in parts.items()]
    if with_digests:
        names.append(f"digest={policy.target.run_digest[:12]}-{machine.digest[:12]}")
    return ",".join(names) + ".json"


def _file_part(value: str) -> str:
    """Letters, digits and `._+-`, with underscores for spaces and slashes."""
    allowed = re.sub(r"[^A-Za-z0-9._+-]", "", re.sub(r"[\s/\\:]+", "_", value.strip()))
    return allowed.strip("._")[:MOST_NAME_CHARACTERS] or "unnamed"


def _may_replace(path: Path, policy: policies.Policy) -> bool:
    """Whether there is no file, or a policy of the same target and machine."""
    if not path.exists():
        return True
    try:
        other = policies.read(path)
    except InputError:
        return False
    return other.target.run_digest == policy.target.run_digest and other.environment == policy.environment
