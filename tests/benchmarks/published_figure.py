"""The published figure that started the project, beside a plan: `python -m tests.benchmarks.published_figure`.

The acceptance of each pair is stated in data/published_figure.json from other published values, before the bars are
looked at; a value fitted to a bar is printed as such and is no forecast. `--svg FILE` draws the bars. The last line is
one JSON document.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.common import finish
from tests.benchmarks.plan import DATA, implied_rate, read_rows
from tuner.plan.acceptance import rate_of
from tuner.plan.plan import PlanQuery, make_plan
from tuner.plan.shape import read_data

CONTEXT = 1000  # tokens of the figure's prompts
KERNEL_ROWS = "block"


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


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Published bars and the forecasts with their intervals."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.4, 4.4))
    colours = {None: "#9aa5b1", "Llama-3.1-8B": "#4878a8", "Llama-3.2-1B": "#d9822b"}
    names = {None: "plain", "Llama-3.1-8B": "8B draft", "Llama-3.2-1B": "1B draft"}
    for position, row in enumerate(rows):
        x = position + (position >= 3) * 0.7
        axes.bar(x, row["published"], width=0.72, color=colours[row["draft"]])
        axes.annotate(
            f"{row['published']:.2f}x",
            (x, row["published"]),
            ha="center",
            va="bottom",
            fontsize=10,
            xytext=(0, 3),
            textcoords="offset points",
        )
        axes.annotate(
            names[row["draft"]], (x, 0), ha="center", va="top", fontsize=9, xytext=(0, -5), textcoords="offset points"
        )
        if row["forecast"] is not None:
            error = [[row["forecast"] - row["low"]], [row["high"] - row["forecast"]]]
            label = "planned, 90 % interval" if position == 1 else None
            axes.errorbar(
                x + 0.43, row["forecast"], yerr=error, fmt="o", color="black", capsize=4, markersize=5, label=label
            )
    axes.axhline(1.0, linestyle="--", linewidth=1, color="#555555", label="plain decoding")
    for x, name in ((1, "Llama-3.1-70B, one H800"), (4.7, "Llama-3.1-405B, three H800")):
        axes.annotate(
            name,
            (x, 0),
            ha="center",
            va="top",
            fontsize=10,
            fontweight="bold",
            xytext=(0, -20),
            textcoords="offset points",
        )
    axes.set_xticks([])
    axes.set_ylabel("tokens/s relative to plain decoding")
    axes.set_title("ExLlamaV2, GPTQ-INT4, k = 4: published bars and the plan beside them", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.subplots_adjust(bottom=0.16)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, help="where to draw the figure")
    options = parser.parse_args()
    figure = json.loads((DATA / "published_figure.json").read_text(encoding="utf-8"))
    rates, rows = stated_rates(figure), []
    print("target          draft         published  planned  90 % interval   acceptance  fitted to the bar")
    for bar in figure["bars"]:
        row: dict[str, Any] = {
            "target": bar["target"],
            "draft": bar["draft"],
            "published": bar["speedup"],
            "forecast": None,
        }
        if bar["draft"] is not None:
            rate = rates[bar["target"], bar["draft"]]
            [setup] = forecast(bar, rate)["setups"]
            fitted = fitted_rate(bar, setup["cost"])
            row |= {"forecast": setup["speedup"], "acceptance": rate, "fitted_acceptance": fitted}
            row |= {name: setup[name] for name in ("low", "high", "cost", "break_even")}
            row["inside"] = setup["low"] <= bar["speedup"] <= setup["high"]
            figures = f"{bar['speedup']:9.2f}  {setup['speedup']:7.2f}  {setup['low']:.2f} to {setup['high']:.2f}"
            needed = f"below the least of {1 / setup['cost']:.2f}x" if fitted is None else f"{fitted:.2f}"
            print(f"{bar['target']:15} {bar['draft']:13} {figures}  {rate:12.2f}  {needed}")
        else:
            print(f"{bar['target']:15} {'plain':13} {bar['speedup']:9.2f}     1.00  by definition")
        rows.append(row)
    last = figure["bars"][-1]
    refusal = forecast(last, rows[-1]["fitted_acceptance"] or 0.0)["choices"][0]["reason"]
    print(f"\n405B with the 1B at the acceptance that its bar needs: {refusal}")
    pair, curves = figure["bars"][2], {}
    for engine in ("exllamav2", "vllm"):
        setups = forecast(pair, rates[pair["target"], pair["draft"]], engine, tuple(range(1, 9)))["setups"]
        curves[engine] = [[setup["k"], setup["speedup"], setup["cost"]] for setup in setups]
        print(f"70B + 1B, {engine:10}: " + ", ".join(f"k={k} {speedup:.2f}x" for k, speedup, _ in curves[engine]))
    if options.svg is not None:
        draw(rows, options.svg)
    finish(
        {
            "bars": rows,
            "refusal": refusal,
            "curves": curves,
            "default_k": read_data("engines")["exllamav2"]["default_k"],
        }
    )


if __name__ == "__main__":
    main()
