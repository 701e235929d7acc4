"""Checks a file of step times that ship as strictly as a bundle, before it is loaded.

Such a file is plain JSON without a checksum: what it holds is still held to a bundle's types, sizes and text.
"""

from pathlib import Path
from typing import Any

from profiles.engines.recorded import covers
from profiles.records.codec import environment_from, model_from
from profiles.records.errors import InputError
from profiles.records.files import open_file
from store import tables
from store.bundle.file import MOST_LINE_BYTES, strictly_parsed
from store.bundle.rows import checked
from store.bundle.sanitize import clean


def is_file(path: Path) -> bool:
    """Whether a file is JSON and so no bundle. Raises InputError: it cannot be read."""
    try:
        with open_file(path) as file:
            return file.read(64).lstrip().startswith(b"{")
    except OSError as error:
        raise InputError(f"bundle {path} cannot be read: {error.strerror}") from error


def check(path: Path) -> int:
    """How many sweeps it holds, all of which can be loaded. Raises InputError: one cannot, or it is too large."""
    try:
        if path.stat().st_size > MOST_LINE_BYTES:
            raise InputError(f"it is larger than the {MOST_LINE_BYTES} bytes that are allowed")
        document = strictly_parsed(path.read_bytes())
        if clean(document) != document:
            raise InputError("it holds a path, or text that cannot be shown")
        environment = environment_from(document["environment"])
        checked(tables.environments, tables.environment_row(environment))
        entries = [entry for entry in document["entries"] if "step_times" in entry]
        for entry in entries:
            _check_sweep(entry, environment.digest)
        return len(entries)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"evidence {path} cannot be read: {reason}") from error


def _check_sweep(entry: dict[str, Any], machine: str) -> None:
    target = model_from(entry["target"])
    checked(tables.models, tables.model_row(target))
    row = {
        "target_key": target.run_digest,
        "environment_digest": machine,
        "measured_at": "1970-01-01T00:00:00+00:00",
        "sweep": target.run_digest,
        "part_name": target.name,
        "max_length": entry["max_length"],
    }
    _, max_length, times = tables.sweep_record(checked(tables.step_times, {**row, **entry["step_times"]}))  # type: ignore
    if not covers({times.component_digest: times}, target, (), max_length):
        raise InputError(f"step times of {target.name} lack the target, or one of its widths")
