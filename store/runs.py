"""One tuning run over a book: evidence is recalled or measured and saved, the decision is made and kept.

Joins the remembering engine, the tuner and the book; how any of them works it must not know.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from profiles.errors import RunInterruptedError
from profiles.terms import PLAIN, Engine, Prompt, Workload
from store.book import Book, Scope
from store.remember import Remember
from tuner import policy as policies
from tuner import search
from tuner.evidence import Progress
from tuner.report import ChartRow
from tuner.tuning import Anchor, Options, Outcome, Tuner

OPTUNA_NAME = "optuna.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """An open book and Optuna's studies beside it; policies are kept in the same folder."""

    book: Book
    studies: search.Storage

    @classmethod
    def of(cls, book: Book) -> "Shelf":
        """The studies are made where there are none. Raises StoreError when they cannot be opened."""
        return cls(book=book, studies=search.open_storage(book.path.with_name(OPTUNA_NAME)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What a run decided, where the policy is, and what it cost."""

    policy: policies.Policy
    policy_path: Path
    outcome: Outcome
    cost: dict[str, Any]


def tune(
    engine: Engine,
    loads: Sequence[tuple[Workload, tuple[Prompt, ...]]],
    shelf: Shelf,
    lengths: tuple[int, ...],
    watch: tuple[Progress, Callable[[], bool]],
) -> FinishedRun:
    """Measures or recalls, decides, and keeps the policy; `watch` is (progress, whether the budget has ended).

    Raises: RunInterruptedError: Ctrl-C; what was measured is kept. EngineError: the target itself failed.
    """
    book, folder = shelf.book, shelf.book.path.parent
    remembering = Remember(engine, book)
    run_id = book.save_run(Scope(target=engine.target, environment=engine.environment, workload=loads[0][0]))
    options = Options(lengths=lengths, storage=shelf.studies, run_name=f"run {run_id} of {_utc_now()}")
    with _interruptible(remembering, folder):
        outcome = Tuner(remembering, options, *watch).tune(loads)
    choices = _joined(book, engine, outcome)
    policy = policies.Policy(created=_utc_now(), target=engine.target, environment=engine.environment, choices=choices)
    path = folder / policy.file_name
    policies.write(path, policy)
    book.save_policy(policies.to_json(policy), policy.target, policy.environment)
    cost = {
        "measured_seconds": round(remembering.measured_seconds, 2),
        "measured_units": remembering.measured_units,
        "reused_units": remembering.reused_units,
        "grid_seconds_estimate": outcome.grid_seconds_estimate,
    }
    rows = [asdict(row) for row in _chart_rows(outcome.anchors[0])]
    book.finish_run(run_id, {"cost": cost, "chart": rows})
    return FinishedRun(policy=policy, policy_path=path, outcome=outcome, cost=cost)


def _joined(book: Book, engine: Engine, outcome: Outcome) -> tuple[policies.Choice, ...]:
    """The run's choices, then those of the latest policy of this target and machine that they leave standing.

    An anchor for which the budget ended first keeps its earlier proven choice. An earlier choice falls when the run
    decided its anchor, or used its temperature with another top-p or top-k: a policy holds one of each.
    """
    text = book.latest_policy(engine.target.run_digest, engine.environment)
    earlier = {} if text is None else {choice.anchor: choice for choice in policies.from_json(text).choices}
    chosen = []
    for anchor, choice in zip(outcome.anchors, outcome.choices, strict=True):
        known = earlier.pop(choice.anchor, None)
        chosen.append(known if anchor.stopped is not None and known is not None and known.proven else choice)
    filters = {choice.temperature: (choice.top_p, choice.top_k) for choice in chosen}
    standing = [
        choice for choice in earlier.values() if filters.get(choice.temperature) in (None, (choice.top_p, choice.top_k))
    ]
    return (*chosen, *standing)


@contextlib.contextmanager
def _interruptible(remembering: Remember, folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterruptedError(
            f"interrupted: {remembering.measured_units} units measured in this run are kept in {folder}; "
            "run the same command again to go on from there"
        ) from None


def _chart_rows(mixed: Anchor) -> list[ChartRow]:
    """Every candidate of an anchor: its forecast, and what was measured of it."""
    rows = []
    for one in mixed.forecasts:
        measured = mixed.measured_rate(one.setup)
        speedup = one.speedup.estimate
        if measured is not None and mixed.measured is not None and one.setup != PLAIN:
            speedup = mixed.measured.speedup.estimate
        group = one.setup.draft.name if one.setup.draft else PLAIN.name
        row = ChartRow(
            setup_name=one.setup.name, group=group, forecast=one.tok_per_s, measured=measured, speedup=speedup
        )
        rows.append(row)
    return rows


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
