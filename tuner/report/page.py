"""The report: one HTML file that opens without a network, and the bar chart as a picture.

Both are drawn from report data alone. The template holds text and style; this module fills it.
"""

from collections.abc import Sequence
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
from tuner.report import charts, pictures
from tuner.report.charts import ChartRow
from tuner.report.data import LoadFigures, PointFigures, ReportData
from tuner.report.tables import crossover_sentence

PAGES = (".html", ".htm")
LABEL_LENGTH = 40  # characters of a label in the forest plot; names in full stand in the tables
OPERATING_POINT = {"batch": "batch_size", "context": "context_length", "temperature": "temperature"}


def write(report_data: ReportData, path: str | Path) -> None:
    """The page (.html, .htm), or the bar chart of the first anchor as a picture (.png, .svg).

    Raises InputError: another suffix, no setup to draw a picture of, or a file that cannot be written.
    """
    path = Path(path)
    suffix, allowed = path.suffix.lower(), (*PAGES, *charts.SUFFIXES)
    if suffix not in allowed:
        raise InputError(f"report {path}: the suffixes {', '.join(allowed)} are allowed")
    if suffix in PAGES:
        _write_page(report_data, path)
    else:
        _write_picture(report_data, path)


def _write_page(report_data: ReportData, path: Path) -> None:
    """One self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"interval": _interval, "seconds": _seconds, "number": "{:,}".format}
    page = environment.get_template("page.html.jinja").render(_content(report_data))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"page {path} cannot be written: {error.strerror}") from error


def _write_picture(report_data: ReportData, path: Path) -> None:
    headline = report_data.points[0]
    subtitle = f"{report_data.environment.device}, {_operating_point(headline.choice)}, prompts of all domains"
    title = f"{report_data.target.name}: output tokens per second"
    charts.bar_chart(chart_rows(headline), path, title=title, subtitle=subtitle)


def chart_rows(point: PointFigures) -> list[ChartRow]:
    """A row for every candidate with a figure, drafts by their best forecast, then by length.

    The multiplier is the measured one where there is one.
    """
    names = [candidate.draft_name for candidate in point.candidates]
    rows = []
    for candidate in sorted(
        point.candidates, key=lambda candidate: (names.index(candidate.draft_name), candidate.length)
    ):
        if candidate.forecast_tok_per_s is None or candidate.forecast_speedup is None:
            continue
        row = ChartRow(
            setup_name=candidate.setup_name,
            group=candidate.draft_name,
            forecast=candidate.forecast_tok_per_s,
            measured=candidate.measured_tok_per_s,
            speedup=(candidate.measured_speedup or candidate.forecast_speedup).estimate,
        )
        rows.append(row)
    return rows


def _content(report_data: ReportData) -> dict[str, Any]:
    """What the template fills in; pictures are markup, everything else is escaped there."""
    points, hues = report_data.points, _hues(report_data)
    drawn = dict.fromkeys(
        candidate.draft_name for point in points for candidate in point.candidates if candidate.forecast_speedup
    )
    varied = _varied([*(point.choice for point in points), *report_data.standing])
    noises = [point.noise for point in points if point.noise is not None]
    measured = [point.choice.measured for point in points if point.choice.measured is not None]
    return {
        "report": report_data,
        "headline": _decision(points[0].choice, varied),
        "feasible": all(
            candidate.state != "infeasible" for candidate in points[0].candidates if candidate.draft_name == "plain"
        ),
        "operating_point": _operating_point(points[0].choice),
        "decisions": [{**_decision(point.choice, varied), "from_earlier": point.from_earlier} for point in points],
        "crossover": crossover_sentence([*(point.choice for point in points), *report_data.standing]),
        "standing": [_decision(choice, varied) for choice in report_data.standing],
        "key": [(name, pictures.css_variable(hues[name])) for name in drawn if name != "plain"],
        "speedups": _speedups(points, hues, varied),
        "scatter": _scatter(points, hues),
        "loads": [_load(index, load, hues) for index, load in enumerate(report_data.loads)],
        "tables": [
            {
                "title": _title(point.choice, varied),
                "point": point,
                "rows": [
                    {"candidate": candidate, "state": candidate.state.replace(" ", "-")}
                    for candidate in point.candidates
                ],
            }
            for point in points
        ],
        "environment": {name.replace("_", " "): value for name, value in asdict(report_data.environment).items()},
        "noises": [f"{noise:+.1%}" for noise in noises],
        "num_divergences": sum(candidate.num_divergences for candidate in measured),
        "num_disturbed": sum(candidate.num_disturbed for candidate in measured),
        "num_pairs": sum(candidate.num_prompts for candidate in measured),
    }


def _hues(report_data: ReportData) -> dict[str, str]:
    """A colour for every draft the report names; those with curves of their own go first, so that theirs differ."""
    names = [part.name for draft in report_data.drafts for part in draft.components]
    names += [candidate.draft_name for point in report_data.points for candidate in point.candidates]
    subjects = [_subject(point.choice) for point in report_data.points]  # an earlier run's draft may be gone
    names += [
        candidate.setup.draft.name
        for candidate in subjects
        if candidate is not None and candidate.setup.draft is not None
    ]
    return pictures.PAGE.hues(names)


def _subject(choice: Choice) -> Measured | Forecast | None:
    """The best figure of the chosen setup, or of the one that came closest."""
    return choice.measured or choice.forecast


def _decision(choice: Choice, varied: Sequence[str]) -> dict[str, Any]:
    """A choice, with the figures of the chosen setup only: a loser's stand in the reason."""
    measured = choice.measured if choice.measured is not None and choice.measured.setup == choice.setup else None
    return {
        "title": _title(choice, varied),
        "setup": "plain decoding" if choice.setup.draft is None else choice.setup.name,
        "drafts": choice.setup.draft is not None,
        "speedup": measured.speedup if measured else None,
        "end_to_end": measured.end_to_end if measured else None,
        "rate": measured.tok_per_s if measured else None,
        "num_prompts": measured.num_prompts if measured else None,
        "proven": choice.proven,
        "reason": choice.reason,
    }


