"""The published figure that started the project, beside a plan: `python -m tests.benchmarks.published_figure`.

The acceptance of each pair is stated in data/published_figure.json from other published values, before the bars are
looked at; a value fitted to a bar is printed as such and is no forecast. `--write` saves what the report and the docs
draw. The last line is one JSON document.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from profiles.records.core import Interval
from tests.benchmarks.common import finish
from tests.benchmarks.plan import DATA, implied_rate, read_rows
from tuner.plan.acceptance import rate_of
from tuner.plan.plan import PlanQuery, make_plan
from tuner.plan.shape import read_data
from tuner.report import charts

CONTEXT = 1000  # tokens of the figure's prompts
FIGURE = Path(charts.__file__).with_name("published_figure.svg")
DOCS = Path(__file__).parents[2] / "docs" / "published-figure.svg"


def stated_rates(figure: dict[str, Any]) -> dict[tuple[str, str], float]:
    """One acceptance rate per pair; those of a published speed-up are what the step-time model makes of it."""
    rows = {row["row"]: row for row in read_rows()}
    rates = {}
    for bar in figure["bars"]:
        if bar["draft"] is None:
            continue
        stated = bar["acceptance"]
        implied = [
            implied_rate({**rows[row], "speedup": rows[row]["speedup"] / share})
            for row, share in stated.get("speedups", ())
        ]
        values = [*stated.get("values", ()), *implied]
        rates[bar["target"], bar["draft"]] = round(sum(values) / len(values), 2)
    return rates


def forecast(bar: dict[str, Any], rate: float, engine: str = "exllamav2", lengths: tuple[int, ...] = (4,)) -> Any:
    """The plan's setups of one bar's pair."""
    hardware = f"H800x{bar['devices']}"
    dtype = "gptq-int4"
    query = PlanQuery(
        target=bar["target"], drafts=[f"{bar['draft']}@{dtype}"], hardware=hardware, engine=engine, dtype=dtype,
        context=CONTEXT, lengths=lengths, acceptance=f"{rate:.4f}",
    )  # fmt: skip
    return make_plan(query)


def fitted_rate(bar: dict[str, Any], cost: float) -> float | None:
    """The rate per token at which a round of this cost gives the bar; None: no rate does."""
    tokens = bar["speedup"] * cost
    return round(rate_of(tokens, 4), 3) if 1.0 <= tokens <= 5.0 else None


def plan_bars(figure: dict[str, Any], rates: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Every bar with its forecast, and the acceptance that would give the bar, which is no forecast of it."""
    rows = []
    for bar in figure["bars"]:
        row = {"target": bar["target"], "draft": bar["draft"], "published": bar["speedup"], "forecast": None}
        if bar["draft"] is not None:
            rate = rates[bar["target"], bar["draft"]]
            [setup] = forecast(bar, rate)["setups"]
            row |= {"forecast": setup["speedup"], "acceptance": rate}
            row |= {name: setup[name] for name in ("low", "high", "cost", "break_even")}
            row |= {"fitted_acceptance": fitted_rate(bar, setup["cost"])}
            row["inside"] = setup["low"] <= bar["speedup"] <= setup["high"]
        rows.append(row)
    return rows


def drawn_figures(rows: list[dict[str, Any]], curves: dict[str, Any]) -> dict[str, Any]:
    """What the report draws."""
    names = ("target", "draft", "published", "forecast", "low", "high")
    return {
        "title": "Published bars, and the plan with its 90 % interval",
        "lengths_title": "The plan of 70B with 1B, by length",
        "bars": [{name: row.get(name) for name in names} for row in rows],
        "lengths": {engine: [row[:2] for row in rows] for engine, rows in curves.items()},
    }


