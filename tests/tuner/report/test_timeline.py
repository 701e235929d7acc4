"""The picture of a steered run: what its lines say, and that it draws any run, however short or plain."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from profiles.records.errors import InputError
from tuner.report.data import Span, Timeline
from tuner.report.pictures import PAGE
from tuner.report.timeline import WIDE_INCHES, smoothed, timeline

HUES = PAGE.hues(["draft-code", "ngram"])
PLAIN = Span(start_s=0.0, seconds=0.5, draft_name="plain", length=0, batch_size=2, tokens=2, domain="code")


def drawn(shown: Timeline, width_inches: float = WIDE_INCHES) -> ElementTree.Element:
    return ElementTree.fromstring(timeline("steered", shown, HUES, width_inches))


def words(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def run(num_rounds: int = 40) -> Timeline:
    """Half a second a round: plain decoding, then a draft with a probe of another, then a full batch."""
    spans = [replace(PLAIN, start_s=0.5 * number) for number in range(num_rounds)]
    for number in range(10, num_rounds):
        spans[number] = replace(spans[number], draft_name="draft-code", length=4, tokens=8, domain="<b> & $x$")
    spans[20] = replace(spans[20], draft_name="ngram", length=8)
    spans[30:] = [replace(span, batch_size=16, domain=None) for span in spans[30:]]
    flat = smoothed([replace(span, tokens=2) for span in spans])
    return Timeline(spans=tuple(spans), plain=flat, best_single=flat)


def test_rates_by_hand() -> None:
    """Two rounds of 2 tokens in half a second, a second's pause, then 8 tokens in half a second."""
    spans = [PLAIN, replace(PLAIN, start_s=0.5), replace(PLAIN, start_s=2.0, tokens=8)]
    assert smoothed(spans, 5) == ((0.25, 4.0), (0.75, 4.0), (1.25, 0.0), (1.75, 0.0), (2.25, pytest.approx(16.0)))


def test_no_token_is_lost_to_smoothing() -> None:
    """The line's mean over the run is its tokens per second."""
    shown = run()
    rates = [rate for _, rate in smoothed(shown.spans)]
    assert sum(rates) / len(rates) == pytest.approx(sum(span.tokens for span in shown.spans) / shown.end_s)


@pytest.mark.parametrize("width_inches", [3.6, WIDE_INCHES])
def test_it_says_what_is_drawn(width_inches: float) -> None:
    """Axes, lines and domains are named in text, for both widths."""
    found = words(drawn(run(), width_inches))
    assert {"tokens / s", "k", "batch", "seconds", "steered", "best single setup", "plain"} <= set(found)
    assert {"code", "<b> & $x$", "mixed"} <= set(found)


def test_colours_are_the_page_s() -> None:
    """Each draft by its hue, plain decoding by its own, and no colour that a style sheet cannot turn."""
    text = timeline("steered", run(), HUES)
    for variable in ("series-0", "series-1", "plain", "ink", "faint"):
        assert f"var(--{variable})" in text
    assert "#01fe" not in text


@pytest.mark.parametrize(
    "shown",
    [
        Timeline(spans=(PLAIN,)),
        Timeline(spans=(replace(PLAIN, draft_name="ngram", length=1, tokens=0),)),
        Timeline(spans=tuple(replace(PLAIN, start_s=0.5 * number, batch_size=1 + number) for number in range(3))),
    ],
)
def test_short_runs_are_drawn(shown: Timeline) -> None:
    """One round, no token, plain decoding alone: lines that are not there are not in the legend."""
    found = words(drawn(shown))
    assert "steered" in found
    assert "best single setup" not in found


def test_many_switches_stay_small() -> None:
    """Ten thousand rounds that switch now and then make a picture of tens of kilobytes, not megabytes."""
    spans = [replace(PLAIN, start_s=0.5 * number) for number in range(10_000)]
    for number in range(0, 10_000, 100):
        spans[number] = replace(spans[number], draft_name="ngram", length=3)
    assert len(timeline("steered", Timeline(spans=tuple(spans)), HUES)) < 100_000


@pytest.mark.parametrize("spans", [(), (replace(PLAIN, seconds=0.0),)])
def test_no_rounds_are_refused(spans: tuple[Span, ...]) -> None:
    """In one line."""
    with pytest.raises(InputError, match=r"^a timeline needs rounds that took time; there are none$"):
        drawn(Timeline(spans=spans))
