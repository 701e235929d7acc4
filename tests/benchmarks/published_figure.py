"""The published figure that started the project, beside a plan: `python -m tests.benchmarks.published_figure`.

The acceptance of each pair is stated in data/published_figure.json from other published values, before the bars are
looked at; a value fitted to a bar is printed as such and is no forecast. The last line is one JSON document.
"""

import json
from typing import Any

from tests.benchmarks.common import finish
from tests.benchmarks.plan import DATA, implied_rate, read_rows
from tuner.plan.acceptance import rate_of
from tuner.plan.plan import PlanQuery, make_plan
from tuner.plan.shape import read_data

CONTEXT = 1000  # tokens of the figure's prompts


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
    default_k = read_data("engines")["exllamav2"]["default_k"]
    finish({"bars": rows, "refusal": refusal, "curves": curves, "default_k": default_k})


if __name__ == "__main__":
    main()
