"""What a store has for a plan: exact rounds by domain from traces, and step times that win over the model."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, text

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.hardware.device import family
from profiles.records.core import DTYPES
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import AcceptanceTrace, LookupTrace, TargetTrace, between_widths
from store import tables
from store.evidence_store import EvidenceStore
from tuner.deploy.stored_policies import find_targets
from tuner.plan.acceptance import Acceptance, RoundMean
from tuner.policy.query import MIXED


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTimes:
    """Median seconds by component (`target`, or a draft's name) and width, at one batch and context.

    Where the target has width 1 alone, a draft's times are those of whole rounds.
    """

    device: str
    context: int
    seconds: Mapping[str, Mapping[int, float]]

    def round_s(self, draft: str, length: int, has_steps: bool) -> float | None:
        """Seconds of a round that drafts `length` tokens; None: not measured. `has_steps`: a model drafts them."""
        target, drafting = self.seconds["target"], self.seconds.get(draft, {})
        if length == 0:
            return target[1]
        if set(target) == {1}:
            seconds: float | None = between_widths(drafting, length + 1)
            return seconds
        steps = [2, *[1] * (length - 1)] if has_steps else [length]  # the first step takes in the token before too
        if length + 1 not in target or not set(steps) <= drafting.keys():
            return None
        return target[length + 1] + sum(drafting[width] for width in steps)


def acceptance(store: EvidenceStore, target: str, draft: str, lengths: Sequence[int]) -> list[Acceptance]:
    """Rounds of `draft` by domain, and of all domains together, computed from the traces of the target.

    Raises NotMeasuredError: the store has no trace of the pair.
    """
    model = find_targets(store, target)[0]
    tokens: dict[tuple[str, int], int] = defaultdict(int)
    rounds: dict[tuple[str, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))  # by drafted tokens
    num_traces = 0
    for domain, trace, accepted in _traces(store, model.run_digest, draft):
        num_traces += 1
        for length in lengths:
            if getattr(accepted, "max_length", length) < length:
                continue
            counts = expected_rounds(trace, accepted, length, len(trace.token_ids))
            for name in {domain, MIXED}:
                tokens[name, length] += len(trace.token_ids) - 1
                for count, weight in counts.rounds.items():
                    rounds[name, length][count.proposed] += weight
    if not rounds:
        raise NotMeasuredError(f"acceptance of {draft}: the store has no trace of it for {target}; state one, like 0.7")
    source = f"exact, from {num_traces} traces of {model.name} in {model.weights_type} in the store"
    means: dict[str, dict[int, RoundMean]] = defaultdict(dict)
    for (name, length), counted in rounds.items():
        total = sum(counted.values())
        mean, drafted = tokens[name, length] / total, {proposed: count / total for proposed, count in counted.items()}
        means[name][length] = RoundMean(tokens=mean, low=mean, high=mean, drafted=drafted)
    return [
        Acceptance(draft=draft, domain=name, kind="store", source=source, rounds=means[name])
        for name in sorted(means, key=lambda name: (name != MIXED, name))
    ]


def _traces(store: EvidenceStore, target_key: str, draft: str) -> Iterator[tuple[str, Any, Any]]:
    """(domain, target trace, the draft's acceptance over it)."""
    with store.reading() as connection:
        query = select(tables.target_traces).filter_by(target_key=target_key)
        targets = {
            (row["sampling_digest"], row["prompt_digest"]): tables.from_row(TargetTrace, row)
            for row in connection.execute(query).mappings()
        }
        prompts = connection.execute(select(tables.prompts.c.digest, tables.prompts.c.domain))
        domains = {row.digest: row.domain for row in prompts}
        for kind in (AcceptanceTrace, LookupTrace):
            query = select(tables.TRACES[kind]).filter_by(target_key=target_key, draft_name=draft)
            for row in connection.execute(query).mappings():
                if trace := targets.get((row["sampling_digest"], row["prompt_digest"])):
                    yield domains.get(trace.prompt_digest) or MIXED, trace, tables.from_row(kind, row)


def step_times(
    store: EvidenceStore, target: str, format_name: str, device: str, engine: str
) -> dict[int, MeasuredTimes]:
    """By batch size, the newest greedy step times of the target on this device or its family; empty without any.

    `format_name`: of the target's weights; the store does not tell how weights that are no GGUF are quantised.
    """
    try:
        models = find_targets(store, target)
    except NotMeasuredError:
        return {}
    is_float = format_name in DTYPES
    models = [model for model in models if format_name == model.weights_type or not (is_float or model.stored_type)]
    if not models:
        return {}
    about = {"target": models[0].name, "dtype": models[0].dtype}
    query = text(
        "SELECT * FROM step_ms WHERE target = :target AND dtype = :dtype AND sampling IS NULL ORDER BY measured_at"
    )
    times: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    contexts: dict[int, tuple[str, int]] = {}
    with store.reading() as connection:
        for row in connection.execute(query, about).mappings():
            engines = (row["engine"], row["engine"].removeprefix("draftpick-"))
            if family(device) == family(row["device"]) and engine in engines:
                batch, measured_at = row["batch_size"], (row["device"], row["context_length"])
                if contexts.setdefault(batch, measured_at) != measured_at:
                    times[batch].clear()
                    contexts[batch] = measured_at
                times[batch][row["component"]][row["width"]] = row["median_ms"] / 1e3
    return {
        batch: MeasuredTimes(device=contexts[batch][0], context=contexts[batch][1], seconds=seconds)
        for batch, seconds in times.items()
        if 1 in seconds.get("target", {})
    }
