"""What the last run of a target left: its policy, and the figures that a report shows.

How either is shown it must not know.
"""

from typing import TYPE_CHECKING

from profiles.records.errors import InputError, NotMeasuredError
from store.evidence_store import EvidenceStore
from tuner.deploy.lookup import read_policy
from tuner.policy.policy import Policy

if TYPE_CHECKING:
    from tuner.report.data import ReportData


def find_policy(evidence_store: EvidenceStore, target: str | None) -> Policy:
    """The latest policy of the target, of any when None. Raises NotMeasuredError: there is none."""
    text = evidence_store.latest_policy(target)
    if text is None:
        asked = f"of target {target!r} " if target else ""
        raise NotMeasuredError(f"no policy {asked}in store {evidence_store.name}: run `tune.py run` first")
    return read_policy(evidence_store, text)


def find_report_data(evidence_store: EvidenceStore, policy: Policy) -> "ReportData":
    """What the target's last finished run left to be shown.

    Raises: NotMeasuredError: no run finished, or it ended before a forecast. InputError: what it left is damaged.
    """
    from tuner.report import ReportData

    raw = evidence_store.latest_outcome(policy.target, policy.environment).get("dossier")
    if raw is None:
        raise NotMeasuredError(f"no finished run of {policy.target.name} is in the store: run `tune.py run` first")
    try:
        report_data = ReportData.from_json(raw)
    except InputError as error:
        raise InputError(f"the last run in store {evidence_store.name}: {error}") from error
    if not any(anchor.candidates for anchor in report_data.anchors):
        raise NotMeasuredError(
            f"the last run of {policy.target.name} ended before a forecast: run it again, for longer"
        )
    return report_data
