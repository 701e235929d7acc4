"""The deployments that exports are checked with: what was measured, for the engine tests and the acceptance table."""

from pathlib import Path

from profiles.records.core import PLAIN, Draft, Model, Setup
from tests.support.policies import NGRAM, TARGET, choice, forecast, measured
from tuner.export import Deployment
from tuner.policy.policy import Choice


def deployment(
    answer: Choice, /, *rows: Choice, target: Model = TARGET, measured_on: str = "draftpick-torch"
) -> Deployment:
    return Deployment(target=target, choice=answer, rows=rows or (answer,), measured_on=measured_on)


def model_at(path: str | Path, revision: str | None = None) -> Model:
    name = str(path)
    return Model(name=name, revision=revision, dtype="float32", digest=name, num_params=1)


def draft_at(path: str | Path, revision: str | None = None) -> Draft:
    return Draft(kind="model", model=model_at(path, revision))


def cases(target: Model, draft: Draft) -> dict[str, Deployment]:
    """Look-up, draft model, sampled, a composite with what is emitted instead, a schedule, plain; by name."""
    composite = Draft(kind="composite", model=draft.model, max_match=4, min_match=2)
    with_model, looked_up = Setup(draft=draft, length=4), Setup(draft=NGRAM, length=3)
    instead = (forecast(with_model, 1.4), forecast(looked_up, 1.2))
    single = choice(with_model)
    batches = (
        single,
        choice(Setup(draft=draft, length=2), batch_size=4, measured=measured(Setup(draft=draft, length=2), 1.2)),
        choice(PLAIN, batch_size=16),
    )
    answers = {
        "look-up": choice(looked_up),
        "draft model": single,
        "draft model, sampled": choice(with_model, temperature=0.7, top_p=0.9),
        "composite": choice(Setup(draft=composite, length=5), alternatives=instead),
        "plain": choice(PLAIN),
    }
    single_rows = {name: deployment(answer, target=target) for name, answer in answers.items()}
    return single_rows | {"schedule": deployment(single, *batches, target=target)}
