"""The report page: complete, self-contained, escaped, light and dark; made of report data alone."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from profiles.records.core import PLAIN, Draft, Model, digest_of
from profiles.records.errors import InputError
from tests.support.fakes import DRAFT_A, GREEDY, MACHINE, TARGET, FakeEngine, prompts
from tests.support.policies import CREATED
from tuner.pipeline.pipeline import Tuner, Watch
from tuner.pipeline.trial import Options
from tuner.policy.policy import Policy
from tuner.report.build import report_data
from tuner.report.data import ReportData
from tuner.report.explain import accounts_of
from tuner.report.page import write

NASTY = "<script>alert('x')</script> & \"d$a_1$\""
NASTY_DOMAIN = "<b>$law$</b> & 法律"
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Every element with its attributes, and whether all are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(" ".join(data.split()))


def report_data_of(engine: FakeEngine, *, domain: str = "prose", watch: Watch | None = None) -> ReportData:
    load = (*prompts(48, "code"), *prompts(48, domain))
    outcome = Tuner(engine, Options(lengths=(1, 2, 3)), watch).tune([(GREEDY, load)])
    return report_data(outcome, Policy(created=CREATED, target=TARGET, environment=MACHINE, choices=outcome.choices))


def written(made: ReportData, folder: Path) -> str:
    write(made, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made() -> ReportData:
    return report_data_of(FakeEngine(keep=0.9))


@pytest.fixture(scope="module")
def page(made: ReportData, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(made, tmp_path_factory.mktemp("page"))


def test_the_decision_comes_first(made: ReportData, page: str) -> None:
    """The first heading names the setup, and its speed-up with the interval stands under it."""
    words = [word for word in Reader(page).words if word]
    choice = made.points[0].choice
    speedup = choice.measured.speedup
    at = words.index(f"Decode with {choice.setup.name}")
    assert "proven" in words[at + 1]
    assert words[at + 2] == f"{speedup.estimate:.2f} times"
    assert f"{speedup.low:.2f} to {speedup.high:.2f}" in words[at + 3]
    assert choice.reason in words


def test_every_section_is_there(made: ReportData, page: str) -> None:
    """Choices, candidates with states and reasons, acceptance, the environment and the limits."""
    reader = Reader(page)
    for heading in (
        "Choices and reasons",
        "Every candidate",
        "Acceptance by position",
        "Models and machine",
        "What the intervals cover",
    ):
        assert heading in reader.words
    for point in made.points:
        assert point.choice.reason in reader.words
        for one in point.candidates:
            assert {one.setup_name, one.reason, one.state} <= set(reader.words)
    assert {"fake cpu", "2.13.0", "8,589,934,592", "fake-target, 8,000,000 parameters, float32"} <= set(reader.words)


def test_candidates_have_bars_and_the_rounds_of_explain(made: ReportData, page: str) -> None:
    """A pale bar of each forecast, a full one of the proof, and the figures of a round as `explain` prints them."""
    elements = [(tag, str(attributes.get("class"))) for tag, attributes in Reader(page).elements]
    candidates = [candidate for point in made.points for candidate in point.candidates]
    assert elements.count(("div", "bar forecast")) == len(candidates)
    measured = [candidate for candidate in candidates if candidate.measured_speedup]
    assert elements.count(("div", "bar measured")) == len(measured) > 0
    widths = [float(width) for width in re.findall(r"<i style=\"width: ([\d.-]+)%", page)]
    assert all(0.0 < width <= 100.0 for width in widths)
    cells = [" ".join(cell.split()) for cell in re.findall(r'data-name="needed">(.*?)</td>', page)]
    needed = [f"{account.break_even_length:.2f}" for point in made.points for account in accounts_of(point).values()]
    assert cells == needed


def test_nothing_is_fetched(page: str) -> None:
    """No address, no script, style sheet or picture file."""
    assert not re.search(r"\w+://|@import|<link|<script|<img|<iframe|\bsrc=|url\(", page)


def test_light_and_dark(page: str) -> None:
    """Colours are variables of the style sheet, and the dark scheme sets each one again."""
    light, dark = re.search(r":root \{(.*?)\}.*?prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", page, re.S).groups()  # type: ignore[union-attr]
    names = set(re.findall(r"(--[\w-]+):", light))
    assert names == set(re.findall(r"(--[\w-]+):", dark))
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) == names
    assert not re.findall(r"#[0-9a-f]{6}", page.partition("* { box-sizing")[2])


def test_names_are_escaped(tmp_path: Path) -> None:
    """Names of models and domains come from users: they are shown as they are spelled, and are never markup or math."""
    named = Draft(kind="model", model=Model(name=NASTY, dtype="float32", digest=digest_of("draft-a"), num_params=5))
    assert named.digest == DRAFT_A.digest
    engine = FakeEngine(keep=0.9)
    engine.drafts = (named,)
    text = written(report_data_of(engine, domain=NASTY_DOMAIN), tmp_path)
    reader = Reader(text)
    assert not {"script", "b"} & {tag for tag, _ in reader.elements}
    assert {NASTY, f"{NASTY} k=1"} <= set(reader.words)
    assert any(word.startswith(NASTY_DOMAIN) for word in reader.words)


def test_plain_decoding_is_said_plainly(tmp_path: Path) -> None:
    """Where nothing is proven the heading says so and no speed-up is claimed."""
    engine = FakeEngine(keep=0.0)
    engine.drafts = (DRAFT_A,)
    made = report_data_of(engine)
    words = [word for word in Reader(written(made, tmp_path)).words if word]
    at = words.index("Decode plainly")
    assert words[at + 1] == "no draft is proven"
    assert words[at + 2] == made.points[0].choice.reason
    assert made.points[0].choice.setup == PLAIN


def test_a_run_without_evidence(tmp_path: Path) -> None:
    """A budget that ended at once leaves a page without candidates that says why."""
    made = report_data_of(FakeEngine(), watch=Watch(out_of_time=lambda: True))
    text = written(made, tmp_path)
    assert "Nothing was forecast: the budget ended before anything could be compared, after loading: give more." in text


def test_several_loads(made: ReportData, tmp_path: Path) -> None:
    """Each load has its own tables, titles tell what differs."""
    warm = replace(
        made.loads[0],
        points=tuple(replace(point, choice=replace(point.choice, temperature=0.7)) for point in made.loads[0].points),
    )
    reader = Reader(written(replace(made, loads=(made.loads[0], warm)), tmp_path))
    assert {"code, temperature 0", "code, temperature 0.7"} <= set(reader.words)
    assert reader.words.count("Acceptance by position") == 2


def test_pages_repeat(made: ReportData, page: str, tmp_path: Path) -> None:
    """The same report data, also after its JSON form, gives the same bytes: no time of drawing, no random ids."""
    assert written(ReportData.from_json(made.to_json()), tmp_path) == page


def test_the_page_stays_small(page: str) -> None:
    """Tables of 21 candidates are under 60 KiB."""
    assert len(page.encode()) < 60 * 1024


def test_page_refusals(made: ReportData, tmp_path: Path) -> None:
    """Another suffix and a missing folder are one-line errors."""
    with pytest.raises(InputError, match=r"report .*report\.png: it is a page, the suffixes \.html, \.htm are allowed"):
        write(made, tmp_path / "report.png")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        write(made, tmp_path / "missing" / "report.html")
