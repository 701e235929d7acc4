"""The table, the JSON document and the bar chart of a policy."""

import io
import json
import re
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from profiles.records.core import PLAIN, Interval, Setup
from profiles.records.errors import InputError
from tests.support.policies import CODE_DRAFT, NGRAM, choice, forecast, interval, measured, policy
from tuner.report import ChartRow, bar_chart, document, table

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


def chart_row(group: str, length: int, speedup: float, *, confirmed: bool) -> ChartRow:
    return ChartRow(
        setup_name=f"{group} k={length}" if length else "plain",
        group=group,
        forecast=interval(100 * speedup, 3.0),
        measured=interval(101 * speedup, 2.0) if confirmed else None,
        speedup=speedup,
    )


def test_table_rows() -> None:
    """A row per anchor: interval, end to end, proven, and the reasons below; what is shared is the title."""
    shown = printed(choice(CODE4), choice(PLAIN, domain="code", reason="Plain decoding: k=2 [sic] is not proven."))
    assert "family/target on Example CPU, 2026-11-21 \nbatch 1, context 512, temperature 0 \n" in shown
    assert "\n mixed family/draft-code k=4 1.60 (1.55 to 1.65) 1.50 yes \n" in shown
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


@pytest.mark.parametrize("num_drafts", [1, 6])
def test_chart_grows_with_its_rows(num_drafts: int, tmp_path: Path) -> None:
    """The picture is not blank, and 49 setups take two columns rather than one tall strip."""
    rows = [chart_row("plain", 0, 1.0, confirmed=True)]
    rows += [
        chart_row(f"draft-{index}", length, 0.7 + 0.1 * length, confirmed=length == 3)
        for index in range(num_drafts)
        for length in range(1, 9)
    ]
    path = tmp_path / "chart.png"
    bar_chart(rows, path, title="Speed of every setup", subtitle="Example CPU")
    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    assert width == (1200 if num_drafts == 1 else 2400)
    assert height < width
    assert len({tuple(pixel) for pixel in picture[::7, ::7, :3].reshape(-1, 3).tolist()}) > 2 * num_drafts


def test_chart_says_what_it_shows(tmp_path: Path) -> None:
    """Title, draft names, multipliers and the legend stand in the picture."""
    rows = [chart_row("plain", 0, 1.0, confirmed=False), chart_row("draft-code", 4, 1.62, confirmed=True)]
    path = tmp_path / "chart.svg"
    bar_chart(rows, path, title="Speed", subtitle="Example CPU, greedy")
    comments = re.findall(r"<!-- (.*?) -->", path.read_text())
    said = ["Speed", "Example CPU, greedy", "plain decoding", "draft-code", "k=4", "1.62×", "1.00×", "forecast"]
    assert set(said) <= set(comments)
    assert "measured, paired runs" in comments


def test_chart_without_plain_decoding_or_forecast(tmp_path: Path) -> None:
    """Rows that hold only measurements, and no plain decoding, are drawn without a dashed line."""
    only = Interval(estimate=50.0, low=49.0, high=52.0)
    rows = [ChartRow(setup_name="ngram k=1", group="ngram", forecast=None, measured=only, speedup=0.9)]
    bar_chart(rows, tmp_path / "chart.svg", title="Speed")
    comments = re.findall(r"<!-- (.*?) -->", (tmp_path / "chart.svg").read_text())
    assert "0.90×" in comments
    assert not {"plain decoding", "forecast"} & set(comments)


def test_chart_shows_a_dollar(tmp_path: Path) -> None:
    """Dollars in a draft's name are not the start of a formula, which would fail to parse."""
    rows = [chart_row("plain", 0, 1.0, confirmed=False), chart_row("$draft_{$", 4, 1.1, confirmed=False)]
    bar_chart(rows, tmp_path / "chart.svg", title="Speed of $x_{$")
    comments = re.findall(r"<!-- (.*?) -->", (tmp_path / "chart.svg").read_text())
    assert {"$draft_{$", "Speed of $x_{$"} <= set(comments)


def test_chart_refusals(tmp_path: Path) -> None:
    """No rows, a row without figures, another suffix and a missing folder are one-line errors."""
    row = chart_row("plain", 0, 1.0, confirmed=False)
    with pytest.raises(InputError, match=r"chart\.png: there is no setup to draw"):
        bar_chart([], tmp_path / "chart.png", title="")
    with pytest.raises(InputError, match=r"chart\.pdf: the suffixes \.png and \.svg are allowed"):
        bar_chart([row], tmp_path / "chart.pdf", title="")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        bar_chart([row], tmp_path / "missing" / "chart.png", title="")
    with pytest.raises(InputError, match="setup 'x' has neither a forecast nor a measurement"):
        ChartRow(setup_name="x", group="x", forecast=None, measured=None, speedup=1.0)
