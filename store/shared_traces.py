"""When an engine may use the traces of the torch engine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Table, select

from profiles.records.core import Draft, Prompt
from profiles.records.evidence import Acceptance, TargetTrace
from profiles.records.keys import sampling_digest
from store import tables
from store.evidence_store import EvidenceStore, Scope

MIN_EQUAL = 6  # prompts


class SharedTraces:
    """Traces of the torch engine for another whose greedy outputs were equal to its own, token for token.

    Engines compute with other kernels, so traces are keyed by whose arithmetic they are (`capabilities.origin`, empty
    for torch). An engine that agreed with torch on six prompts, and differed on none, takes torch's traces for the
    rest; so too for each draft. This is decided anew from the stored traces of both whenever it is asked.
    """

    def __init__(self, evidence_store: EvidenceStore) -> None:
        self._store = evidence_store
        self._agreements: set[tuple[object, ...]] = set()

    def target_trace(self, scope: Scope, prompt: Prompt) -> TargetTrace | None:
        """Torch's trace of the prompt, if the engine of `scope` agrees with torch."""
        if not self._agrees(scope, tables.target_traces, ("token_ids",), {}):
            return None
        return self._store.find_target_trace(replace(scope, origin=""), prompt)

    def acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, max_length: int) -> Acceptance | None:
        """Torch's acceptance of a draft on the prompt, if the engine agrees about both target and draft."""
        if self.target_trace(scope, prompt) is None:
            return None
        key: dict[str, Any] = {"draft_digest": draft.digest}
        if draft.kind == "ngram":
            # accepted tokens alone would not do: an engine that proposes more may have as many, and takes longer
            key["max_length"] = max_length
            agrees = self._agrees(scope, tables.lookup_traces, ("proposed", "accepted"), key)
        else:
            agrees = self._agrees(scope, tables.acceptance_traces, ("accept_probs",), key)
        return self._store.find_acceptance(replace(scope, origin=""), prompt, draft, max_length) if agrees else None

    def _agrees(self, scope: Scope, table: Table, columns: Sequence[str], key: Mapping[str, Any]) -> bool:
        """Whether columns are equal on all prompts that both origins have, at least six.

        Greedy decoding in float32 only: in shorter types kernels diverge, on prompts not seen yet too.
        """
        if not scope.origin or scope.workload.temperature > 0.0 or scope.target.dtype != "float32":
            return False
        torch_sampling, engine_sampling = (sampling_digest(scope.workload, origin) for origin in ("", scope.origin))
        point = (table.name, scope.target.run_digest, engine_sampling, *key.values())
        if point in self._agreements:
            return True
        names = ("sampling_digest", "prompt_digest", *columns)
        query = select(*(table.c[name] for name in names)).filter_by(target_key=scope.target.run_digest, **key)
        query = query.where(table.c.sampling_digest.in_([torch_sampling, engine_sampling]))

        def read(connection: Connection) -> dict[str, dict[str, tuple[Any, ...]]]:
            traces: dict[str, dict[str, tuple[Any, ...]]] = {torch_sampling: {}, engine_sampling: {}}
            for sampling, prompt, *values in connection.execute(query):
                traces[sampling][prompt] = tuple(values)
            return traces

        traces = self._store.database.read(read)
        of_torch, of_engine = traces[torch_sampling], traces[engine_sampling]
        common = of_torch.keys() & of_engine.keys()
        if len(common) < MIN_EQUAL or any(of_torch[prompt] != of_engine[prompt] for prompt in common):
            return False
        self._agreements.add(point)
        return True
