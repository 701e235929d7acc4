"""Adaptive decoding: whatever a controller decides each round, outputs are the target's and no draft falls behind."""

import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from profiles.acceptance.expected_rounds import DraftAcceptance, round_outcomes
from profiles.engines.torch.adaptive import AdaptiveRun
from profiles.engines.torch.drafters import Drafted, ModelDrafter, Text
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.records.core import CATCH_UP_WIDTHS, PLAIN, Draft, Model, Prompt, Setup, Workload
from profiles.records.errors import BadNumbersError, InputError
from profiles.records.evidence import TargetTrace
from tests.support import tiny
from tests.support.toys import ScriptedController, TableModel, near, p_value, run_toy_adaptive, sequence_law, wandering
from tests.support.traced import Plain, to_limit_and_end

SELF, OTHER, EXIT, LOOKUP, COMPOSITE = range(5)
WORKLOAD = Workload(context_length=96, max_new_tokens=24)
NUM_SWITCHED = 7  # prompts of the test of switches, more than rows
PROMPTS = tuple(
    Prompt(domain="a", token_ids=tuple(random.Random(size).choices(range(20, 20 + 3 * size), k=size)))
    for size in (3, 24, 1, 40, 8, 17, 2, 30, 12, 5, 21)
)
FALSE_ALARM = 1e-4  # each chi-square test fails a correct engine once in ten thousand different seeds


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """A tiny random target with a draft of every kind; the composite shares the model of another draft."""
    return tiny.every_draft(tmp_path_factory.mktemp("adaptive"))


def every_setup(engine: TorchEngine) -> list[Setup]:
    """Plain decoding as often as any draft, and all drafts at k = 1..8."""
    return [PLAIN] * 8 + [Setup(draft=draft, length=length) for draft in engine.drafts for length in range(1, 9)]


@pytest.fixture(scope="module")
def plain(engine: TorchEngine) -> dict[bool, Plain]:
    """Traced once, for every batch size and order of setups: no adaptive run made them."""
    return to_limit_and_end(engine, WORKLOAD, PROMPTS[:NUM_SWITCHED], 8)


def traces_of(engine: TorchEngine, workload: Workload) -> list[TargetTrace]:
    return [engine.trace_target(workload, prompt) for prompt in PROMPTS]


def replayed(
    workload: Workload,
    traces: Sequence[TargetTrace],
    accepted: dict[Draft | None, list[DraftAcceptance | None]],
    setups: Iterator[Setup],
) -> list[list[tuple[int, int]]]:
    """The rows of every round, with each draft as good as one that never paused."""
    waiting = deque(range(len(traces)))
    rows: list[tuple[int, int] | None] = [None] * workload.batch_size  # prompt and next place
    rounds: list[list[tuple[int, int]]] = []

    def refill(number: int) -> None:
        while waiting and rows[number] is None:
            prompt = waiting.popleft()
            rows[number] = None if len(traces[prompt].token_ids) == 1 else (prompt, 1)

    for number in range(len(rows)):
        refill(number)
    while any(rows):
        setup, played = next(setups), []
        for number, row in enumerate(rows):
            if row is None:
                continue
            prompt, position = row
            proposed = num_accepted = 0
            size = len(traces[prompt].token_ids)
            if setup.draft is not None:
                limit = min(setup.length, workload.max_new_tokens - position - 1)
                [outcome] = round_outcomes(accepted[setup.draft][prompt], position, limit, size)
                proposed, num_accepted = outcome.proposed, outcome.accepted
            played.append((proposed, num_accepted))
            rows[number] = (prompt, position + num_accepted + 1) if position + num_accepted + 1 < size else None
        rounds.append(played)
        for number, row in enumerate(rows):
            if row is None:
                refill(number)
    return rounds


def check_lossless(result: AdaptiveRun, traces: Sequence[TargetTrace]) -> None:
    """Outputs are the traces', and the rounds tell of every token."""
    assert [tuple(run.token_ids) for run in result.generations] == [trace.token_ids for trace in traces]
    emitted = sum(len(trace.token_ids) - 1 for trace in traces)  # a first token is the prefill's
    assert sum(each.tokens for each in result.rounds) == emitted
    assert all(each.seconds > 0.0 for each in result.rounds)


