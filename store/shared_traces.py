"""Lends traces between engines: where an engine's greedy outputs were equal, token for token, to those of our own.

Engines compute with other kernels, so traces are keyed by whose arithmetic they are (`capabilities.origin`). An engine
that agreed with ours on six prompts, and differed on none, takes ours for the rest; so too for each draft. Checked anew
whenever it is asked, from the evidence of both that is in the book.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Table, select

from profiles.records.core import Draft, Prompt
from profiles.records.evidence import Acceptance, TargetTrace
from profiles.records.keys import sampling_digest
from store import tables
from store.evidence_store import EvidenceStore, Scope

MIN_EQUAL = 6  # prompts


class Sharing:
    """Our own engine's traces, for another engine that was seen to agree with it."""

    def __init__(self, evidence_store: EvidenceStore) -> None:
        self._book = evidence_store
        self._agreed: set[tuple[object, ...]] = set()

    def target_trace(self, scope: Scope, prompt: Prompt) -> TargetTrace | None:
        """Our trace of the prompt, where the engine of `scope` agrees; None otherwise."""
        if not self._agrees(scope, tables.target_traces, ("token_ids",), {}):
            return None
        return self._book.find_target_trace(replace(scope, origin=""), prompt)

    def acceptance(self, scope: Scope, prompt: Prompt, draft: Draft, max_length: int) -> Acceptance | None:
        """Our acceptance of a draft on the prompt, where the engine agrees about target and draft; None otherwise."""
        if self.target_trace(scope, prompt) is None:
            return None
        about: dict[str, Any] = {"draft_digest": draft.digest}
        if draft.kind == "ngram":
            # kept tokens alone would not tell: who proposes more than another keeps the same, and takes longer
            about |= {"max_length": max_length}
            agrees = self._agrees(scope, tables.lookup_traces, ("proposed", "kept"), about)
        else:
            agrees = self._agrees(scope, tables.acceptance_traces, ("keep_probs",), about)
        if not agrees:
            return None
        return self._book.find_acceptance(replace(scope, origin=""), prompt, draft, max_length)

    def _agrees(self, scope: Scope, table: Table, columns: Sequence[str], about: Mapping[str, Any]) -> bool:
        """Whether columns are equal on all prompts that both origins have, at least six.

        Greedy decoding in float32 only: in shorter types kernels round apart, on prompts not seen yet too.
        """
        if not scope.origin or scope.workload.temperature > 0.0 or scope.target.dtype != "float32":
            return False
        ours, theirs = (sampling_digest(scope.workload, origin) for origin in ("", scope.origin))
        point = (table.name, scope.target.run_digest, theirs, *about.values())
        if point not in self._agreed:
            found: dict[str, dict[str, Any]] = {ours: {}, theirs: {}}
            query = select(table).filter_by(target_key=scope.target.run_digest, **about)
            with self._book.reading() as connection:
                for row in connection.execute(query.where(table.c.sampling_digest.in_(found))).mappings():
                    found[row["sampling_digest"]][row["prompt_digest"]] = [row[one] for one in columns]
            both = found[ours].keys() & found[theirs].keys()
            if len(both) < MIN_EQUAL or any(found[ours][prompt] != found[theirs][prompt] for prompt in both):
                return False
            self._agreed.add(point)
        return True
