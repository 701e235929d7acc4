"""Lengths by batch as ranges: which setup counts at a batch, and when a flip of the length is worth it."""

import json
import shlex
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from profiles.engines.openai.launch import SERVER_KINDS, release_for
from profiles.records.core import PLAIN, Draft, Interval, Setup
from tests.lanes.cases import deployment
from tests.support.policies import CODE_DRAFT, NGRAM, choice, forecast, measured
from tuner.export import Deployment, emit
from tuner.export.schedule import Range, length_at, merged, ranges_of
from tuner.policy.policy import Choice
from tuner.search.objective import MIN_SPEEDUP

SCHEDULE = "num_speculative_tokens_per_batch_size"


def drafting(batch_size: int, length: int, speedup: float) -> Choice:
    setup = Setup(draft=CODE_DRAFT, length=length)
    return choice(setup, batch_size=batch_size, measured=measured(setup, speedup))


def found(case: Deployment, draft: Draft = CODE_DRAFT) -> list[tuple[int, int, int]]:
    return [(one.first, one.last, one.length) for one in ranges_of(case, draft, lambda setup: None)]


def config_of(case: Deployment) -> dict[str, object]:
    config = json.loads(shlex.split(emit(case, "vllm", "0.32.0").text)[1])
    assert isinstance(config, dict)
    return config


def test_a_batch_takes_the_measured_one_above() -> None:
    """A range ends at a measured batch and begins after the one before, whatever order the rows come in."""
    rows = (drafting(8, 2, 1.2), choice(PLAIN, batch_size=32), drafting(1, 5, 1.8))
    assert found(deployment(rows[2], *rows)) == [(1, 1, 5), (2, 8, 2), (9, 32, 0)]


def test_first_range_starts_at_one() -> None:
    """Batches under the smallest measured one take its length."""
    rows = (drafting(4, 3, 1.5), choice(PLAIN, batch_size=8))
    assert found(deployment(rows[0], *rows)) == [(1, 4, 3), (5, 8, 0)]
    assert config_of(deployment(rows[0], *rows))[SCHEDULE] == [[1, 4, 3], [5, 65_536, 0]]


def test_plain_first() -> None:
    """Drafting may pay at a larger batch only: the first range then drafts nothing."""
    rows = (choice(PLAIN), drafting(4, 3, 1.5))
    config = config_of(deployment(rows[1], *rows))
    assert config[SCHEDULE] == [[1, 1, 0], [2, 4, 3], [5, 65_536, 0]]
    assert config["num_speculative_tokens"] == 3


def test_one_draft_for_all_batches() -> None:
    """Where another draft was chosen the emitted one's best forecast counts, and nothing where it has none."""
    looked_up = Setup(draft=NGRAM, length=6)
    alternative = forecast(Setup(draft=CODE_DRAFT, length=2), 1.2)
    rows = (
        drafting(1, 5, 1.8),
        choice(looked_up, batch_size=2, alternatives=(forecast(looked_up), alternative)),
        choice(looked_up, batch_size=4),
    )
    assert found(deployment(rows[0], *rows)) == [(1, 1, 5), (2, 2, 2), (3, 4, 0)]


def test_plain_choice_is_kept_plain() -> None:
    """A batch where plain decoding was the choice drafts nothing, though a forecast hopes for more."""
    hoped = (forecast(Setup(draft=CODE_DRAFT, length=2), 1.3),)
    rows = (drafting(1, 5, 1.8), choice(PLAIN, batch_size=4, alternatives=hoped))
    assert found(deployment(rows[0], *rows)) == [(1, 1, 5), (2, 4, 0)]


def test_single_batch_has_no_ranges() -> None:
    """One measured batch says nothing about others: no schedule, and the note names the batch."""
    case = deployment(drafting(4, 3, 1.5))
    assert found(case) == []
    assert SCHEDULE not in config_of(case)
    assert "k=3 is for batches up to 4; from 5 on nothing was measured: keep --max-num-seqs at or under 4" in str(
        emit(case, "vllm", "0.32.0").note
    )


def test_equal_lengths_give_no_schedule() -> None:
    """Where one length is best at all measured batches there is nothing to flip."""
    rows = (drafting(1, 3, 1.8), drafting(4, 3, 1.5), drafting(8, 3, 1.2))
    case = deployment(rows[0], *rows)
    assert found(case) == [(1, 8, 3)]
    assert SCHEDULE not in config_of(case)
    assert config_of(case)["num_speculative_tokens"] == 3


