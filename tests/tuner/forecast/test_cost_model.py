"""Usage counted by hand, and overheads recovered from runs that were made with known ones."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest

from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.records.errors import NotMeasuredError
from profiles.records.evidence import Sample, StepShape, StepTimes
from tests.support.fakes import DRAFT_A, GREEDY, NGRAM, TARGET, FakeEngine, prompts
from tuner.forecast.cost_model import Overhead, StepCostModel, composed, step_samples
from tuner.forecast.evidence import gather

PART = TARGET.run_digest
MODEL = StepCostModel(PART)
DEEP = Draft(kind="model", model=Model(name="deep", dtype="float32", digest="deep", num_params=9))


def _steps(part: str, seconds: dict[int, float]) -> StepTimes:
    samples = {width: (value,) for width, value in seconds.items()}
    return StepTimes(component_digest=part, batch_size=1, context_length=64, samples_s=samples)


STEPS = {
    PART: _steps(PART, {width: 0.010 + 0.001 * width for width in range(1, 10)}),
    DRAFT_A.digest: _steps(DRAFT_A.digest, {1: 0.001, 2: 0.0015}),
    DEEP.digest: _steps(DEEP.digest, {1: 0.004, 2: 0.005}),
    NGRAM.digest: _steps(NGRAM.digest, dict.fromkeys(range(1, 9), 0.0001)),
}


def _run(setup: Setup, rounds: dict[tuple[int, int], int], beyond_s: float) -> tuple[Setup, Sample]:
    """A run that takes its steps, the first of every round two tokens wide, and `beyond_s`."""
    with_model = setup.draft is not None and setup.draft != NGRAM
    shapes: Counter[tuple[int, int, int]] = Counter()
    for (proposed, _), count in rounds.items():
        shapes[StepShape(proposed + 1, *((proposed, 2) if with_model and proposed else ()))] += count
    usage = MODEL.usage(setup, shapes, 0.0)
    stepped = sum(count * STEPS[part].samples_s[width][0] for (part, width), count in usage.steps.items())
    sample = Sample(
        setup_digest=setup.digest,
        prompt_digest="prompt",
        ttft_s=0.1,
        decode_s=stepped + beyond_s,
        output_tokens=64,
        rounds=rounds,
        shapes=shapes,
        output_digest="output",
    )
    return setup, sample


def test_steps_of_a_round_by_hand() -> None:
    """Three rounds of two proposals and a plain step: verify widths 3 and 1, a first draft step of 2 and one of 1."""
    usage = MODEL.usage(Setup(draft=DRAFT_A, length=2), {StepShape(3, 2, 2): 3.0, StepShape(1): 1.0}, 4.0)
    assert usage.steps == {(PART, 3): 3.0, (PART, 1): 1.0, (DRAFT_A.digest, 1): 3.0, (DRAFT_A.digest, 2): 3.0}
    assert (usage.num_idle, usage.num_proposing, usage.num_draft_steps, usage.num_refills) == (1.0, 3.0, 6.0, 4.0)
    overhead = Overhead(idle_s=0.5, proposing_s=2.0, draft_step_s=0.25, refill_s=0.1, factor=1.0)
    assert overhead.beyond_steps_s(usage) == pytest.approx(0.5 + 6.0 + 1.5 + 0.4)


def test_lookup_is_asked_once_a_round() -> None:
    """Also in rounds where it proposes nothing."""
    usage = MODEL.usage(Setup(draft=NGRAM, length=4), {StepShape(4): 2.0, StepShape(1): 5.0}, 0.0)
    assert usage.steps == {(PART, 4): 2.0, (PART, 1): 5.0, (NGRAM.digest, 4): 7.0}


def test_a_composite_uses_its_parts() -> None:
    """A look-up round, a round of the model that is 5 tokens behind, and one that is 130 behind: three steps of 64."""
    composite = Draft(kind="composite", model=DRAFT_A.model, max_match=4, min_match=2)
    shapes = {StepShape(3): 1.0, StepShape(5, 4, 8): 1.0, StepShape(5, 4, 192): 1.0}
    usage = MODEL.usage(Setup(draft=composite, length=4), shapes, 0.0)
    assert usage.steps == {
        (PART, 3): 1.0,
        (PART, 5): 2.0,
        (NGRAM.digest, 4): 3.0,
        (DRAFT_A.digest, 8): 1.0,
        (DRAFT_A.digest, 64): 3.0,
        (DRAFT_A.digest, 1): 6.0,
    }


def test_other_rows_prefills_are_told_apart() -> None:
    """In a batch a row waits for the prompts that come in; that is no overhead of its rounds."""
    setup, sample = _run(PLAIN, {(0, 0): 50}, 50 * 0.002)
    waited = replace(sample, decode_s=sample.decode_s + 3 * 0.1, refills=3)
    rate = MODEL.calibrate(STEPS, [(setup, waited)])[None]
    assert (rate.idle_s, rate.refill_s) == pytest.approx((0.002, 0.1))


def test_drafts_share_what_a_row_of_steps_saves() -> None:
    """A fifth of each draft's own step per drafted token, whatever the step takes; the rest is per round."""
    calibration = [_run(PLAIN, {(0, 0): 50}, 50 * 0.002)]
    for draft, round_s, step_s in ((DRAFT_A, 0.0003, 0.001), (DEEP, 0.0008, 0.004)):
        for length in (3, 7):
            setup = Setup(draft=draft, length=length)
            beyond_s = 20 * (round_s - 0.2 * step_s * length) + 2 * 0.002
            calibration.append(_run(setup, {(length, 1): 15, (length, length): 5, (0, 0): 2}, beyond_s))
    rates = MODEL.calibrate(STEPS, calibration)
    assert rates[None].idle_s == pytest.approx(0.002)
    assert rates[DRAFT_A].draft_step_s == pytest.approx(-0.0002)
    assert rates[DEEP].draft_step_s == pytest.approx(-0.0008)
    assert (rates[DRAFT_A].proposing_s, rates[DEEP].proposing_s) == pytest.approx((0.0003, 0.0008))