@pytest.mark.parametrize("ends", [False, True], ids=["to the limit", "to an end token"])
@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("longest", [1, 12], ids=["every round", "in bursts"])
def test_no_switch_costs_a_token_or_an_acceptance(
    engine: TorchEngine, plain: dict[bool, Plain], longest: int, batch_size: int, ends: bool
) -> None:
    """Under random picks outputs are plain decoding's, and every round of every row is that of an unbroken draft."""
    prompts, traces, accepted = plain[ends].prompts, plain[ends].traces, plain[ends].accepted
    workload = replace(plain[ends].workload, batch_size=batch_size)
    for seed in range(2):
        controller = ScriptedController(wandering(every_setup(engine), seed, longest))
        result = engine.run_adaptive(workload, prompts, controller, 8)
        check_lossless(result, traces)
        assert [each.setup for each in result.rounds] == [report.decision.setup for report in controller.reports]
        assert [each.rows for each in result.rounds] == [len(report.rows) for report in controller.reports]
        setups = iter([each.setup for each in result.rounds])
        assert [list(report.rows) for report in controller.reports] == replayed(workload, traces, accepted, setups)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_request_may_have_a_length_of_its_own(
    engine: TorchEngine, plain: dict[bool, Plain], batch_size: int
) -> None:
    """No row proposes more than its own length, outputs are plain decoding's, and requests that end are told."""
    workload = replace(plain[False].workload, batch_size=batch_size)
    controller = ScriptedController(wandering(every_setup(engine), 5), uneven=True)
    check_lossless(engine.run_adaptive(workload, plain[False].prompts, controller, 8), plain[False].traces)
    told = [report for report in controller.reports if report.decision.requests]
    assert any(len(set(report.decision.lengths)) > 1 for report in told) == (batch_size > 1)
    for report in told:
        assert all(row.proposed <= k for row, k in zip(report.rows, report.decision.lengths, strict=True))
    assert {number for report in told for number in report.ids or ()} <= controller.finished


def test_stopping_early_belongs_to_the_setup(engine: TorchEngine) -> None:
    """Setups that share a draft stop each as it says."""
    [never, always] = [Setup(draft=engine.drafts[OTHER], length=4, stop_below=stop) for stop in (1e-9, 1.0 - 1e-9)]
    controller = ScriptedController(itertools.cycle([always, never, PLAIN]))
    result = engine.run_adaptive(WORKLOAD, PROMPTS[:3], controller, 4)
    check_lossless(result, traces_of(engine, WORKLOAD)[:3])
    proposed = {setup: [] for setup in (always, never)}
    for report in controller.reports:
        if report.decision.setup != PLAIN:
            proposed[report.decision.setup] += [limit for limit, _ in report.rows]
    assert max(proposed[always]) == 0
    assert max(proposed[never]) == 4


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_draft_comes_back_after_a_long_time(engine: TorchEngine, batch_size: int) -> None:
    """Its first round takes in all it missed, several steps of 64 tokens; then everything is accepted again."""
    self_setup = Setup(draft=engine.drafts[SELF], length=4)
    workload = Workload(context_length=240, max_new_tokens=180, batch_size=batch_size)
    prompts = (PROMPTS[3], PROMPTS[5])
    for first in (PLAIN, self_setup):
        setups = itertools.chain([first] * 3, [PLAIN] * 140, itertools.repeat(self_setup))
        result = engine.run_adaptive(workload, prompts[:batch_size], ScriptedController(setups), 8)
        assert max(width for run in result.generations for _, _, width in run.shapes) == 192
        for run, prompt in zip(result.generations, prompts, strict=False):
            assert tuple(run.token_ids) == engine.trace_target(workload, prompt).token_ids
            assert all(num_accepted == proposed for proposed, num_accepted in run.rounds)


def test_only_the_draft_in_use_is_started_with_a_prompt(engine: TorchEngine) -> None:
    """The first pick's own is caught up in its first round; one that was not picked takes in the whole text."""
    self_setup, other = (Setup(draft=engine.drafts[kind], length=1) for kind in (SELF, EXIT))
    for setups, width in (([self_setup], 2), ([PLAIN, self_setup], 64), ([other, self_setup], 64)):
        controller = ScriptedController(itertools.chain(setups, itertools.repeat(PLAIN)))
        [run] = engine.run_adaptive(WORKLOAD, (PROMPTS[3],), controller, 1).generations
        assert max(first for _, _, first in run.shapes) == width


def test_what_a_controller_is_asked(engine: TorchEngine) -> None:
    """The engine's batch, the domain of the rows in use when they share one, the workload's point; once a round."""
    prompts = (*PROMPTS[:3], replace(PROMPTS[3], domain="b"))
    workload = replace(WORKLOAD, batch_size=2, max_new_tokens=4)
    controller = ScriptedController(itertools.repeat(PLAIN))
    engine.run_adaptive(workload, prompts, controller, 0)
    assert controller.questions == [(2, 96, "a", 0.0)] * 3 + [(2, 96, None, 0.0)] * 3
    assert [report.decision.setup for report in controller.reports] == [PLAIN] * 6


def test_an_output_of_one_token_is_no_round(engine: TorchEngine) -> None:
    """The question that was asked ahead is asked again where fewer rows than thought are left; a step runs them all."""
    first = engine.trace_target(WORKLOAD, PROMPTS[0]).token_ids[0]
    workload = replace(WORKLOAD, batch_size=2, end_token_ids=(first,))
    assert first not in engine.trace_target(WORKLOAD, PROMPTS[1]).token_ids
    controller = ScriptedController(itertools.repeat(PLAIN))
    result = engine.run_adaptive(workload, PROMPTS[:2], controller, 4)
    assert [len(run.token_ids) for run in result.generations] == [1, 24]
    assert [size for size, *_ in controller.questions] == [2] * 24
    controller = ScriptedController(itertools.repeat(PLAIN))
    assert engine.run_adaptive(workload, PROMPTS[:1], controller, 4).rounds == ()


