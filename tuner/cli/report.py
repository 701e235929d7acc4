"""`report`: the latest run as a page."""

from tuner.cli import options
from tuner.cli.output import print_notes


def report(out_path: options.ReportFile, target: options.TunedTarget = None, store: options.Store = None) -> None:
    """Write the latest run as a page: choices and reasons, every candidate, where a round's time goes, acceptance."""
    from tuner.deploy import stored_policies
    from tuner.report import page

    with stored_policies.open_for_reading(store) as evidence_store:
        report_data = stored_policies.find_report_data(
            evidence_store, stored_policies.find_policy(evidence_store, target)
        )
    page.write(report_data, out_path)
    print_notes(f"wrote {out_path}")
