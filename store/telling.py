"""What the verbs print of a finished run and of a look-up, as lines and as one JSON document.

How anything was found it must not know, and it prints nothing itself.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from store.book import Book
from store.deploy import Found
from tuner import report

if TYPE_CHECKING:
    from store.runs import FinishedRun


def outcome_lines(done: "FinishedRun") -> Iterator[str]:
    """What was left out and why, what the run cost, and how quiet the machine was."""
    yield from (f"infeasible: {one.name} ({one.reason}): {one.detail}" for one in done.left_out)
    yield from (f"{anchor.domain}: {anchor.stopped}" for anchor in done.outcome.anchors if anchor.stopped)
    measured = [choice.measured for choice in done.outcome.choices if choice.measured is not None]
    grid = done.outcome.grid_seconds_estimate
    text = f"measured {done.cost['measured_seconds']:.0f} s, reused {done.cost['reused_units']} known units"
    if grid is not None:
        text += f"; really running all {len(done.outcome.anchors[0].forecasts)} setups would take about {grid:.0f} s"
    yield text
    partings, disturbed = sum(one.num_partings for one in measured), sum(one.num_disturbed for one in measured)
    yield f"outputs parted at near-ties: {partings}; pairs of runs disturbed by other programs: {disturbed}"
    noises = [f"{anchor.race.noise:+.1%}" for anchor in done.outcome.anchors if anchor.race and anchor.race.noise]
    if noises:
        yield f"plain against plain, the races' noise floor: {', '.join(noises)}"
    yield f"policy: {done.policy_path}"


def lookup_document(found: Found, book: Book, store: str) -> dict[str, Any]:
    """The policy that answered as `run` printed it (without one: the target), the answer, and how well it matches."""
    outcome: dict[str, Any] = {}
    known: dict[str, Any] = {"target": asdict(found.target), "store": store}
    if found.policy is not None:
        outcome = book.latest_outcome(found.target)
        path = str(book.folder / found.policy.file_name)
        known = report.document(found.policy, cost=outcome.get("cost", {}), store=store, policy_path=path)
    answer = {**report.answer(found.answer), "match": found.to_json()}
    return {**known, "left_out": outcome.get("left_out", []), "answer": answer}