def test_decisions_that_cannot_be_run_are_named(engine: TorchEngine) -> None:
    """A draft that is not loaded, and a length beyond what the run was made for."""
    missing = Setup(draft=Draft(kind="ngram", max_match=9, min_match=9), length=1)
    longer = Setup(draft=engine.drafts[EXIT], length=5)
    for setup, reason in ((missing, "ngram:max=9,min=9 is not loaded"), (longer, "early-exit:1 k=5: .*up to 4")):
        with pytest.raises(InputError, match=reason):
            engine.run_adaptive(WORKLOAD, PROMPTS[:1], ScriptedController([PLAIN, setup]), 4)
    with pytest.raises(InputError, match="speculation length 65"):
        engine.run_adaptive(WORKLOAD, PROMPTS[:1], ScriptedController([PLAIN]), 65)


def test_bad_numbers_spoil_no_later_run(tiny_folders: dict[str, Path]) -> None:
    """Caches that a broken target wrote to are let go."""
    target = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cpu")
    engine = TorchEngine(target, {}, "cpu")
    good = engine.trace_target(WORKLOAD, PROMPTS[0])
    weight = target.model.lm_head.weight
    num_accepted = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(BadNumbersError):
        engine.run_adaptive(WORKLOAD, PROMPTS[:1], ScriptedController(itertools.repeat(PLAIN)), 0)
    with torch.no_grad():
        weight.copy_(num_accepted)
    [run] = engine.run_adaptive(WORKLOAD, PROMPTS[:1], ScriptedController(itertools.repeat(PLAIN)), 0).generations
    assert tuple(run.token_ids) == good.token_ids


def test_every_draft_model_is_timed_at_all_first_widths(engine: TorchEngine) -> None:
    """So that the cost of switching to it can be forecast."""
    times = engine.time_steps(WORKLOAD, 96, 2)
    for kind in (SELF, OTHER, EXIT):
        assert set(times[engine.drafts[kind].digest].samples_s) == {1, *CATCH_UP_WIDTHS}


# --- sampling keeps the target's law ---

MODEL = Model(name="toy", dtype="float32", digest="toy", num_params=1)
TARGET = TableModel(seed=1)
TOYS = {
    Draft(kind="model", model=MODEL): near(TARGET, seed=2, distance=1.0),
    Draft(kind="early_exit", num_layers=1): near(TARGET, seed=3, distance=0.4),
}
LOOKUPS = [
    Draft(kind="ngram", max_match=2, min_match=1),
    Draft(kind="composite", model=MODEL, max_match=2, min_match=2),
]
RUNS = 3000


def _sampled(batch_size: int) -> float:
    """Chi-square of four sampled tokens with another pick every round; prompts differ and end alike."""
    drafting = [Setup(draft=draft, length=length) for draft in (*TOYS, *LOOKUPS) for length in (1, 2, 3)]
    workload = Workload(batch_size=batch_size, context_length=64, max_new_tokens=4, temperature=0.9)
    prompts = [Prompt(domain="toy", token_ids=(first, 1, 2, last, 2, 1)) for first in range(5) for last in range(3)]
    outputs: list[tuple[int, ...]] = []
    for seed in range(RUNS // len(prompts)):
        controller = ScriptedController(wandering([PLAIN, *drafting], seed))
        result = run_toy_adaptive(TARGET, TOYS, replace(workload, seed=seed), prompts, controller)
        outputs += [tuple(run.token_ids) for run in result.generations]
    return p_value(sequence_law(TARGET, workload, 1), outputs)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8])
def test_sampled_outputs_follow_the_exact_law(batch_size: int) -> None:
    """Whatever drafts from one round to the next, sequences of four tokens have the target's law."""
    assert _sampled(batch_size) > FALSE_ALARM


@pytest.mark.slow
def test_a_planted_bug_fails_the_chi_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offering proposals with the law that another draft had in the round before is noticed."""
    real = ModelDrafter.propose
    last: dict[int, torch.Tensor] = {}

    def stale(self: ModelDrafter, text: Text, limits: list[int], positions: torch.Tensor) -> Drafted:
        drafted = real(self, text, limits, positions)
        probs = drafted.proposal.draft_probs
        before = last.get(probs.shape[1], probs)
        last[probs.shape[1]] = probs
        return replace(drafted, proposal=replace(drafted.proposal, draft_probs=before))

    monkeypatch.setattr(ModelDrafter, "propose", stale)
    assert _sampled(1) < FALSE_ALARM
