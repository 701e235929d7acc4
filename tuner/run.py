"""One tuning run over a store: evidence is read or measured and saved, the decision is made and written."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy.pool import NullPool

from profiles.engines.base import Engine
from profiles.records.core import PLAIN
from profiles.records.draft_spec import RefusedDraft
from profiles.records.errors import DraftpickError, RunInterruptedError, StoreError
from profiles.stats import holm
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore, Scope
from tuner.pipeline.pipeline import Load, Outcome, Tuner, Watch
from tuner.pipeline.trial import Options
from tuner.policy import policy as policies
from tuner.policy import prior
from tuner.report import build
from tuner.search import studies as search
from tuner.search.limits import Limits
from tuner.search.proof import LEVEL


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSession:
    """An open store, Optuna's studies beside it, and the folder on this host for policy files.

    `since` is the UTC time before which timings are too old to answer; empty accepts all.
    """

    evidence_store: EvidenceStore
    studies: search.Storage | None
    folder: Path
    since: str = ""

    @classmethod
    def of(cls, evidence_store: EvidenceStore, since: str = "") -> "TuningSession":
        """Creates studies and folder where they are missing. Raises StoreError when the folder cannot be made."""
        folder = evidence_store.database.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {evidence_store.name}: policy folder {folder}: {error.strerror}") from error
        location = evidence_store.database.studies_location()
        # without a pool no connection is held while measuring, nor left open at the end
        studies = search.open_storage(location, {"poolclass": NullPool}, lock=evidence_store.writing)
        return cls(evidence_store=evidence_store, studies=studies, folder=folder, since=since)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What a run decided, where its policy is, which setups were left out and why, and its cost."""

    policy: policies.Policy
    policy_path: Path
    outcome: Outcome
    left_out: tuple[RefusedDraft, ...]
    cost: dict[str, Any]


def tune(engine: Engine, loads: Sequence[Load], session: TuningSession, options: Options, watch: Watch) -> FinishedRun:
    """Measures what the store lacks, decides, and writes the policy.

    Timings older than `session.since` are measured again.

    Raises:
        RunInterruptedError: Ctrl-C; finished measurements are in the store.
        EngineError: The target itself failed.
    """
    evidence_store = session.evidence_store
    cached_engine = CachedEngine(engine, evidence_store, session.since)
    scope = Scope(target=engine.target, environment=engine.environment, workload=loads[0][0])
    run_id = evidence_store.save_run(scope, [prompt for _, prompts in loads for prompt in prompts])
    options = replace(
        options,
        storage=session.studies,
        run_name=f"run {run_id} of {_utc_now()}",
        standing_p_values=_standing_p_values(evidence_store, engine, loads),
    )
    with _interruptible(cached_engine, evidence_store.name):
        outcome = Tuner(cached_engine, options, watch).tune(loads)
    outcome = _with_stored_units(outcome, cached_engine)
    policy, path = _write_policy(session, engine, outcome, options)
    outcome = replace(outcome, choices=_demoted_alike(outcome.choices, policy.choices))
    cost = {
        "measured_seconds": round(cached_engine.measured_seconds, 2),
        "measured_units": cached_engine.measured_units,
        "reused_units": cached_engine.reused_units,
        "grid_seconds_estimate": outcome.grid_seconds_estimate,
    }
    cost |= _engine_starts(engine, outcome)
    left_out = (*options.refused, *_setups_left_out(outcome))
    report_data = build.report_data(outcome, policy).to_json()
    evidence_store.finish_run(
        run_id, {"cost": cost, "left_out": [asdict(draft) for draft in left_out], "dossier": report_data}
    )
    return FinishedRun(policy=policy, policy_path=path, outcome=outcome, left_out=left_out, cost=cost)


def _standing_p_values(evidence_store: EvidenceStore, engine: Engine, loads: Sequence[Load]) -> tuple[float, ...]:
    """Of the latest policy's proofs at workloads that this run does not decide; none where it cannot be read."""
    latest = evidence_store.latest_policy(engine.target.run_digest, engine.environment)
    workloads = {(load.batch_size, load.context_length, load.temperature) for load, _ in loads}
    with contextlib.suppress(DraftpickError):
        return tuple(
            choice.measured.p_value
            for choice in (() if latest is None else policies.from_json(latest).choices)
            if choice.measured is not None
            and (choice.batch_size, choice.context_length, choice.temperature) not in workloads
        )
    return ()


def _engine_starts(engine: Engine, outcome: Outcome) -> dict[str, Any]:
    """Starts of servers, their seconds and memory, and the starts of a full grid (one per setup); none for torch."""
    num_starts: int | None = getattr(engine, "num_starts", None)
    if num_starts is None:
        return {}
    starting_s: float = getattr(engine, "starting_s", 0.0)
    first_points = {point.workload: point for point in reversed(outcome.points)}  # of each workload: all domains
    cells = sum(len(point.forecasts) for point in first_points.values())
    costs = {"engine_starts": num_starts, "starting_seconds": round(starting_s, 2), "grid_starts": cells}
    memory: dict[str, Any] = getattr(engine, "memory", {})
    return costs | ({"kv_cache": memory} if memory else {})


