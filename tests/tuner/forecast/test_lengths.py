"""Seconds of all lengths at once are those of the rounds of each length."""

import itertools
import random

import numpy
import pytest

from profiles.acceptance.expected_rounds import DraftAcceptance, catch_up_width, combine, expected_rounds, stop_rule
from profiles.records.evidence import AcceptanceTrace, LookupTrace, StepShape, TargetTrace
from tuner.forecast.lengths import Lookup, Model, Prices, seconds_of_lengths

MAX_NEW_TOKENS, LONGEST = 20, 12
SIZES = (20, 13, 2, 1, 20)


def round_s(length: int, shape: StepShape) -> float:
    return 3.0 + shape.target_width**1.3 + 0.7 * shape.draft_steps + 0.11 * shape.first_draft_width + 0.05 * length


def prices() -> Prices:
    widths = [catch_up_width(max(1, behind)) for behind in range(MAX_NEW_TOKENS + 3)]
    return Prices(
        looked_up=numpy.array([round_s(1, StepShape(proposed + 1)) for proposed in range(LONGEST + 1)]),
        modelled=numpy.array(
            [[round_s(1, StepShape(num + 1, num + more, 2)) for more in (0, 1)] for num in range(LONGEST + 1)]
        ),
        catch_up=numpy.array([0.11 * (width - 2) for width in widths]),
        per_length=0.05 * numpy.arange(LONGEST),
    )


def padded(rows: list[list[float]], value: float = 0.0) -> numpy.ndarray:
    return numpy.array([row + [value] * (max(SIZES) - len(row)) for row in rows])


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize(
    ("parts", "stop"), [("lookup", None), ("model", None), ("model", 0.5), ("both", None), ("both", 0.5)]
)
def test_seconds_are_those_of_expected_rounds(parts: str, is_greedy: bool, stop: float | None) -> None:
    rng = random.Random(7)
    traces, lookups, models = [], [], []
    for size in SIZES:
        traces.append(
            TargetTrace(
                prompt_digest="p",
                token_ids=(1,) * size,
                target_probs=(1.0,) * size,
                logit_gaps=(1.0,) * size,
                ended=True,
            )
        )
        proposed = [rng.choice((0, 0, 3, LONGEST)) for _ in range(size)]
        accepted = [rng.randint(0, min(num, size - start)) for start, num in enumerate(proposed)]
        lookups.append(
            LookupTrace(
                prompt_digest="p",
                draft_digest="l",
                max_length=LONGEST,
                proposed=tuple(proposed),
                accepted=tuple(accepted),
            )
        )
        probs = [rng.choice((0.0, 1.0, 1.0) if is_greedy else (0.0, 0.4, 0.9, 1.0)) for _ in range(size)]
        sure = tuple(rng.choice((0.3, 0.9, 0.95)) for _ in range(size))
        models.append(AcceptanceTrace(prompt_digest="p", draft_digest="m", accept_probs=tuple(probs), confidences=sure))
    lookup = Lookup(
        proposed=padded([list(trace.proposed) for trace in lookups]).astype(int),
        accepted=padded([list(trace.accepted) for trace in lookups]).astype(int),
    )
    model = Model(accept_probs=padded([list(trace.accept_probs) for trace in models]))
    if stop is not None:
        model = Model(
            accept_probs=model.accept_probs,
            is_sure=padded([list(trace.confidences) for trace in models], 1.0) >= stop,
            past_rejection=numpy.array([round(stop_rule(trace, stop).past_rejection) for trace in models]),
        )
    seconds = seconds_of_lengths(
        numpy.array(SIZES), MAX_NEW_TOKENS, prices(),
        lookup=None if parts == "model" else lookup, model=None if parts == "lookup" else model,
    )  # fmt: skip
    for row, length in itertools.product(range(len(SIZES)), range(1, LONGEST + 1)):
        of_parts: list[AcceptanceTrace | LookupTrace] = [] if parts == "model" else [lookups[row]]
        acceptance: DraftAcceptance = combine(of_parts + ([] if parts == "lookup" else [models[row]]))
        rounds = expected_rounds(traces[row], acceptance, length, MAX_NEW_TOKENS, stop_below=stop)
        expected = sum(count * round_s(length, shape) for shape, count in rounds.shapes.items())
        assert seconds[row, length - 1] == pytest.approx(expected), (row, length)
