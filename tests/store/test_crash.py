"""A run that is killed loses nothing it saved, and the run after it measures at most one unit again."""

import random
from pathlib import Path

from tests.support.crashes import Kill, Moment, Starter, Victim, evidence_of, whole_evidence

MOMENTS: tuple[Moment, ...] = ("any", "commit", "measuring", "commit", "measuring")


def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    """Five kills with SIGKILL, some amid a commit; raw SQL finds every row, no part of a unit, and the end of the run
    is what a run that nobody killed has saved."""
    rng = random.Random()
    with Starter() as starter:
        victim = Victim(folder=tmp_path / "killed", starter=starter)
        kills = [victim.kill(rng, 0.5, moment, pause_s=0.01) for moment in MOMENTS]
        assert victim.finish() <= 1
    found = [kill for kill in kills if isinstance(kill, Kill)]
    assert len(found) >= len(MOMENTS) - 1  # one may have ended first on a fast machine
    assert [(kill.lost, kill.torn) for kill in found] == [(0, 0)] * len(found)
    assert max(kill.repeated for kill in found) <= 1
    assert evidence_of(victim.store) == whole_evidence(tmp_path / "whole.db")