def _with_stored_units(outcome: Outcome, cached_engine: CachedEngine) -> Outcome:
    """The choices with the stored ids of their evidence: a unit that was measured again has an id of its own."""
    choices = [
        replace(choice, evidence=tuple(cached_engine.answered_by[unit] for unit in choice.evidence))
        for choice in outcome.choices
    ]
    return replace(outcome, choices=tuple(choices))


def _setups_left_out(outcome: Outcome) -> tuple[RefusedDraft, ...]:
    """Setups that failed while evidence was gathered, and those that are infeasible at an operating point."""
    failed = [
        (failure, failure.detail) for point in outcome.points if point.evidence for failure in point.evidence.infeasible
    ]
    failed += [
        (failure, f"{point.domain}: {failure.detail}") for point in outcome.points for failure in point.infeasible
    ]
    rows = (RefusedDraft(name=failure.setup.name, reason=failure.reason, detail=detail) for failure, detail in failed)
    return tuple(dict.fromkeys(rows))


def _write_policy(
    session: TuningSession, engine: Engine, outcome: Outcome, options: Options
) -> tuple[policies.Policy, Path]:
    """Replaces row and file in one transaction, so that runs that end at once join their choices."""
    written: list[policies.Policy] = []

    def next_policy(latest: str | None) -> str:
        earlier = None if latest is None else policies.from_json(latest)
        choices = _join_choices(() if earlier is None else earlier.choices, outcome, options)
        standing = [choice.point for choice in choices if choice not in outcome.choices]
        policy = policies.Policy(
            created=_utc_now(),
            target=engine.target,
            environment=engine.environment,
            choices=choices,
            prior=prior.join_priors(outcome.prior, None if earlier is None else earlier.prior, standing),
        )
        policies.write(session.folder / policy.file_name, policy)
        written.append(policy)
        return policies.to_json(policy)

    session.evidence_store.replace_policy(engine.target, engine.environment, next_policy)
    return written[-1], session.folder / written[-1].file_name


def _join_choices(latest: Iterable[policies.Choice], outcome: Outcome, options: Options) -> tuple[policies.Choice, ...]:
    """The run's choices, then those of the latest policy for operating points that the run did not decide.

    Where the budget ended before a decision, an earlier proven choice stays, unless the run has limits, which that
    choice was not checked against. An earlier choice is dropped when the run used its temperature with another top-p
    or top-k: a policy holds one of each. Holm's step-down then looks at the proofs of all of them together.
    """
    earlier = {choice.filtered_point: choice for choice in latest}
    chosen = []
    for point, choice in zip(outcome.points, outcome.choices, strict=True):
        previous = earlier.pop(choice.filtered_point, None)
        may_stay = point.out_of_time and options.limits == Limits()
        chosen.append(previous if may_stay and previous is not None and previous.proven else choice)
    filters = {choice.temperature: (choice.top_p, choice.top_k) for choice in chosen}
    standing = [
        choice for choice in earlier.values() if filters.get(choice.temperature) in (None, (choice.top_p, choice.top_k))
    ]
    return _proven_together((*chosen, *standing))


def _proven_together(choices: Sequence[policies.Choice]) -> tuple[policies.Choice, ...]:
    """Holm's step-down over all proofs of the policy, of earlier runs too; what does not pass is plain decoding."""
    tested = [choice.measured.p_value for choice in choices if choice.measured is not None]
    rejected = iter(holm(tested, LEVEL))
    passes = [choice.measured is not None and next(rejected) for choice in choices]
    return tuple(
        choice if passes_ or not choice.proven else _demoted(choice, len(tested))
        for choice, passes_ in zip(choices, passes, strict=True)
    )


def _demoted(choice: policies.Choice, num_tested: int) -> policies.Choice:
    assert choice.measured is not None
    reason = (
        f"Plain decoding: {choice.setup.name} was proven alone, but its p-value {choice.measured.p_value:.2g} does not "
        f"pass Holm's step-down over the {num_tested} operating points that were tested for this policy, in all runs."
    )
    return replace(choice, setup=PLAIN, proven=False, reason=reason)


def _demoted_alike(
    choices: Sequence[policies.Choice], of_policy: Sequence[policies.Choice]
) -> tuple[policies.Choice, ...]:
    """The run's choices, with those not proven that the policy as a whole does not prove."""
    return tuple(
        other if choice.proven and not other.proven and other.measured == choice.measured else choice
        for choice, other in zip(choices, of_policy, strict=False)
    )


@contextlib.contextmanager
def _interruptible(cached_engine: CachedEngine, store: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterruptedError(
            f"interrupted: {cached_engine.measured_units} units of this run are saved in {store}; "
            "run the same command again to continue"
        ) from None


def utc_ago(age_s: float | None) -> str:
    """The UTC time that many seconds ago as the store writes it; empty for None."""
    return "" if age_s is None else (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
