"""The report: one HTML file that opens without a network, made of report data alone.

The template holds text and style; this module fills it.
"""

from dataclasses import asdict
from pathlib import Path

import jinja2

from profiles.records.core import Interval
from profiles.records.errors import InputError, require
from tuner.policy.estimates import Measured
from tuner.policy.policy import Choice
from tuner.policy.query import MIXED
from tuner.report.data import PointFigures, ReportData
from tuner.report.explain import ROUND_COLUMNS, accounts_of, round_cells
from tuner.report.tables import crossover_sentence

SUFFIXES = (".html", ".htm")
OPERATING_POINT = {"batch": "batch_size", "context": "context_length", "temperature": "temperature"}


def write(report_data: ReportData, path: str | Path) -> None:
    """Writes the page. Raises InputError: another suffix, or a file that cannot be written."""
    path = Path(path)
    is_page = path.suffix.lower() in SUFFIXES
    require(is_page, f"report {path}: it is a page, the suffixes {', '.join(SUFFIXES)} are allowed")
    try:
        path.write_text(_page(report_data), encoding="utf-8")
    except OSError as error:
        raise InputError(f"report {path} cannot be written: {error.strerror}") from error


def _page(report_data: ReportData) -> str:
    points = report_data.points
    choices = [figures.choice for figures in points]
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
    environment.filters |= {
        "domain": _domain, "interval": _interval, "measured": _measured, "number": "{:,}".format,
        "operating_point": _operating_point, "rounds": _rounds, "scale": _scale, "setup": _setup, "title": title,
    }  # fmt: skip
    plain = [candidate for candidate in points[0].candidates if candidate.draft_name == "plain"]
    return environment.get_template("page.html.jinja").render(
        report=report_data,
        headline=points[0].choice,
        choices=choices,
        feasible=all(candidate.state != "infeasible" for candidate in plain),
        crossover=crossover_sentence(choices),
        round_columns=ROUND_COLUMNS,
        noises=[f"{point.noise:+.1%}" for point in points if point.noise is not None],
        proofs=[point.choice.measured for point in points if point.choice.measured is not None],
        environment=asdict(report_data.environment),
    )


def _rounds(figures: PointFigures) -> dict[str, tuple[str, ...]]:
    """By setup the figures of its mean round, as `explain` shows them."""
    return {name: round_cells(account) for name, account in accounts_of(figures).items()}


def _scale(figures: PointFigures) -> float:
    """The speed-up at the right end of the bars of an operating point."""
    rows = [row for each in figures.candidates for row in (each.forecast_speedup, each.measured_speedup)]
    return max([1.0, *(row.high for row in rows if row is not None)])


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
