"""The plan of a machine that was tuned, beside what its run has: `python -m tests.benchmarks.plan --store FILE`.

Both plans take the exact acceptance of the store; the second takes its step times too. Composites are not planned.
"""

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from profiles.records.errors import DraftpickError
from store.evidence_store import EvidenceStore
from tests.benchmarks.common import finish
from tuner.deploy.stored_policies import find_policy, find_report_data
from tuner.plan import stored
from tuner.plan.plan import PlanQuery, make_plan
from tuner.plan.shape import read_data
from tuner.report.data import Candidate, ReportData

STAND_IN = "EPYC-2cores"  # of the hardware table, for a processor that is not in it
BASES = ("proof", "race", "forecast")


def compare(path: Path) -> None:
    """Prints the ratio plan / run of every setup, without and with the store's step times."""
    with EvidenceStore.open_read_only(path) as store, tempfile.TemporaryDirectory() as folder:
        policy = find_policy(store, None)
        report = find_report_data(store, policy)
        hardware = Path(folder) / "machine.json"
        device = {policy.environment.device: read_data("hardware")[STAND_IN]}
        hardware.write_text(json.dumps({"hardware": device}), encoding="utf-8")
        rows = [row for point in plan_points(store, report, hardware) for row in point]
    document: dict[str, Any] = {"rows": rows}
    for plan in ("model", "store"):
        for basis in BASES:
            chosen = [row for row in rows if row["basis"] == basis and row[plan] is not None]
            document[f"{plan}_{basis}"] = summary([row[plan] / row["run"] for row in chosen])
    print("domain   draft, k                          run        basis     model  ratio  measured steps  ratio")
    for row in rows:
        ratios = [f"{row[plan]:6.2f}  {row[plan] / row['run']:5.2f}" for plan in ("model", "store") if row[plan]]
        print(
            f"{row['domain']:8} {row['draft'] + ' k=' + str(row['k']):32} {row['run']:5.2f} {row['basis']:>12}", *ratios
        )
    for plan in ("model", "store"):
        print(plan, {basis: document[f"{plan}_{basis}"] for basis in BASES})
    finish(document)


def summary(ratios: Sequence[float]) -> dict[str, float] | None:
    errors = [abs(ratio - 1.0) for ratio in ratios]
    if not errors:
        return None
    values = {
        "median_ratio": statistics.median(ratios),
        "median_abs_error": statistics.median(errors),
        "p90_abs_error": float(numpy.quantile(errors, 0.9)),
    }
    return {"num_setups": len(errors), **{name: round(value, 4) for name, value in values.items()}}


def plan_points(store: EvidenceStore, report: ReportData, hardware: Path) -> list[list[dict[str, Any]]]:
    """For each operating point, its setups with the run's speed-up and both plans'."""
    names = dict.fromkeys(draft.name for draft in report.drafts if draft.kind != "composite")
    lengths = sorted(
        {candidate.length for point in report.points for candidate in point.candidates if candidate.length}
    )
    accepted = []
    for name in names:
        try:
            accepted += stored.acceptance(store, report.target.run_digest, name, lengths)
        except DraftpickError as error:
            print(f"not planned: {name}: {error}")
    points = []
    for point in report.points:
        choice = point.choice
        query = PlanQuery(
            target=report.target.name,
            drafts=list(names),
            hardware=str(hardware),
            engine=report.environment.engine,
            dtype=report.target.dtype,
            batch_sizes=(choice.batch_size,),
            context=choice.context_length,
            lengths=lengths,
            acceptance=[row for row in accepted if row.domain == choice.domain],
        )
        model, measured = (by_setup(make_plan(replace(query, evidence_store=given))) for given in (None, store))
        points.append(
            [
                {
                    "domain": choice.domain,
                    "draft": candidate.draft_name,
                    "k": candidate.length,
                    **run_figure(candidate),
                    "model": model[candidate.draft_name, candidate.length]["speedup"],
                    "store": measured[candidate.draft_name, candidate.length]["speedup"]
                    if measured[candidate.draft_name, candidate.length]["basis"] == "measured"
                    else None,
                }
                for candidate in point.candidates
                if (candidate.draft_name, candidate.length) in model and candidate.forecast_speedup is not None
            ]
        )
    return points


def by_setup(plan: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {(row["draft"], row["k"]): row for row in plan["setups"]}


def run_figure(candidate: Candidate) -> dict[str, Any]:
    """The run's best figure: of the proof, else of the race, else its calibrated forecast."""
    figures = (candidate.measured_speedup, candidate.race_speedup, candidate.forecast_speedup)
    basis, figure = next((basis, figure) for basis, figure in zip(BASES, figures, strict=True) if figure is not None)
    return {"basis": basis, "run": figure if isinstance(figure, float) else figure.estimate}
