"""The report: one HTML file that opens without a network, and the bar chart as a picture.

Both are drawn from a dossier alone. The template holds the words and the style; here figures become what it shows.
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
from tuner.report.data import AnchorFigures, LoadFigures, ReportData
from tuner.report.tables import crossover_sentence

PAGES = (".html", ".htm")
LABEL_LENGTH = 40  # characters of a label in the forest plot; names in full stand in the tables
ANCHOR = {"batch": "batch_size", "context": "context_length", "temperature": "temperature"}


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
    headline = report_data.anchors[0]
    subtitle = f"{report_data.environment.device}, {_place(headline.choice)}, prompts of all domains"
    title = f"{report_data.target.name}: output tokens per second"
    charts.bar_chart(chart_rows(headline), path, title=title, subtitle=subtitle)


def chart_rows(anchor: AnchorFigures) -> list[ChartRow]:
    """A row for every candidate with a figure, drafts by their best forecast, then by length.

    The multiplier is the measured one where there is one.
    """
    names = [one.draft_name for one in anchor.candidates]
    rows = []
    for one in sorted(anchor.candidates, key=lambda one: (names.index(one.draft_name), one.length)):
        if one.forecast_tok_per_s is None or one.forecast_speedup is None:
            continue
        row = ChartRow(
            setup_name=one.setup_name,
            group=one.draft_name,
            forecast=one.forecast_tok_per_s,
            measured=one.measured_tok_per_s,
            speedup=(one.measured_speedup or one.forecast_speedup).estimate,
        )
        rows.append(row)
    return rows


def _content(report_data: ReportData) -> dict[str, Any]:
    """What the template fills in; pictures are markup, everything else is escaped there."""
    anchors, hues = report_data.anchors, _hues(report_data)
    drawn = dict.fromkeys(one.draft_name for anchor in anchors for one in anchor.candidates if one.forecast_speedup)
    varied = _varied([*(anchor.choice for anchor in anchors), *report_data.standing])
    noises = [anchor.noise for anchor in anchors if anchor.noise is not None]
    measured = [anchor.choice.measured for anchor in anchors if anchor.choice.measured is not None]
    return {
        "dossier": report_data,
        "headline": _decision(anchors[0].choice, varied),
        "feasible": all(one.state != "infeasible" for one in anchors[0].candidates if one.draft_name == "plain"),
        "place": _place(anchors[0].choice),
        "decisions": [{**_decision(anchor.choice, varied), "from_earlier": anchor.from_earlier} for anchor in anchors],
        "crossover": crossover_sentence([*(anchor.choice for anchor in anchors), *report_data.standing]),
        "standing": [_decision(choice, varied) for choice in report_data.standing],
        "key": [(name, pictures.css_variable(hues[name])) for name in drawn if name != "plain"],
        "speedups": _speedups(anchors, hues, varied),
        "scatter": _scatter(anchors, hues),
        "loads": [_load(index, load, hues) for index, load in enumerate(report_data.loads)],
        "tables": [
            {
                "title": _title(anchor.choice, varied),
                "anchor": anchor,
                "rows": [{"one": one, "state": one.state.replace(" ", "-")} for one in anchor.candidates],
            }
            for anchor in anchors
        ],
        "environment": {name.replace("_", " "): value for name, value in asdict(report_data.environment).items()},
        "noises": [f"{noise:+.1%}" for noise in noises],
        "num_divergences": sum(one.num_divergences for one in measured),
        "num_disturbed": sum(one.num_disturbed for one in measured),
        "num_pairs": sum(one.num_prompts for one in measured),
    }


def _hues(report_data: ReportData) -> dict[str, str]:
    """A colour for every draft the report names; those with curves of their own go first, so that theirs differ."""
    names = [part.name for draft in report_data.drafts for part in draft.components]
    names += [one.draft_name for anchor in report_data.anchors for one in anchor.candidates]
    subjects = [_subject(anchor.choice) for anchor in report_data.anchors]  # an earlier run's draft may be gone
    names += [one.setup.draft.name for one in subjects if one is not None and one.setup.draft is not None]
    return pictures.PAGE.hues(names)


def _subject(choice: Choice) -> Measured | Forecast | None:
    """What is best known of the setup that was chosen, or that came closest to it."""
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


def _speedups(anchors: Sequence[AnchorFigures], hues: dict[str, str], varied: Sequence[str]) -> Markup | None:
    """The forest plot: of every anchor the setup that was measured, or the best forecast."""
    rows = []
    for anchor in anchors:
        known = _subject(anchor.choice)
        if known is not None and known.setup.draft is not None:
            label = f"{_title(anchor.choice, varied)}: {known.setup.name}"
            label = label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…"
            rows.append((label, known.speedup, anchor.choice.measured is not None, hues[known.setup.draft.name]))
    return _safe(pictures.speedups("speedups", rows)) if rows else None


def _scatter(anchors: Sequence[AnchorFigures], hues: dict[str, str]) -> Markup | None:
    """Every setup that really ran: the proof's speed-up, else the race's, which has no interval."""
    points = []
    for one in (one for anchor in anchors for one in anchor.candidates):
        measured = one.measured_speedup
        if measured is None and (raced := one.race_speedup) is not None:
            measured = Interval(estimate=raced, low=raced, high=raced)
        if one.forecast_speedup is not None and measured is not None:
            points.append((one.forecast_speedup, measured, hues[one.draft_name]))
    return _safe(pictures.forecast_against_measured("scatter", points)) if points else None


def _load(index: int, load: LoadFigures, hues: dict[str, str]) -> dict[str, Any]:
    """The panels of one load, as (heading, picture); plain decoding has its own bar only where nothing else has."""
    every = chart_rows(load.anchors[0])
    bars = []
    for number, draft in enumerate(dict.fromkeys(row.group for row in every if row.group != "plain") or ["plain"]):
        if rows := [row for row in every if row.group == draft]:
            bars.append((draft, _safe(pictures.rate_bars(f"bars-{index}-{number}", rows, hues[draft], every))))
    curves = []
    for number, domain in enumerate(dict.fromkeys(curve.domain for curve in load.curves)):
        own = [curve for curve in load.curves if curve.domain == domain]
        heading = f"{_domain(domain)}, {max(curve.num_prompts for curve in own)} prompts"
        curves.append((heading, _safe(pictures.acceptance(f"kept-{index}-{number}", own, hues))))
    stairs = []
    for number, part in enumerate(load.staircases):
        hue = hues["plain" if part.kind == "target" else part.name]
        stairs.append((part.name, _safe(pictures.staircase(f"stairs-{index}-{number}", part, hue))))
    return {
        "place": _place(load.anchors[0].choice),
        "plain": next((row.best_known for row in every if row.group == "plain"), None),
        "stopped": load.anchors[0].stopped,
        "bars": bars,
        "curves": curves,
        "stairs": stairs,
        "whole_rounds": any(part.kind == "round" for part in load.staircases),
        "disturbed": [part.name for part in load.staircases if part.disturbed],
    }


def _safe(picture: str) -> Markup:
    return Markup(picture)  # noqa: S704  matplotlib and ElementTree have escaped its text


def _domain(name: str) -> str:
    return "all domains" if name == MIXED else name


def _title(choice: Choice, varied: Sequence[str]) -> str:
    """The domain, and what else sets the anchor apart from the others."""
    return ", ".join((_domain(choice.domain), *(f"{name} {getattr(choice, ANCHOR[name]):g}" for name in varied)))


def _varied(choices: Sequence[Choice]) -> list[str]:
    return [name for name, field in ANCHOR.items() if len({getattr(choice, field) for choice in choices}) > 1]


def _place(choice: Choice) -> str:
    sampled = "" if choice.temperature == 0.0 else f", top-p {choice.top_p:g}, top-k {choice.top_k}"
    where = f"batch {choice.batch_size}, context {choice.context_length}"
    return f"{where}, temperature {choice.temperature:g}{sampled}"


def _interval(known: Interval | None, digits: int = 2) -> str:
    return "" if known is None else f"{known.estimate:.{digits}f} ({known.low:.{digits}f} to {known.high:.{digits}f})"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "\N{EN DASH}"
    text = f"{seconds * 1e3:.3g} ms" if abs(seconds) >= 1e-3 else f"{seconds * 1e6:.3g} µs"
    return text.replace("-", "\N{MINUS SIGN}")  # the calibrated rest of a round can come out below 0
