"""Records of evidence."""

from profiles.records.core import Draft
from profiles.records.evidence import covers
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, FakeEngine


def test_covers_needs_catch_up_widths_for_composite_drafts() -> None:
    """A draft model timed without its composite lacks the widths that the composite needs."""
    fake = FakeEngine()
    composite = Draft(kind="composite", model=DRAFT_A.model, max_match=4, min_match=2)
    alone = fake.time_steps(GREEDY, 64, 4)
    assert covers(alone, fake.target, (DRAFT_A, NGRAM), 4)
    assert not covers(alone, fake.target, (DRAFT_A, NGRAM, composite), 4)
    fake.drafts = (*fake.drafts, composite)
    assert covers(fake.time_steps(GREEDY, 64, 4), fake.target, fake.drafts, 4)
