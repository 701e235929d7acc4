"""Lossless in a batch: a row's greedy output is plain decoding's, whatever neighbours, refills and drafts do."""

import random
from dataclasses import replace
from typing import Any

import pytest

from profiles.acceptance.batch_replay import draw_rounds, replay
from profiles.acceptance.expected_rounds import CompositeAcceptance, catch_up_width, expected_rounds
from profiles.engines.torch.engine import TorchEngine
from profiles.records.core import PLAIN, Prompt, Setup, Workload, digest_of
from profiles.records.evidence import AcceptanceTrace, LookupTrace, TargetTrace
from tests.support import tiny
from tests.support.toys import TableModel, TableRows, near, run, run_queue
from tests.support.traced import Plain, to_limit_and_end

KINDS = ("self", "other model", "early exit", "ngram", "composite", "composite of itself")
LENGTHS = {  # by batch size and whether outputs end early; together every k = 1..16
    (1, False): (1, 9),
    (1, True): (10, 16),
    (3, False): (2, 3, 5, 8, 16),
    (3, True): (6, 11, 14),
    (6, False): (4, 12),
    (6, True): (7, 13, 15),
}
MAX_LENGTH = 16
WORKLOAD = Workload(context_length=64, max_new_tokens=18)  # a first token, then a round of 16 and one
# more prompts than rows, of lengths from 1 to 40, some of which repeat themselves
PROMPTS = tuple(
    Prompt(domain="a", token_ids=tuple(random.Random(size).choices(range(20, 20 + 3 * size), k=size)))
    for size in (3, 24, 1, 40, 8, 17, 2)
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """A tiny random target with a draft of every kind; of the composites one model is poor and one the target."""
    return tiny.every_draft(tmp_path_factory.mktemp("batches"), own_composite=True)


@pytest.fixture(scope="module")
def plain(engine: TorchEngine) -> dict[bool, Plain]:
    """Traced once, for every batch size and draft."""
    return to_limit_and_end(engine, WORKLOAD, PROMPTS, MAX_LENGTH)


@pytest.mark.parametrize("ends", [False, True], ids=["to the limit", "to an end token"])
@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_every_row_is_lossless(
    engine: TorchEngine,
    plain: dict[bool, Plain],
    monkeypatch: pytest.MonkeyPatch,
    kind: int,
    batch_size: int,
    ends: bool,
) -> None:
    """For k = 1..16: outputs are the traces', rounds the expected, shapes and refills the replayed queue's, exactly."""
    monkeypatch.setattr(TorchEngine, "_warm_up", lambda *_: None)  # seconds are not looked at
    workload, traces = replace(plain[ends].workload, batch_size=batch_size), plain[ends].traces
    setups = (PLAIN, *(Setup(draft=engine.drafts[kind], length=length) for length in LENGTHS[batch_size, ends]))
    if batch_size == 1:
        queues = [(prompt,) for prompt in PROMPTS]
        runs = [engine.run_together(workload, queue, setups, "test") for queue in queues]
        samples = [run[number] for number in range(len(setups)) for run in runs]
    else:
        samples = list(engine.run_together(workload, PROMPTS, setups, "test"))
    for number, setup in enumerate(setups):
        queue_samples = samples[number * len(PROMPTS) : (number + 1) * len(PROMPTS)]
        acceptances = plain[ends].accepted[setup.draft]
        paths = [
            draw_rounds(trace, acceptance, setup.length, workload.max_new_tokens, rng=random.Random(0))
            for trace, acceptance in zip(traces, acceptances, strict=True)
        ]
        replayed = replay(paths, batch_size) if batch_size > 1 else [replay([path], 1)[0] for path in paths]
        for sample, trace, acceptance, turn in zip(queue_samples, traces, acceptances, replayed, strict=True):
            walked = expected_rounds(trace, acceptance, setup.length, workload.max_new_tokens)
            assert sample.output_digest == digest_of(list(trace.token_ids))
            assert dict(sample.rounds) == dict(walked.rounds)
            assert (dict(sample.shapes), sample.refills) == (dict(turn.shapes), turn.refills)
            if batch_size == 1:
                assert dict(sample.shapes) == dict(walked.shapes)


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
def test_a_sampled_row_does_not_know_its_neighbours(draft: str | None) -> None:
    """Alone or among others, in whatever row, a prompt draws the same tokens and goes through the same rounds."""
    target = TableModel(seed=3, vocabulary=12)
    drafting = near(target, 4, 0.5) if draft == "model" else draft
    workload = Workload(context_length=64, max_new_tokens=20, temperature=0.9, top_p=0.95, end_token_ids=(7,))
    prompts = [Prompt(domain="toy", token_ids=tuple(range(1, 2 + number))) for number in range(9)]
    together = run_queue(target, drafting, 4, replace(workload, batch_size=4), prompts)
    for prompt, generation in zip(prompts, together, strict=True):
        alone = run(target, drafting, 4, workload, prompt)
        assert (generation.token_ids, generation.rounds) == (alone.token_ids, alone.rounds)


def _composite(size: int) -> tuple[TargetTrace, CompositeAcceptance]:
    """Made-up evidence with keep probabilities between 0 and 1."""
    rng = random.Random(5)
    trace = TargetTrace(
        prompt_digest="p",
        token_ids=tuple(range(size)),
        target_probs=(0.5,) * size,
        logit_gaps=(1.0,) * size,
        ended=False,
    )
    proposed = tuple(rng.choice((0, 0, 3, 4)) for _ in range(size))
    kept = tuple(min(most, rng.randrange(5), size - start) for start, most in enumerate(proposed))
    names = {"prompt_digest": "p", "draft_digest": "d"}
    accept_probs = tuple(rng.random() for _ in range(size))
    return trace, CompositeAcceptance(
        lookup=LookupTrace(**names, max_length=4, proposed=proposed, accepted=kept),
        model=AcceptanceTrace(**names, accept_probs=accept_probs, confidences=(0.5,) * size),
    )


def test_the_walk_of_a_composite_is_the_mean_of_its_replays() -> None:
    """Rounds and shapes, the widths of catching up included: 4,000 lucky ways against the expectation."""
    trace, acceptance = _composite(40)
    walked, luck, ways = expected_rounds(trace, acceptance, 4, 40), random.Random(1), 4000
    paths = [draw_rounds(trace, acceptance, 4, 40, rng=luck) for _ in range(ways)]
    turns = [replay([path], 1)[0] for path in paths]
    assert sum(map(len, paths)) / ways == pytest.approx(walked.num_rounds, rel=0.01)
    for shape, expected in walked.shapes.items():
        output = sum(turn.shapes[shape] for turn in turns) / ways
        assert output == pytest.approx(expected, abs=0.05), shape
    assert {shape for turn in turns for shape in turn.shapes} <= walked.shapes.keys()
    assert max(width for _, _, width in walked.shapes) > 4


@pytest.mark.parametrize(
    ("behind", "width"), [(1, 2), (2, 2), (3, 4), (9, 16), (33, 64), (64, 64), (65, 128), (129, 192)]
)
def test_catch_up_widths_are_few(behind: int, width: int) -> None:
    """So that each is timed."""
    assert catch_up_width(behind) == width


def test_caches_of_batch_1_outlive_larger_batches(engine: TorchEngine) -> None:
    """Traces are made there between batches; of larger ones only the last is kept, and what it warmed up."""
    engine.trace_target(WORKLOAD, PROMPTS[0])
    alone = engine._rows[1]
    for batch_size in (2, 4):
        engine.run_together(replace(WORKLOAD, batch_size=batch_size), PROMPTS[:4], (PLAIN,), "test")
        assert engine._rows[1] is alone
        assert set(engine._rows) == {1, batch_size}
        assert {size for _, size, _ in engine._warm} <= {1, batch_size}


@pytest.mark.parametrize("draft", [None, near(TableModel(seed=1), 2, 1.0), "ngram"], ids=["plain", "model", "ngram"])
def test_rows_that_are_done_do_not_widen_a_step(draft: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the long text in the second row, the short one that is left is stepped at its own length."""
    reaches: list[int] = []
    step = TableRows.step

    def noted(*arguments: Any, **options: Any) -> Any:
        if options.get("row") is None:
            reaches.append(arguments[3])
        return step(*arguments, **options)

    monkeypatch.setattr(TableRows, "step", noted)
    short, long = (Prompt(domain="toy", token_ids=(1, 2, 3) * times) for times in (1, 20))
    workload = Workload(batch_size=2, context_length=96, max_new_tokens=4)
    run_queue(TableModel(seed=1), draft, 3, workload, [short, long, short])
    assert max(reaches) > 60
    assert reaches[-1] < 12
