"""Kills tuning runs at random moments: is anything that was saved lost, and how much is measured twice?

    python -m tests.benchmarks.crash

Fifty runs of a made-up engine are killed with SIGKILL, then one that measures the family that ships. Of five, one dies
at any moment after its start, two after their first new unit, two when a unit is about to be saved. A store is resumed
until it is done, then the next one is begun; a finished store must hold what a run that nobody killed has saved.
`rows_lost`: rows that were committed, or units before the last that a run began, that are gone or changed after a kill;
`torn`: units of which a part is there.
"""

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.common import arguments, finish
from tests.support.crashes import TORCH, Kill, Moment, Starter, Victim, evidence_of, whole_evidence

PAUSE_S = 0.010  # for measuring, or hardly any kill would land in it
WITHIN_S = 1.0
MOMENTS: tuple[Moment, ...] = ("commit", "measuring", "commit", "measuring", "any")


def kill_made_up(
    starter: Starter, folder: Path, num_kills: int, rng: random.Random
) -> tuple[list[Kill], list[int], int]:
    """The kills, units measured again by the runs that came to the end, and finished stores unlike the whole one."""
    whole = whole_evidence(folder / "whole.db")
    kills: list[Kill] = []
    finished: list[int] = []
    unlike = 0
    while len(kills) < num_kills:
        victim = Victim(folder=folder / f"store-{len(finished)}", starter=starter)
        ended: int | None = None
        while ended is None:
            if len(kills) == num_kills:
                ended = victim.finish()
                break
            moment = MOMENTS[len(kills) % len(MOMENTS)]
            kill = victim.kill(rng, WITHIN_S, moment, pause_s=0.0 if moment == "commit" else PAUSE_S)
            if isinstance(kill, Kill):
                kills.append(kill)
            else:
                ended = kill
        finished.append(ended)
        unlike += evidence_of(victim.store) != whole
    return kills, finished, unlike


def kill_torch(starter: Starter, folder: Path, rng: random.Random) -> tuple[Kill, int, int]:
    """The kill, units measured again by the run that went on, and units of the whole."""
    kill: Kill | int = 0
    while not isinstance(kill, Kill):
        victim = Victim(folder=Path(tempfile.mkdtemp(dir=folder)), kind=TORCH, starter=starter)
        kill = victim.kill(rng, 4.0, "measuring")
    repeated = victim.finish()
    return kill, repeated, len(victim.begun)


def table_of(kills: list[Kill]) -> Table:
    """One row per what the run was doing when it was killed."""
    table = Table("killed while", "kills", "rows committed", "rows lost", "torn", "most units repeated")
    for doing, count in Counter(kill.doing for kill in kills).most_common():
        chosen = [kill for kill in kills if kill.doing == doing]
        sums = [str(sum(getattr(kill, name) for kill in chosen)) for name in ("committed", "lost", "torn")]
        table.add_row(doing, str(count), *sums, str(max(kill.repeated for kill in chosen)))
    return table


def main() -> None:
    """Made-up runs, a measured one, the table, JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of made-up runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, started = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name, Starter() as starter:
        kills, finished, unlike = kill_made_up(starter, Path(name), options.kills, rng)
        torch_kill, torch_repeated, torch_units = kill_torch(starter, Path(name), rng)
    console = Console()
    console.print(table_of(kills))
    console.print(f"torch: killed while {torch_kill.doing}, {torch_kill.committed} rows, {torch_units} units in all")
    both = [*kills, torch_kill]
    finish(
        {
            "benchmark": "crash",
            "kills": len(both),
            "rows_lost": sum(kill.lost for kill in both),
            "max_units_repeated": max([*(kill.repeated for kill in both), *finished, torch_repeated]),
            "torn": sum(kill.torn for kill in both),
            "rows_committed": sum(kill.committed for kill in both),
            "killed_while": dict(Counter(kill.doing for kill in both)),
            "stores_finished": len(finished) + 1,
            "stores_unlike": unlike,
            "seconds": round(time.monotonic() - started, 1),
        }
    )


if __name__ == "__main__":
    main()
