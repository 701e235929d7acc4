"""What the verbs print of a finished run and of a look-up, as lines and as one JSON document.

How anything was found it must not know, and it prints nothing itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from profiles.hardware.device import ENGINE
from profiles.records.errors import InputError
from store.evidence_store import EvidenceStore
from tuner.deploy.lookup import SERVING, Found
from tuner.deploy.match import MEANINGS

if TYPE_CHECKING:
    from tuner.run import FinishedRun


def outcome_lines(done: "FinishedRun") -> Iterator[str]:
    """What was left out and why, what the run cost, and how quiet the machine was."""
    yield from (f"infeasible: {one.name} ({one.reason}): {one.detail}" for one in done.left_out)
    yield from (f"{point.domain}: {point.stopped}" for point in done.outcome.points if point.stopped)
    measured = [choice.measured for choice in done.outcome.choices if choice.measured is not None]
    grid = done.outcome.grid_seconds_estimate
    text = f"measured {done.cost['measured_seconds']:.0f} s, reused {done.cost['reused_units']} known units"
    if grid is not None:
        text += f"; really running all {len(done.outcome.points[0].forecasts)} setups would take about {grid:.0f} s"
    yield text
    if starts := done.cost.get("engine_starts"):
        each_s, cells = done.cost["starting_seconds"] / starts, done.cost["grid_starts"]
        yield f"engine started {starts} times, {each_s:.1f} s each; a grid with a start for every cell: {cells} times"
    divergences, disturbed = sum(one.num_divergences for one in measured), sum(one.num_disturbed for one in measured)
    yield f"outputs that diverged at near-ties: {divergences}; pairs of runs disturbed by other programs: {disturbed}"
    noises = [f"{point.race.noise:+.1%}" for point in done.outcome.points if point.race and point.race.noise]
    if noises:
        yield f"plain against plain, the races' noise floor: {', '.join(noises)}"
    yield f"policy: {done.policy_path}"


def engine_asked(form: str | None) -> str:
    """The engine whose measurements are asked for by what is to be printed. Raises InputError: an unknown form."""
    if form is None:
        return ENGINE
    from tuner import export

    if form not in export.FORMS:
        raise InputError(f"format {form!r}: allowed are {', '.join(export.FORMS)}")
    return form if form in SERVING else ENGINE


def lookup_text(found: Found, form: str | None, version: str | None) -> tuple[str, list[str]]:
    """What a look-up prints, for an engine or for people, and what is said beside it on standard error.

    Raises InputError: an engine version that is none.
    """
    asides = [] if found.caveat is None else [f"warning: {found.caveat}"]
    choice = found.answer.choice
    if form is None:
        lines = [f"{choice.setup.name}: {found.answer.rule}", choice.reason]
        lines.append(f"match: {found.level}, {MEANINGS[found.level]}")
        return "\n".join([*lines, ""]), asides
    from tuner import export

    made = export.emit(found.deployment(), form, version)
    if made.text and made.setup is not None:
        asides.append(f"{made.setup.name}: {made.label}")
    return made.text, [*asides, *([] if made.note is None else [made.note])]


def lookup_document(found: Found, evidence_store: EvidenceStore, store: str) -> dict[str, Any]:
    """The policy that answered as `run` printed it (without one: the target), the answer, and how well it matches."""
    from tuner import report

    outcome: dict[str, Any] = {}
    known: dict[str, Any] = {"target": asdict(found.target), "store": store}
    if found.policy is not None:
        outcome = evidence_store.latest_outcome(found.target, found.policy.environment)
        path = evidence_store.folder / found.policy.file_name
        known = report.document(found.policy, cost=outcome.get("cost", {}), store=store, policy_path=str(path))
        known |= {} if path.exists() else {"policy": None}  # a merged one has no file here
        if found.level != "exact":
            known["proven"] = False  # here, where it was not
    answer = {**report.answer(found.answer), "match": found.to_json()}
    return {**known, "left_out": outcome.get("left_out", []), "answer": answer}


def router_line(router: Mapping[str, Any]) -> str:
    """How a run's router came out, by its document (`tuner.router.router.train_and_save`)."""
    if router["path"] is None:
        return f"no router: {router['why_none']}"
    right = router["accuracy"]
    sure = "" if router["sure_accuracy"] is None else f", {router['sure_accuracy']:.1%} right of the others"
    return (
        f"router: {router['path']}; of {router['num_texts']} texts held out {right['estimate']:.1%} right "
        f"({right['low']:.1%} to {right['high']:.1%}), unsure of {router['unsure']:.1%}{sure}, "
        f"calibration error {router['calibration_error']['estimate']:.3f}"
    )
