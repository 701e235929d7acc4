"""What a control group (a container, a systemd slice) leaves to this process. Standard library only."""

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # what cgroup v1 says where there is none


def cpu_quota() -> int | None:
    """Whole cores' worth of processor time, rounded up; None without a quota."""
    quotas = []
    for folder in _folders("cpu"):
        quota, period = ([*_fields(folder / "cpu.max"), "", ""])[:2]  # version 2
        if not quota:
            quota, period = _first_field(folder / "cpu.cfs_quota_us"), _first_field(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            quotas.append(max(1, math.ceil(int(quota) / int(period))))
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Bytes that the group may use; None without a limit."""
    return min((limit for limit, _ in _memory()), default=None)


def free_memory() -> int | None:
    """Bytes that the group may still use, reclaimable file cache included; None without a limit."""
    return min((max(0, limit - used) for limit, used in _memory()), default=None)


def _memory() -> Iterator[tuple[int, int]]:
    """(limit, used) of every group around this process that has a limit."""
    for folder in _folders("memory"):
        limit = _first_field(folder / "memory.max") or _first_field(folder / "memory.limit_in_bytes")
        used = _first_field(folder / "memory.current") or _first_field(folder / "memory.usage_in_bytes")
        if limit.isdecimal() and int(limit) < _NO_LIMIT:
            statistics = _fields(folder / "memory.stat")
            pairs = dict(zip(statistics[::2], statistics[1::2], strict=False))
            cached = pairs.get("total_inactive_file", pairs.get("inactive_file", "0"))
            yield int(limit), int(used or 0) - int(cached)


def _folders(controller: str) -> Iterator[Path]:
    """The folders of the groups around this process, of version 2 and of version 1."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = ([*line.split(":", 2), "", ""])[:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = ROOT / controllers if controllers else ROOT
        path = root / group.strip("/")
        yield from (folder for folder in (path, *path.parents) if folder == root or root in folder.parents)


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _first_field(path: Path) -> str:
    return next(iter(_fields(path)), "")
