"""Outputs that are not what was asked for: they part from the target's, or end where they must not."""

from dataclasses import replace

import pytest

from profiles.engines.runs import check_end, check_queues
from profiles.records.core import PLAIN, Draft, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import TargetTrace
from tests.support.fakes import TARGET, prompts

DRAFTED = Setup(draft=Draft(kind="ngram", max_match=2, min_match=2), length=3)
TRACE = TargetTrace(
    prompt_digest="p", token_ids=(1, 2, 3, 4), target_probs=(0.5,) * 4, logit_gaps=(1.0, 1.0, 0.0, 1.0), ended=False
)
WORKLOAD = Workload(context_length=64, max_new_tokens=4, end_token_ids=(9,))


def check(output: tuple[int, ...]) -> None:
    outputs = [(PLAIN, [TRACE.token_ids]), (DRAFTED, [output])]
    check_queues(TARGET, WORKLOAD, prompts(1), outputs, lambda *_: TRACE)


@pytest.mark.parametrize("output", [(1, 2, 3, 4), (1, 2, 5, 6, 7)])
def test_what_may_be(output: tuple[int, ...]) -> None:
    """An output that is the trace, or parts from it at a near-tie."""
    check(output)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ((1, 5, 3, 4), "diverged from plain decoding at token 1"),
        ((1, 2), "2 tokens of prompt p where the target has 4"),
        ((1, 2, 3, 4, 5), "5 tokens of prompt p where the target has 4"),
    ],
)
def test_partings(output: tuple[int, ...], said: str) -> None:
    """Another token where the target was sure, and an output that is shorter or longer than the trace."""
    with pytest.raises(EngineError, match=said):
        check(output)


def test_ends() -> None:
    """The first end token is the last token; without one an output has all that were asked for."""
    for good in ((1, 2, 3, 4), (1, 9), (9,)):
        check_end("it", WORKLOAD, good)
    for wrong, said in (
        ((1, 2), "it ended after 2 of 4 tokens, at token 2; the end tokens are"),
        ((1, 9, 3), "it went on for 3 tokens"),
        ((1,) * 5, "the limit is 4"),
    ):
        with pytest.raises(EngineError, match=said):
            check_end("it", WORKLOAD, wrong)
    with pytest.raises(EngineError, match="no token is an end"):
        check_end("it", replace(WORKLOAD, end_token_ids=()), (1, 9))
