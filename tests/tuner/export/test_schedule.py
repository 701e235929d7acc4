"""Lengths by batch as ranges: which setup counts at a batch."""

import json
import shlex

from profiles.engines.openai.launch import SERVER_KINDS, release_for
from profiles.records.core import PLAIN, Draft, Setup
from tests.lanes.cases import deployment
from tests.support.policies import CODE_DRAFT, NGRAM, choice, forecast, measured
from tuner.export import Deployment, emit
from tuner.export.schedule import ranges_of
from tuner.policy.policy import Choice

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
