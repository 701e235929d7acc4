"""The report: one HTML file that opens without a network, or the bar chart as a picture.

Both are drawn from report data alone. The template holds text and style; this module fills it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from profiles.records.core import Interval
from profiles.records.errors import InputError
from tuner.policy.estimates import Forecast, Measured
from tuner.policy.policy import Choice
from tuner.policy.query import MIXED
from tuner.report import charts
from tuner.report.data import Candidate, LoadFigures, PointFigures, ReportData
from tuner.report.tables import crossover_sentence

PUBLISHED = Path(__file__).with_name("published_figure.svg")  # drawn by tests.benchmarks.published_figure
PAGES = (".html", ".htm")
LABEL_LENGTH = 40  # characters of a label in the forest plot; names in full stand in the tables
UNDECIDED = " From an earlier run: this run ended before it could decide."
OPERATING_POINT = {"batch": "batch_size", "context": "context_length", "temperature": "temperature"}


def write(report_data: ReportData, path: str | Path) -> None:
    """The page (.html, .htm), or the bar chart of the first operating point as a picture (.png, .svg).

    Raises InputError: another suffix, no setup to draw a picture of, or a file that cannot be written.
    """
    path = Path(path)
    suffix, allowed = path.suffix.lower(), (*PAGES, *charts.SUFFIXES)
    if suffix not in allowed:
        raise InputError(f"report {path}: the suffixes {', '.join(allowed)} are allowed")
    headline = report_data.points[0]
    point = f"{report_data.environment.device}, {_operating_point(headline.choice)}"
    try:
        if suffix in PAGES:
            path.write_text(_page(report_data, point), encoding="utf-8")
        else:
            title = f"{report_data.target.name}: output tokens per second\n{point}, prompts of all domains"
            charts.bar_chart(chart_rows(headline), path, title=title)
    except OSError as error:
        raise InputError(f"report {path} cannot be written: {error.strerror}") from error


def _page(report_data: ReportData, point: str) -> str:
    choices = [*(figures.choice for figures in report_data.points), *report_data.standing]
    varied = [name for name, key in OPERATING_POINT.items() if len({getattr(choice, key) for choice in choices}) > 1]

    def title(choice: Choice) -> str:
        """The domain, and what else sets the operating point apart from the others."""
        parts = [f"{name} {getattr(choice, OPERATING_POINT[name]):g}" for name in varied]
        return ", ".join([_domain(choice.domain), *parts])

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = {"interval": _interval, "measured": _measured, "number": "{:,}".format, "seconds": _seconds}
    environment.filters |= {**filters, "setup": _setup, "title": title}
    content = _content(report_data, title) | {"operating_point": point, "crossover": crossover_sentence(choices)}
    return environment.get_template("page.html.jinja").render(content)


def chart_rows(point: PointFigures) -> list[Candidate]:
    """Every candidate with a figure, drafts by their best forecast, then by length."""
    names = [candidate.draft_name for candidate in point.candidates]
    ordered = sorted(point.candidates, key=lambda row: (names.index(row.draft_name), row.length))
    return [row for row in ordered if row.forecast_tok_per_s is not None and row.forecast_speedup is not None]


def _content(report_data: ReportData, title: Callable[[Choice], str]) -> dict[str, Any]:
    """What the template fills in; pictures are markup, everything else is escaped there."""
    points, colours = report_data.points, _colours(report_data)
    standing = [(choice, " From an earlier run.") for choice in report_data.standing]
    candidates = [candidate for point in points for candidate in point.candidates]
    drawn = dict.fromkeys(candidate.draft_name for candidate in candidates if candidate.forecast_speedup)
    plain = [candidate for candidate in points[0].candidates if candidate.draft_name == "plain"]
    noises = [point.noise for point in points if point.noise is not None]
    return {
        "report": report_data,
        "headline": points[0].choice,
        "choices": [*((point.choice, UNDECIDED if point.from_earlier else "") for point in points), *standing],
        "feasible": all(candidate.state != "infeasible" for candidate in plain),
        "variables": charts.VARIABLES,
        "key": {name: charts.VARIABLES[colours[name]] for name in drawn if name != "plain"},
        "speedups": _speedups(points, colours, title),
        "scatter": _scatter(points, colours),
        "loads": [_load(index, load, colours) for index, load in enumerate(report_data.loads)],
        "noises": [f"{noise:+.1%}" for noise in noises],
        "proofs": [point.choice.measured for point in points if point.choice.measured is not None],
        "environment": asdict(report_data.environment),
        "published": Markup(PUBLISHED.read_text(encoding="utf-8")),  # noqa: S704  it ships
    }


def _colours(report_data: ReportData) -> dict[str, str]:
    """A colour for every draft the report names; those with curves of their own go first, so that theirs differ."""
    names = [component.name for draft in report_data.drafts for component in draft.components]
    names += [candidate.draft_name for point in report_data.points for candidate in point.candidates]
    subjects = [_subject(point.choice) for point in report_data.points]  # an earlier run's draft may be gone
    return charts.hues(names + [row.setup.draft.name for row in subjects if row and row.setup.draft])


def _subject(choice: Choice) -> Measured | Forecast | None:
    """The best figure of the chosen setup, or of the one that came closest."""
    return choice.measured or choice.forecast


def _speedups(points: Sequence[PointFigures], colours: dict[str, str], title: Callable[[Choice], str]) -> Markup | None:
    """The forest plot: of every operating point the setup that was measured, or the best forecast."""
    rows = []
    for point in points:
        subject = _subject(point.choice)
        if subject is not None and subject.setup.draft is not None:
            label = f"{title(point.choice)}: {subject.setup.name}"
            label = label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…"
            rows.append((label, subject.speedup, point.choice.measured is not None, colours[subject.setup.draft.name]))
    return charts.speedups("speedups", rows) if rows else None


def _scatter(points: Sequence[PointFigures], colours: dict[str, str]) -> Markup | None:
    """Every setup that really ran: the proof's speed-up, else the race's, which has no interval."""
    dots = []
    for candidate in (candidate for point in points for candidate in point.candidates):
        measured = candidate.measured_speedup
        if measured is None and (raced := candidate.race_speedup) is not None:
            measured = Interval(estimate=raced, low=raced, high=raced)
        if candidate.forecast_speedup is not None and measured is not None:
            dots.append((candidate.forecast_speedup, measured, colours[candidate.draft_name]))
    return charts.forecast_against_measured("scatter", dots) if dots else None


def _load(index: int, load: LoadFigures, colours: dict[str, str]) -> dict[str, Any]:
    """The panels of one load, as (heading, picture)."""
    every = chart_rows(load.points[0])
    bars = [
        (draft, charts.rate_bars(f"bars-{index}-{number}", rows, colours[draft], every))
        for number, (draft, rows) in enumerate(charts.by_draft(every).items())
        if rows
    ]
    curves = []
    for number, domain in enumerate(dict.fromkeys(curve.domain for curve in load.curves)):
        of_domain = [curve for curve in load.curves if curve.domain == domain]
        heading = f"{_domain(domain)}, {max(curve.num_prompts for curve in of_domain)} prompts"
        curves.append((heading, charts.acceptance(f"acceptance-{index}-{number}", of_domain, colours)))
    steps = []
    for number, curve in enumerate(load.step_time_curves):
        hue = colours["plain" if curve.kind == "target" else curve.name]
        steps.append((curve.name, charts.step_times(f"steps-{index}-{number}", curve, hue)))
    return {
        "operating_point": _operating_point(load.points[0].choice),
        "plain": next((row.known_tok_per_s for row in every if row.draft_name == "plain"), None),
        "stopped": load.points[0].stopped,
        "bars": bars,
        "curves": curves,
        "steps": steps,
        "whole_rounds": any(curve.kind == "round" for curve in load.step_time_curves),
        "disturbed": [curve.name for curve in load.step_time_curves if curve.disturbed],
    }


def _domain(name: str) -> str:
    return "all domains" if name == MIXED else name


def _operating_point(choice: Choice) -> str:
    sampled = "" if choice.temperature == 0.0 else f", top-p {choice.top_p:g}, top-k {choice.top_k}"
    where = f"batch {choice.batch_size}, context {choice.context_length}"
    return f"{where}, temperature {choice.temperature:g}{sampled}"


def _setup(choice: Choice) -> str:
    return "plain decoding" if choice.setup.draft is None else choice.setup.name


def _measured(choice: Choice) -> Measured | None:
    """The proof of the chosen setup; a loser's figures stand in the reason."""
    return choice.figures if isinstance(choice.figures, Measured) else None


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval:.2f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "\N{EN DASH}"
    text = f"{seconds * 1e3:.3g} ms" if abs(seconds) >= 1e-3 else f"{seconds * 1e6:.3g} µs"
    return text.replace("-", "\N{MINUS SIGN}")  # the calibrated rest of a round can come out below 0
