"""`lookup`: which setup to use on this machine. Loads no torch, and of a policy file no database either."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from profiles.hardware import machine
from profiles.hardware.device import ENGINE, Machine
from profiles.records.errors import DraftpickError, InputError, MatchError
from tuner.cli import options
from tuner.cli.output import print_json, print_notes, print_text
from tuner.deploy.lookup import SERVING_ARGUMENTS, LookupResult, Query, lookup_policy
from tuner.deploy.lookup import lookup as lookup_stored
from tuner.deploy.match import MEANINGS
from tuner.policy import policy as policies
from tuner.policy.policy import Policy


def lookup(
    target: options.TunedTarget = None,
    batch_size: options.QueryBatchSize = 1,
    context: options.QueryContext = None,
    domain: options.QueryDomain = None,
    temperature: options.QueryTemperature = None,
    engine: options.MeasuredEngine = None,
    output_format: options.Format = None,
    engine_version: options.EngineVersion = None,
    adaptive: options.Adaptive = False,
    require: options.Require = None,
    environment: options.MachineFile = None,
    device: options.QueryDevice = None,
    policy: options.PolicyFile = None,
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> None:
    """Look up the setup to use on this machine, and how well that is known; changes nothing."""
    if engine_version is not None and output_format is None:
        raise InputError(f"engine version {engine_version!r}: name the engine with --format")
    if adaptive and output_format is None:
        raise InputError("--adaptive: name the engine with --format")
    if device is not None and environment is not None:
        raise InputError(f"device {device!r}: --environment says which device it is")
    if policy is not None and store is not None:
        raise InputError(f"policy {policy}: --store names another source; give one of them")
    query = Query(target=target, batch_size=batch_size, context_length=context, domain=domain, temperature=temperature)
    engine_name = measured_engine(engine, output_format)
    store_name, outcome = None, dict[str, Any]()
    if policy is not None:
        file_policy = policies.read(policy)
        here = _machine(engine_name or file_policy.environment.engine, environment, device)
        result = lookup_policy(file_policy, query, here)
        planned = _planned(result, query, here, lambda: file_policy)
    else:
        from store import location
        from store.evidence_store import EvidenceStore
        from tuner.deploy.stored_policies import find_policy, only_engine

        store_location = location.existing_store(store)
        store_name = location.store_name(store_location)
        with EvidenceStore.open_read_only(store_location) as evidence_store:
            here = _machine(engine_name or only_engine(evidence_store, target), environment, device)
            result = lookup_stored(evidence_store, query, here)
            planned = _planned(result, query, here, lambda: find_policy(evidence_store, result.target.run_digest))
            if result.policy is not None:
                policy = evidence_store.database.folder / result.policy.file_name
                if json_only:  # with what the store has of the run that made the policy
                    outcome = evidence_store.latest_outcome(result.target, result.policy.environment)
    if json_only:
        print_json({**_document(result, store_name, policy, outcome), "plan": planned})
    elif planned is not None and planned["status"] == "planned":
        print_notes(f"planned, never proven: {planned['choices'][0]['reason']}")
    if not result.reaches(require or "none"):
        raise MatchError(f"{result.caveat}; required was {require}")
    if not json_only:
        text, notes = _text(result, output_format, engine_version, adaptive=adaptive)
        notes += [f"export DRAFTPICK_POLICY={policy}"] if text and adaptive else []
        print_notes(*notes)
        print_text(text)


def measured_engine(engine: str | None, output_format: str | None) -> str | None:
    """The engine that is named by --engine, or by a --format that is a serving engine's; None: neither names one."""
    if engine is not None:
        return ENGINE if engine == "torch" else engine
    if output_format == "transformers":
        return ENGINE
    return output_format if output_format in SERVING_ARGUMENTS else None


def _machine(engine: str, environment: Path | None, device: str | None) -> Machine:
    if environment is None:
        return machine.this_machine(engine, device)
    return machine.read_machine(environment, engine)


def _planned(
    result: LookupResult, query: Query, here: Machine, find_policy: Callable[[], Policy]
) -> dict[str, Any] | None:
    """The plan where nothing measured covers the query, or `not planned` with a reason; None where something does."""
    if result.level != "none":
        return None
    from tuner.deploy.offer import offer_plan

    try:
        return offer_plan(find_policy(), query, here)
    except DraftpickError as error:
        return {"status": "not planned", "reason": str(error)}


def _text(
    result: LookupResult, output_format: str | None, engine_version: str | None, *, adaptive: bool
) -> tuple[str, list[str]]:
    """What goes to standard output, for an engine or for people, and the notes beside it.

    Raises InputError: not a version of the engine.
    """
    notes = [] if result.caveat is None else [f"warning: {result.caveat}"]
    choice = result.answer.choice
    if output_format is None:
        lines = [f"{choice.setup.name}: {result.answer.rule}", choice.reason]
        lines.append(f"match: {result.level}, {MEANINGS[result.level]}")
        return "\n".join([*lines, ""]), notes
    from tuner import export

    made = export.emit(result.deployment(), output_format, engine_version, adaptive=result.policy if adaptive else None)
    if made.text and made.setup is not None:
        notes.append(f"{made.setup.name}: {made.label}")
    return made.text, [*notes, *([] if made.note is None else [made.note])]


def _document(
    result: LookupResult, store: str | None, policy_path: Path | None, outcome: Mapping[str, Any]
) -> dict[str, Any]:
    """The policy that answered, as `run` printed it (without one: the target), the answer, and its match."""
    from tuner.report import tables

    document: dict[str, Any] = {"target": asdict(result.target), "store": store}
    if result.policy is not None:
        has_file = policy_path is not None and policy_path.exists()  # a merged policy has none
        path = str(policy_path) if has_file else None
        document = tables.document(result.policy, cost=outcome.get("cost", {}), store=store, policy_path=path)
        document["proven"] = document["proven"] and result.level == "exact"  # elsewhere it was not proven
    answer = {**tables.answer(result.answer), "match": result.to_json()}
    return {**document, "left_out": outcome.get("left_out", []), "answer": answer}