def test_a_round_without_a_proposal_is_a_plain_round() -> None:
    """What a look-up costs beyond its steps is charged to the rounds that proposed, weighted by how many there were."""
    calibration = [
        _run(PLAIN, {(0, 0): 50}, 50 * -0.001),
        _run(Setup(draft=NGRAM, length=4), {(0, 0): 40, (4, 2): 10}, 40 * -0.001 + 10 * 0.0005),
        _run(Setup(draft=NGRAM, length=4), {(0, 0): 49, (4, 2): 1}, 49 * -0.001 + 1 * 0.9),
    ]
    rate = MODEL.calibrate(STEPS, calibration)[NGRAM]
    assert (rate.idle_s, rate.proposing_s, rate.draft_step_s) == pytest.approx((-0.001, 0.0005, 0.0))


def test_an_unknown_width_is_named() -> None:
    """Nothing is made up for a step that was never timed."""
    with pytest.raises(NotMeasuredError, match="width 12"):
        step_samples(STEPS, PART, 12)


def test_a_run_that_does_not_say_its_shapes_is_refused() -> None:
    """Evidence of an older engine is no calibration."""
    setup, sample = _run(PLAIN, {(0, 0): 50}, 0.0)
    with pytest.raises(NotMeasuredError, match="plain does not say what its rounds ran"):
        MODEL.calibrate(STEPS, [(setup, replace(sample, shapes={}))])


def test_a_draft_that_never_proposed_is_not_free() -> None:
    """Its proposing rounds are charged what a plain round is."""
    calibration = [_run(PLAIN, {(0, 0): 50}, 50 * 0.001), _run(Setup(draft=NGRAM, length=4), {(0, 0): 50}, 50 * 0.001)]
    assert MODEL.calibrate(STEPS, calibration)[NGRAM].proposing_s == pytest.approx(0.001)