def test_flip_without_a_real_gain_is_merged() -> None:
    """Two lengths whose gains are alike become the shorter one, for the asked batch too, and the note says so."""
    rows = (drafting(1, 4, 1.505), drafting(4, 3, 1.50))
    case = deployment(rows[0], *rows, measured_on="vllm")
    assert found(case) == [(1, 4, 3)]
    export = emit(case, "vllm", "0.32.0")
    assert export.setup == Setup(draft=CODE_DRAFT, length=3)
    assert export.label == "forecast on vllm"  # k=3 was not run at batch 1
    assert "k=3 is for batches up to 4; from 5 on nothing was measured" in str(export.note)
    assert "k=3 instead of 4" in str(export.note)


def ranged(*rows: tuple[int, float, float]) -> list[Range]:
    """Ranges of one batch each: (length, estimate, reach of the interval)."""
    return [
        Range(first=at, last=at, length=length, gain=Interval(estimate=gain, low=gain - reach, high=gain + reach))
        for at, (length, gain, reach) in enumerate(rows, start=1)
    ]


def test_rule_of_a_real_gain() -> None:
    """A flip stays where the longer one's interval is above the shorter's estimate, or its estimate is 1.5 % above."""
    assert len(merged(ranged((4, 1.510, 0.005), (3, 1.50, 0.2)))) == 2  # narrow: its low end is above
    assert len(merged(ranged((4, 1.5226, 0.3), (3, 1.50, 0.2)))) == 2  # 1.507 % above
    assert len(merged(ranged((4, 1.5224, 0.3), (3, 1.50, 0.2)))) == 1
    assert len(merged(ranged((0, 1.0, 0.0), (3, 1.01, 0.005)))) == 2
    assert len(merged(ranged((0, 1.0, 0.0), (3, 1.01, 0.02)))) == 1


def test_merging_goes_on_backwards() -> None:
    """A range that shrank is compared with the one before it again."""
    assert [one.length for one in merged(ranged((3, 1.2, 0.1), (5, 1.205, 0.1), (3, 1.2, 0.1)))] == [3]


@given(st.lists(st.tuples(st.integers(0, 8), st.floats(1.0, 3.0), st.floats(0.0, 0.5)), min_size=1, max_size=8))
def test_merged_ranges_cover_the_same_batches(rows: list[tuple[int, float, float]]) -> None:
    """Whatever is merged, every batch has one length that is no longer than its own, and each flip has a real gain."""
    ranges = ranged(*rows)
    done = merged(ranges)
    assert (done[0].first, done[-1].last) == (1, len(rows))
    for here, after in pairwise(done):
        assert after.first == here.last + 1
        assert after.length != here.length
        shorter, longer = sorted((here, after), key=lambda one: one.length)
        gains = longer.gain.low > shorter.gain.estimate, longer.gain.estimate >= MIN_SPEEDUP * shorter.gain.estimate
        assert any(gains)
    for one in ranges:
        assert length_at(done, one.first) <= one.length


def test_a_schedule_claims_every_measured_batch() -> None:
    """What it says at each, plain decoding too; one length claims the batches that it was decided for alone."""
    rows = (drafting(1, 5, 1.8), drafting(4, 2, 1.4), choice(PLAIN, batch_size=8))
    three, two = (Setup(draft=CODE_DRAFT, length=length) for length in (5, 2))
    assert emit(deployment(rows[0], *rows), "vllm", "0.32.0").claims == {1: three, 4: two, 8: PLAIN}
    assert emit(deployment(rows[0], *rows), "sglang").claims == {1: three}
    assert emit(deployment(rows[1], *rows), "sglang").claims == {4: two}
    alike = (drafting(1, 3, 1.8), drafting(4, 3, 1.4))
    assert set(emit(deployment(alike[1], *alike), "vllm", "0.32.0").claims) == {1, 4}


def test_records_are_asked_for_where_there_are_any() -> None:
    """Of each request how it was drafted: vLLM 0.24.0 ends at the flag, 0.32.0 has it."""

    def record_args(kind: str, version: str | None) -> tuple[str, ...]:
        return tuple(SERVER_KINDS[kind].record_args(release_for(kind, version)))

    assert record_args("vllm", "0.24.0") == record_args("sglang", None) == ()
    assert record_args("vllm", "0.32.0") == (
        "--per-request-spec-decode-metrics",
        "detailed",
        "--enable-per-request-metrics",
    )