@rc_context(charts.STYLE)
def draw(figures: Mapping[str, Any]) -> None:
    """The published bars with a plan and its 90 % interval beside each, and that plan by length on two engines."""
    figure = Figure(figsize=(2.6 * charts.PANEL_INCHES, 3.4))
    bars, lengths = figure.subplots(1, 2, width_ratios=(3, 2))
    drafts = list(dict.fromkeys(row["draft"] for row in figures["bars"]))
    for index, row in enumerate(figures["bars"]):
        hue = charts.PLAIN if row["draft"] is None else charts.SERIES[drafts.index(row["draft"]) - 1]
        bars.bar(index, row["published"], 0.5, color=hue)
        bars.annotate(f"{row['published']:.2f}×", (index, row["published"]), ha="center", va="bottom")
        if row["forecast"] is not None:
            planned = Interval(estimate=row["forecast"], low=row["low"], high=row["high"])
            bars.errorbar(index + 0.36, planned.estimate, yerr=charts._reach([planned]), fmt="D")
            bars.annotate(
                f"{planned.estimate:.2f}×", (index + 0.36, planned.high + 0.03), ha="center", fontstyle="italic"
            )
    sizes = [[(row[model] or "plain").rpartition("-")[2] for model in ("target", "draft")] for row in figures["bars"]]
    bars.set_xticks(range(len(sizes)), ["\n".join(pair) for pair in sizes])
    bars.set(title=figures["title"], ylabel="times as fast as plain decoding")
    bars.axhline(1.0, **charts.PLAIN_LINE)
    bars.grid(visible=False, axis="x")
    for number, (engine, rows) in enumerate(figures["lengths"].items()):
        lengths.plot([k for k, _ in rows], [speedup for _, speedup in rows], f"{charts.MARKERS[number]}-", label=engine)
    lengths.axhline(1.0, **charts.PLAIN_LINE)
    lengths.set(title=figures["lengths_title"], xlabel="k, tokens drafted per round", ylim=(0.0, None))
    lengths.legend()
    figure.savefig(DOCS, metadata={"Date": None})
    inline = charts._inline(figure, "published", "bars: a published figure beside its plan; lines: the plan by length")
    FIGURE.write_text(inline, encoding="utf-8")


def main() -> None:
    figure = json.loads((DATA / "published_figure.json").read_text(encoding="utf-8"))
    rates = stated_rates(figure)
    rows = plan_bars(figure, rates)
    print("target          draft         published  planned  90 % interval   acceptance  fitted to the bar")
    for row in rows:
        if row["draft"] is None:
            print(f"{row['target']:15} {'plain':13} {row['published']:9.2f}     1.00  by definition")
            continue
        fitted = row["fitted_acceptance"]
        figures = f"{row['published']:9.2f}  {row['forecast']:7.2f}  {row['low']:.2f} to {row['high']:.2f}"
        needed = f"below the least of {1 / row['cost']:.2f}x" if fitted is None else f"{fitted:.2f}"
        print(f"{row['target']:15} {row['draft']:13} {figures}  {row['acceptance']:12.2f}  {needed}")
    refusal = forecast(figure["bars"][-1], rows[-1]["fitted_acceptance"] or 0.0)["choices"][0]["reason"]
    print(f"\n405B with the 1B at the acceptance that its bar needs: {refusal}")
    pair, curves = figure["bars"][2], {}
    for engine in ("exllamav2", "vllm"):
        setups = forecast(pair, rates[pair["target"], pair["draft"]], engine, tuple(range(1, 9)))["setups"]
        curves[engine] = [[setup["k"], setup["speedup"], setup["cost"]] for setup in setups]
        print(f"70B + 1B, {engine:10}: " + ", ".join(f"k={k} {speedup:.2f}x" for k, speedup, _ in curves[engine]))
    if "--write" in sys.argv:
        draw(drawn_figures(rows, curves))
    default_k = read_data("engines")["exllamav2"]["default_k"]
    finish({"bars": rows, "refusal": refusal, "curves": curves, "default_k": default_k})


if __name__ == "__main__":
    main()
