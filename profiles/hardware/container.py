"""What a control group of version 2 (a container, a systemd slice) leaves to this process. Standard library only."""

import math
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota() -> int | None:
    """Whole cores' worth of processor time, rounded up; None without a quota."""
    limits = [fields for folder in _folders() if len(fields := _fields(folder / "cpu.max")) == 2]
    quotas = [math.ceil(int(quota) / int(period)) for quota, period in limits if quota.isdecimal()]
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Bytes that the group may use; None without a limit."""
    return min((limit for limit, _ in _memory()), default=None)


def free_memory() -> int | None:
    """Bytes that the group may still use, reclaimable file cache included; None without a limit."""
    return min((max(0, limit - used) for limit, used in _memory()), default=None)


def _memory() -> Iterator[tuple[int, int]]:
    """(limit, used) of every group around this process that has a limit."""
    for folder in _folders():
        limit, used = (_fields(folder / name) for name in ("memory.max", "memory.current"))
        if limit and limit[0].isdecimal():
            statistics = _fields(folder / "memory.stat")
            pairs = dict(zip(statistics[::2], statistics[1::2], strict=False))
            yield int(limit[0]), int(used[0] if used else 0) - int(pairs.get("inactive_file", "0"))


def _folders() -> Iterator[Path]:
    """The folders of the groups around this process, the innermost first."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in (line.removeprefix("0::") for line in lines if line.startswith("0::")):
        path = ROOT / group.strip("/")
        yield from (folder for folder in (path, *path.parents) if folder == ROOT or ROOT in folder.parents)


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []
