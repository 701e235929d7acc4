"""The table and the JSON document of a policy."""

import io
import json
import re

import pytest
from rich.console import Console

from profiles.records.core import PLAIN, Setup
from profiles.records.errors import InputError
from tests.support.policies import CODE_DRAFT, NGRAM, choice, forecast, measured, policy
from tuner.report.tables import document, table

CODE4 = Setup(draft=CODE_DRAFT, length=4)
COST = {"measured_seconds": 71.5, "reused_units": 3, "grid_seconds_estimate": 2000.0}


def printed(*choices: object) -> str:
    """The table as a terminal 160 columns wide shows it, one space for each run of spaces."""
    console = Console(file=io.StringIO(), width=160)
    console.print(table(policy(*choices)))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return re.sub(r" +", " ", console.file.getvalue())


def described(*choices: object) -> dict:
    """The document, through JSON as a program reads it."""
    whole = document(policy(*choices), cost=COST, store="store.sqlite", policy_path="policy.json")  # type: ignore[arg-type]
    return json.loads(json.dumps(whole, allow_nan=False))


def test_table_rows() -> None:
    """A row per anchor: interval, end to end, proven, and the reasons below; what is shared is the title."""
    shown = printed(choice(CODE4), choice(PLAIN, domain="code", reason="Plain decoding: k=2 [sic] is not proven."))
    assert "family/target on Example CPU, 2026-11-21 \nbatch 1, context 512, temperature 0 \n" in shown
    assert "\n mixed family/draft-code k=4 1.60 [1.55, 1.65] 1.50 yes \n" in shown
    assert "\n code plain 1 1 no \n" in shown
    assert "\nmixed: family/draft-code k=4 was the fas" in shown
    assert "\ncode: Plain decoding: k=2 [sic] is not proven." in shown


def test_table_shows_anchors_that_differ() -> None:
    """A batch, context or temperature that differs between anchors has a column of its own."""
    shown = printed(choice(CODE4), choice(Setup(draft=NGRAM, length=2), batch_size=8, temperature=0.7))
    assert "\ncontext 512 \n" in shown
    assert "\n 1 0 mixed family/draft-code k=4 1.60" in shown
    assert "\n 8 0.7 mixed ngram:max=4,min=2 k=2 1.60" in shown
    assert "\nmixed, batch 8, temperature 0.7: " in shown


def test_document_of_a_win() -> None:
    """The headline is the mixed choice at the first anchor, with the measured figures; anchors repeat the form."""
    whole = described(choice(Setup(draft=NGRAM, length=2), domain="code"), choice(CODE4))
    assert whole["choice"] == {"draft": "family/draft-code", "length": 4, "kind": "model", "stop_below": None}
    assert whole["speedup"] == {"estimate": 1.6, "low": 1.55, "high": 1.6500000000000001}
    assert (whole["end_to_end"], whole["plain_tok_per_s"], whole["chosen_tok_per_s"]) == (1.5, 100.0, 160.0)
    assert whole["proven"] is True
    assert [point["domain"] for point in whole["anchors"]] == ["code", "mixed"]
    assert whole["crossover_batch"] is None
    about_the_policy = {"target", "environment", "anchors", "crossover_batch", "store", "policy"}
    assert {**whole["anchors"][1], "cost": COST} == {
        **{key: whole[key] for key in whole.keys() - about_the_policy},
        "batch_size": 1,
        "context_length": 512,
        "domain": "mixed",
        "temperature": 0.0,
    }
    assert whole["target"]["name"] == "family/target"
    assert whole["environment"]["device"] == "Example CPU"
    assert (whole["cost"], whole["store"], whole["policy"]) == (COST, "store.sqlite", "policy.json")


def test_document_of_plain_decoding() -> None:
    """Plain decoding is speed-up 1, not proven, at its own rate: the loser's figures are not its figures."""
    whole = described(choice(PLAIN, measured=measured(CODE4, 1.01), forecast=forecast(CODE4, 1.2)))
    assert whole["choice"] == {"draft": None, "length": 0}
    assert whole["speedup"] == {"estimate": 1.0, "low": 1.0, "high": 1.0}
    assert (whole["end_to_end"], whole["proven"]) == (1.0, False)
    assert (whole["plain_tok_per_s"], whole["chosen_tok_per_s"]) == (100.0, 100.0)


def test_document_without_figures() -> None:
    """A rate nobody measured is null; one only forecast is the forecast's."""
    assert described(choice(PLAIN))["plain_tok_per_s"] is None
    whole = described(choice(PLAIN, forecast=forecast(CODE4, 1.25)))
    assert (whole["plain_tok_per_s"], whole["chosen_tok_per_s"]) == (100.0, 100.0)
    unproven = described(choice(CODE4, measured=None, proven=False))
    assert (unproven["speedup"]["estimate"], unproven["end_to_end"]) == (1.5, None)
    assert unproven["chosen_tok_per_s"] == 150.0


def test_a_draft_without_figures_is_refused() -> None:
    """A drafting choice that has no figures of its own cannot be reported."""
    with pytest.raises(InputError, match="'family/draft-code k=4' has neither a measurement nor a forecast"):
        described(choice(CODE4, measured=None, forecast=None, proven=False))
