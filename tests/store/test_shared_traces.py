"""Whose traces are taken for whose: only those of engines that were seen to agree, in what they propose too."""

from dataclasses import replace

import pytest

from profiles.records.core import Draft, Prompt
from profiles.records.evidence import Acceptance, LookupTrace, TargetTrace
from store.evidence_store import EvidenceStore, Scope
from store.shared_traces import MIN_EQUAL, SharedTraces
from tests.support.fakes import GREEDY, MACHINE, NGRAM, TARGET, prompts

OURS = Scope(target=TARGET, environment=MACHINE, workload=GREEDY)
THEIRS = replace(OURS, origin="other 1 float32")
PROMPTS = prompts(MIN_EQUAL + 1)
LAST = PROMPTS[-1]


def trace_of(prompt: Prompt) -> TargetTrace:
    return TargetTrace(
        prompt_digest=prompt.digest, token_ids=(1, 2, 3), target_probs=(0.5,) * 3, logit_gaps=(1.0,) * 3, ended=False
    )


def lookup_of(prompt: Prompt, proposed: int, max_length: int = 4, draft: Draft = NGRAM) -> Acceptance:
    return LookupTrace(
        prompt_digest=prompt.digest,
        draft_digest=draft.digest,
        max_length=max_length,
        proposed=(0, proposed, proposed),
        accepted=(0, 1, 1),
    )


def fill(evidence_store: EvidenceStore, ours: Scope, theirs: Scope, proposed: int, max_length: int) -> None:
    """All prompts of ours; of theirs all but the last, with look-ups that propose `proposed` tokens and keep one."""
    for prompt in PROMPTS:
        evidence_store.save_target_trace(ours, prompt, trace_of(prompt))
        evidence_store.save_acceptance(ours, prompt, NGRAM, lookup_of(prompt, 2))
    for prompt in PROMPTS[:-1]:
        evidence_store.save_target_trace(theirs, prompt, trace_of(prompt))
        evidence_store.save_acceptance(theirs, prompt, NGRAM, lookup_of(prompt, proposed, max_length))


@pytest.mark.parametrize(
    ("proposed", "max_length", "is_lent"), [(2, 4, True), (3, 4, False), (2, 3, False)], ids=["equal", "more", "other"]
)
def test_what_is_proposed_counts(evidence_store: EvidenceStore, proposed: int, max_length: int, is_lent: bool) -> None:
    """Equal kept tokens do not make look-ups equal, nor do look-ups of other lengths tell of these."""
    fill(evidence_store, OURS, THEIRS, proposed, max_length)
    sharing = SharedTraces(evidence_store)
    assert sharing.target_trace(THEIRS, LAST) is not None
    assert (sharing.acceptance(THEIRS, LAST, NGRAM, 4) is not None) == is_lent


def test_short_floats_are_not_lent(evidence_store: EvidenceStore) -> None:
    """Kernels round apart in bfloat16: six equal texts do not vouch for the next."""
    ours, theirs = (replace(scope, target=replace(TARGET, dtype="bfloat16")) for scope in (OURS, THEIRS))
    fill(evidence_store, ours, theirs, 2, 4)
    assert SharedTraces(evidence_store).target_trace(theirs, LAST) is None