def _speedups(points: Sequence[PointFigures], hues: dict[str, str], varied: Sequence[str]) -> Markup | None:
    """The forest plot: of every anchor the setup that was measured, or the best forecast."""
    rows = []
    for point in points:
        subject = _subject(point.choice)
        if subject is not None and subject.setup.draft is not None:
            label = f"{_title(point.choice, varied)}: {subject.setup.name}"
            label = label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…"
            rows.append((label, subject.speedup, point.choice.measured is not None, hues[subject.setup.draft.name]))
    return _safe(pictures.speedups("speedups", rows)) if rows else None


def _scatter(points: Sequence[PointFigures], hues: dict[str, str]) -> Markup | None:
    """Every setup that really ran: the proof's speed-up, else the race's, which has no interval."""
    dots = []
    for candidate in (candidate for point in points for candidate in point.candidates):
        measured = candidate.measured_speedup
        if measured is None and (raced := candidate.race_speedup) is not None:
            measured = Interval(estimate=raced, low=raced, high=raced)
        if candidate.forecast_speedup is not None and measured is not None:
            dots.append((candidate.forecast_speedup, measured, hues[candidate.draft_name]))
    return _safe(pictures.forecast_against_measured("scatter", dots)) if dots else None


def _load(index: int, load: LoadFigures, hues: dict[str, str]) -> dict[str, Any]:
    """The panels of one load, as (heading, picture); plain decoding has its own bar only where nothing else has."""
    every = chart_rows(load.points[0])
    bars = []
    for number, draft in enumerate(dict.fromkeys(row.group for row in every if row.group != "plain") or ["plain"]):
        if rows := [row for row in every if row.group == draft]:
            bars.append((draft, _safe(pictures.rate_bars(f"bars-{index}-{number}", rows, hues[draft], every))))
    curves = []
    for number, domain in enumerate(dict.fromkeys(curve.domain for curve in load.curves)):
        domain_curves = [curve for curve in load.curves if curve.domain == domain]
        heading = f"{_domain(domain)}, {max(curve.num_prompts for curve in domain_curves)} prompts"
        curves.append((heading, _safe(pictures.acceptance(f"kept-{index}-{number}", domain_curves, hues))))
    widths = []
    for number, part in enumerate(load.step_time_curves):
        hue = hues["plain" if part.kind == "target" else part.name]
        widths.append((part.name, _safe(pictures.step_time_curve(f"stairs-{index}-{number}", part, hue))))
    return {
        "operating_point": _operating_point(load.points[0].choice),
        "plain": next((row.best_known for row in every if row.group == "plain"), None),
        "stopped": load.points[0].stopped,
        "bars": bars,
        "curves": curves,
        "widths": widths,
        "whole_rounds": any(part.kind == "round" for part in load.step_time_curves),
        "disturbed": [part.name for part in load.step_time_curves if part.disturbed],
    }


def _safe(picture: str) -> Markup:
    return Markup(picture)  # noqa: S704  matplotlib and ElementTree have escaped its text


def _domain(name: str) -> str:
    return "all domains" if name == MIXED else name


def _title(choice: Choice, varied: Sequence[str]) -> str:
    """The domain, and what else sets the anchor apart from the others."""
    return ", ".join(
        (_domain(choice.domain), *(f"{name} {getattr(choice, OPERATING_POINT[name]):g}" for name in varied))
    )


def _varied(choices: Sequence[Choice]) -> list[str]:
    return [name for name, field in OPERATING_POINT.items() if len({getattr(choice, field) for choice in choices}) > 1]


def _operating_point(choice: Choice) -> str:
    sampled = "" if choice.temperature == 0.0 else f", top-p {choice.top_p:g}, top-k {choice.top_k}"
    where = f"batch {choice.batch_size}, context {choice.context_length}"
    return f"{where}, temperature {choice.temperature:g}{sampled}"


def _interval(interval: Interval | None, digits: int = 2) -> str:
    return (
        ""
        if interval is None
        else f"{interval.estimate:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
    )


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "\N{EN DASH}"
    text = f"{seconds * 1e3:.3g} ms" if abs(seconds) >= 1e-3 else f"{seconds * 1e6:.3g} µs"
    return text.replace("-", "\N{MINUS SIGN}")  # the calibrated rest of a round can come out below 0