def test_a_composite_has_the_overheads_of_its_parts() -> None:
    """Two rounds of the look-up, three of the model with four draft steps each, one without a proposal."""
    both = Draft(kind="composite", model=DRAFT_A.model, max_match=4, min_match=2)
    shapes = {StepShape(3): 2.0, StepShape(5, 4, 2): 3.0, StepShape(1): 1.0}
    lookup, model = Overhead(idle_s=0.1, proposing_s=1.0), Overhead(idle_s=0.1, proposing_s=5.0, draft_step_s=0.01)
    usage = MODEL.usage(Setup(draft=both, length=4), shapes, 0.0)
    assert composed(lookup, model).beyond_steps_s(usage) == pytest.approx(0.1 + 2 * 1.0 + 3 * 5.0 + 12 * 0.01)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_composite_is_not_run_where_its_parts_are(batch_size: int) -> None:
    engine = FakeEngine()
    both = Draft(kind="composite", model=DRAFT_A.model, max_match=4, min_match=2)
    engine.drafts = (DRAFT_A, NGRAM, both)
    evidence = gather(engine, replace(GREEDY, batch_size=batch_size), prompts(6), (1, 2, 4))
    ran = {setup.draft for setup, _ in evidence.calibration}
    assert ran == {None, DRAFT_A, NGRAM} | ({both} if batch_size > 1 else set())
    assert both in evidence.drafts


def _round_s(setup: Setup, overheads: dict[Draft | None, Overhead]) -> float:
    usage = MODEL.usage(
        setup, {StepShape(setup.length + 1, setup.length, 2) if setup.draft else StepShape(1): 1.0}, 0.0
    )
    stepped_s = sum(count * STEPS[part].samples_s[width][0] for (part, width), count in usage.steps.items())
    return stepped_s + float(overheads[setup.draft].beyond_steps_s(usage))


@pytest.mark.parametrize(("drift", "spread", "most"), [(0.08, 0.0, 0.045), (0.002, 0.1, 0.03)])
def test_drift_between_the_runs_of_drafts_is_no_overhead_of_theirs(
    drift: float, spread: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a draft lie in other seconds than those of plain decoding: it alone was 12 % off at every length.

    0.059 without correction. What a draft takes beyond its steps in every prompt (`spread` over drafts) stays.
    """
    others = [replace(DEEP, model=Model(name=name, dtype="float32", digest=name, num_params=9)) for name in "vwxyz"]
    for draft in others:
        monkeypatch.setitem(STEPS, draft.digest, _steps(draft.digest, {1: 0.002, 2: 0.0025}))
    drafts, rng, errors = [DRAFT_A, DEEP, *others], random.Random(0), []
    truths = dict.fromkeys([None, *drafts], Overhead())
    for _ in range(20):
        slower = {None: 1.0} | {draft: math.exp(rng.gauss(0.0, spread)) for draft in drafts}
        runs = []
        for prompt, draft in itertools.product("abc", [None, *drafts]):
            drifts = [math.exp(rng.gauss(0.0, drift)) for _ in (drafts if draft is None else [draft])]
            for factor, length in itertools.product(drifts, (3, 7) if draft else (0,)):
                setup = Setup(draft=draft, length=length)
                _, run = _run(setup, {(length, length): 10}, 0.0)
                seconds = run.decode_s * factor * slower[draft]
                runs.append((setup, replace(run, prompt_digest=prompt, decode_s=seconds)))
        overheads = MODEL.calibrate(STEPS, runs)
        for draft in drafts:
            setup = Setup(draft=draft, length=5)
            forecast = _round_s(setup, overheads) / _round_s(PLAIN, overheads)
            errors.append(math.log(forecast * _round_s(PLAIN, truths) / (slower[draft] * _round_s(setup, truths))))
    assert math.sqrt(fmean(error**2 for error in errors)) < most
