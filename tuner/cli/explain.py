"""`explain`: why this setup and not that one."""

from dataclasses import asdict

from profiles.records.errors import NotMeasuredError
from profiles.records.text import command
from tuner.cli import options
from tuner.cli.output import print_result


def explain(
    target: options.TunedTarget = None,
    batch_size: options.QueryBatchSize = 1,
    context: options.QueryContext = None,
    domain: options.QueryDomain = None,
    temperature: options.QueryTemperature = None,
    instead: options.Instead = None,
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> None:
    """Explain a choice: where a round's time goes, what a draft must yield to pay, and why the others lost."""
    from tuner.deploy import stored_policies
    from tuner.report import explain as explanations

    with stored_policies.open_for_reading(store) as evidence_store:
        policy = stored_policies.find_policy(evidence_store, target)
        report_data = stored_policies.find_report_data(evidence_store, policy)
    answer = policy.look_up(
        batch_size=batch_size,
        context_length=context,
        domain=domain,
        temperature=policy.headline.temperature if temperature is None else temperature,
    )
    choice = answer.choice
    points = {row.choice.filtered_point: row for row in report_data.points}
    figures = points.get(choice.filtered_point)
    if figures is None or figures.choice.setup != choice.setup:  # an earlier run's choice, which the policy keeps
        raise NotMeasuredError(f"the last run did not decide this: {answer.rule}; run `{command('run')}` for it")
    explanation = explanations.explain(figures, instead)
    lines, document = explanations.sentences(explanation), asdict(explanation)
    print_result(document, *lines, json_only=json_only, table=lambda: explanations.comparison(explanation.accounts))
