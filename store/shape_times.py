"""Step times that ship, read into a store: a file holds one sweep per shape and anchor.

The same sweep twice changes nothing. It must not know torch, nor how the file was measured.
"""

import json
from pathlib import Path
from typing import Any

from profiles.records.codec import environment_from, model_from, step_times_from
from profiles.records.core import Workload
from profiles.records.errors import InputError
from profiles.records.shape_times import FILE_VERSION
from store.evidence_store import EvidenceStore, Scope


def load(evidence_store: EvidenceStore, path: Path) -> int:
    """Adds every sweep of the file that the book does not have; how many were new.

    Raises: InputError: the file cannot be read, is of another version, or holds a value that is not allowed.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = document["evidence_version"]
        if version != FILE_VERSION:
            raise InputError(f"it has version {version}, this draftpick reads version {FILE_VERSION}")
        environment = environment_from(document["environment"])
        added = 0
        for entry in document["entries"]:
            if "step_times" not in entry:
                continue
            times = step_times_from(entry["step_times"])
            workload = Workload(batch_size=times.batch_size, context_length=times.context_length + 2, max_new_tokens=2)
            scope = Scope(target=model_from(entry["target"]), environment=environment, workload=workload)
            shape = (times.context_length, int(entry["max_length"]))
            if evidence_store.find_step_times(scope, (), context_length=shape[0], max_length=shape[1]) is None:
                evidence_store.save_step_times(scope, (), shape[1], {times.component_digest: times})
                added += 1
        return added
    except (OSError, LookupError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"evidence {path} cannot be read: {reason}") from error
