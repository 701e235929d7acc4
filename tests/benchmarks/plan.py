"""How far to trust a plan: `python -m tests.benchmarks.plan`. Published rows, each source left out in turn.

The residual (ridge regression) and the width of the intervals are fitted on all other sources; the constants of
tuner/plan/engines.json are not refitted: they were set with these rows in view. `--write` saves the fit to all rows,
which ships, and docs/plan-trust.md. `--store FILE`: the plan of the machine that made a store, beside its run. The last
line is one JSON document.
"""

import itertools
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy
from sklearn.linear_model import Ridge

from profiles.records.draft_spec import parse_draft
from tests import ROOT
from tests.benchmarks import plan_store
from tests.benchmarks.common import DATA, finish
from tuner.plan import plan
from tuner.plan.acceptance import tokens_per_round
from tuner.plan.plan import corrected_cost, features, log_scale, planned_draft
from tuner.plan.shape import Shape, read_data, read_shape
from tuner.plan.step_time import Hardware, RoundParts, StepModel, read_engine, read_hardware

Row = Mapping[str, Any]
RESIDUAL = Path(plan.__file__).with_name("residual.json")
CONTEXT = 1000  # tokens, where a row states none
LEVEL = 0.9
CONFIDENT = 0.8  # share of draft tokens over an engine's default p_min, on average


def read_rows() -> list[dict[str, Any]]:
    """All published rows."""
    return list(json.loads((DATA / "published.json").read_text(encoding="utf-8"))["rows"])


def usable(row: Row) -> bool:
    """Whether speed-up, hardware and acceptance are known."""
    return {"speedup", "hardware", "k"} <= row.keys() and ("accept_rate" in row or "accept_length" in row)


def drafted(row: Row) -> float:
    """Mean tokens that a round drafts; less than k where it stops by confidence (an assumption, see the row)."""
    if "p_min" not in row:
        return float(row["k"])
    going_on = CONFIDENT + (row.get("accept_rate", CONFIDENT) - CONFIDENT) / 2.0
    return sum(going_on**position for position in range(1, row["k"] + 1))


def tokens(row: Row) -> float:
    """Mean tokens that a round emits."""
    return float(row.get("accept_length") or 1.0 + row["accept_rate"] * drafted(row))


@cache
def _shape(name: str, format_name: str | None) -> Shape:
    return read_shape(name, format_name)


def devices(row: Row, shape: Shape, hardware: Hardware) -> int:
    """Stated, else the number at which the model's plain decoding is nearest the published one."""
    if "devices" in row:
        return int(row["devices"])
    fitting = [count for count in (1, 2, 4, 8, 16) if shape.weight_bytes < 0.95 * hardware.memory * count] or [16]
    if "plain_tok_s" not in row:
        return fitting[0]

    def distance(count: int) -> float:
        steps = StepModel(hardware=replace(hardware, count=count), engine=read_engine(row["engine"], hardware))
        plain_s = steps.step_s(shape, row["batch"], 1, CONTEXT) + steps.engine.step_s
        return abs(math.log(row["batch"] / plain_s / row["plain_tok_s"]))

    return min(fitting, key=distance)


def ideal(steps: StepModel) -> StepModel:
    """A plain roofline: full bandwidth, no launches, no host, no blocks of rows."""
    curve = {"default": {"kind": "tensor", "tile": 1}}
    zeros = dict.fromkeys(("layer_s", "expert_layer_s", "step_s", "round_s", "draft_step_s"), 0.0)
    return replace(steps, engine=replace(steps.engine, bandwidth_share=1.0, graph_rows=[], curves=curve, **zeros))


def parts_of(row: Row, change: Callable[[StepModel], StepModel] = lambda steps: steps) -> RoundParts:
    """The model's round of a row."""
    target = _shape(row["model"], row["format"])
    hardware = read_hardware(row["hardware"])
    hardware = replace(hardware, count=devices(row, target, hardware))
    steps = change(StepModel(hardware=hardware, engine=read_engine(row["engine"], hardware)))
    draft = planned_draft(parse_draft(row["draft"]), target, row.get("draft_format") or row["format"])
    length, passes = drafted(row), draft.passes
    if "tree_rows" in row:
        length, passes = row["tree_rows"] - 1.0, float(row["k"])
    return steps.round(target, draft.shape, k=length, batch=row["batch"], context=CONTEXT, passes=passes)


def log_residual(row: Row, parts: RoundParts) -> float:
    """Log of observed over modelled plain steps per round."""
    return math.log(tokens(row) / row["speedup"] / parts.cost)


def fit(rows: Sequence[Row], parts: Sequence[RoundParts]) -> list[float]:
    """Coefficients of the residual."""
    inputs = [features(part, "tree_rows" in row) for row, part in zip(rows, parts, strict=True)]
    outputs = list(map(log_residual, rows, parts))
    return [float(value) for value in Ridge(alpha=1.0, fit_intercept=False).fit(inputs, outputs).coef_]


def weighted_quantile(values: Sequence[float], weights: Sequence[float], level: float) -> float:
    """The smallest value with at least `level` of the weight at or below it."""
    order = sorted(zip(values, weights, strict=True))
    total, passed = sum(weights), 0.0
    for value, weight in order:
        passed += weight
        if passed >= level * total - 1e-12:
            return value
    return order[-1][0]


def by_source(rows: Sequence[Row]) -> dict[str, list[int]]:
    groups = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row["source"]].append(index)
    return groups


def left_out_scores(rows: Sequence[Row], parts: Sequence[RoundParts]) -> tuple[list[float], list[list[float]]]:
    """Scaled log errors of every row under the fit to the other sources, and that fit's coefficients."""
    scores, used = [0.0] * len(rows), [[0.0]] * len(rows)
    for indices in by_source(rows).values():
        others = [index for index in range(len(rows)) if index not in indices]
        coefficients = fit([rows[i] for i in others], [parts[i] for i in others])
        for index in indices:
            cost = corrected_cost(parts[index], coefficients, "tree_rows" in rows[index])
            error = abs(math.log(tokens(rows[index]) / rows[index]["speedup"] / cost))
            scores[index], used[index] = error / log_scale(cost), coefficients
    return scores, used


def half_width(rows: Sequence[Row], scores: Sequence[float]) -> float:
    """The width that covers 90 % of the rows when every source weighs the same.

    Rows of different sources are not exchangeable, and n sources guarantee a level of n / (n + 1) at most: this is an
    empirical level, not a guarantee.
    """
    groups = by_source(rows)
    weights = [1.0 / len(groups[row["source"]]) for row in rows]
    return weighted_quantile(scores, weights, LEVEL)


def interval(speedup: float, half_width: float) -> dict[str, float]:
    return {"speedup": speedup, "low": speedup * math.exp(-half_width), "high": speedup * math.exp(half_width)}


def leave_one_source_out(rows: Sequence[Row], parts: Sequence[RoundParts]) -> list[dict[str, Any]]:
    """For every row: forecast, interval and observation; nothing of its source was used for the fit."""
    results: list[dict[str, Any]] = [{} for _ in rows]
    for indices in by_source(rows).values():
        others = [index for index in range(len(rows)) if index not in indices]
        other_rows, other_parts = [rows[i] for i in others], [parts[i] for i in others]
        coefficients = fit(other_rows, other_parts)
        width = half_width(other_rows, left_out_scores(other_rows, other_parts)[0])
        for index in indices:
            cost = corrected_cost(parts[index], coefficients, "tree_rows" in rows[index])
            results[index] = interval(tokens(rows[index]) / cost, width * log_scale(cost))
    return results


def nested(rows: Sequence[Row], parts: Sequence[RoundParts]) -> list[dict[str, Any]]:
    """As `leave_one_source_out`, with features, penalty and weights chosen without the source too.

    The shipped features were chosen with all rows in view; this is what such a choice is worth for a new source.
    """
    inputs = numpy.array([candidate_features(*pair) for pair in zip(rows, parts, strict=True)])
    outputs = numpy.array(list(map(log_residual, rows, parts)))
    sources = numpy.array([row["source"] for row in rows])
    sizes = numpy.array([numpy.sum(sources == source) for source in sources])
    methods = [
        (list(chosen), penalty, weights)
        for size in range(inputs.shape[1] + 1)
        for chosen in itertools.combinations(range(inputs.shape[1]), size)
        for penalty in (0.3, 1.0, 3.0)
        for weights in (numpy.ones(len(rows)), len(rows) / len(set(sources)) / sizes)
    ]

    def residuals(method: Any, held_out: Any, fitted: Any) -> Any:
        chosen, penalty, weights = method
        weighted = inputs[fitted][:, chosen] * weights[fitted, None]
        gram = weighted.T @ inputs[fitted][:, chosen] + penalty * numpy.eye(len(chosen))
        coefficients = numpy.linalg.solve(gram, weighted.T @ outputs[fitted])
        return inputs[held_out][:, chosen] @ coefficients

    results: list[dict[str, Any]] = [{} for _ in rows]
    for source in dict.fromkeys(sources):
        others = [other for other in dict.fromkeys(sources) if other != source]
        inner = {other: (sources == other, (sources != other) & (sources != source)) for other in others}

        def left_out_error(method: Any, inner: Mapping[Any, Any] = inner) -> float:
            errors = [abs(outputs[held] - residuals(method, held, fitted)).mean() for held, fitted in inner.values()]
            return float(numpy.mean(errors))

        method = min(methods, key=left_out_error)
        scores, weights = [], []
        for held, fitted in inner.values():
            log_costs = numpy.log([parts[index].cost for index in numpy.flatnonzero(held)])
            log_costs += residuals(method, held, fitted)
            errors = abs(outputs[held] - residuals(method, held, fitted))
            scores += [error / log_scale(math.exp(cost)) for error, cost in zip(errors, log_costs, strict=True)]
            weights += [1.0 / held.sum()] * held.sum()
        width = weighted_quantile(scores, weights, LEVEL)
        held = sources == source
        for index, correction in zip(numpy.flatnonzero(held), residuals(method, held, ~held), strict=True):
            cost = parts[index].cost * math.exp(correction)
            results[index] = interval(tokens(rows[index]) / cost, width * log_scale(cost))
    return results


def candidate_features(row: Row, parts: RoundParts) -> list[float]:
    """What a residual could weigh: what the shipped one does, a constant, the cost, the batch, and experts."""
    has_experts = bool(_shape(row["model"], row["format"]).num_experts)
    return [*features(parts, "tree_rows" in row), 1.0, math.log(parts.cost), math.log(row["batch"]), float(has_experts)]


def always_default(rows: Sequence[Row], parts: Sequence[RoundParts]) -> list[dict[str, Any]]:
    """The median speed-up that other sources publish at the default k of the engine's documents (3 to 5)."""
    results: list[dict[str, Any]] = [{} for _ in rows]
    for source, indices in by_source(rows).items():
        others = [row["speedup"] for row in rows if row["source"] != source and 3 <= row["k"] <= 5]
        for index in indices:
            results[index] = {"speedup": statistics.median(others)}
    return results


def score(rows: Sequence[Row], results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Relative errors and coverage: every source weighing the same, and pooled over rows."""
    groups = by_source(rows)
    weights = [1.0 / len(groups[row["source"]]) for row in rows]
    errors = [abs(result["speedup"] / row["speedup"] - 1.0) for row, result in zip(rows, results, strict=True)]
    scores = {
        "num_rows": len(rows),
        "num_sources": len(groups),
        "median_abs_error": weighted_quantile(errors, weights, 0.5),
        "p90_abs_error": weighted_quantile(errors, weights, 0.9),
        "pooled_median_abs_error": statistics.median(errors),
        "pooled_p90_abs_error": float(numpy.quantile(errors, 0.9)),
    }
    if "low" in results[0]:
        inside = [r["low"] <= row["speedup"] <= r["high"] for row, r in zip(rows, results, strict=True)]
        widths = [(r["high"] - r["low"]) / r["speedup"] for r in results]
        scores["coverage"] = sum(w for w, hit in zip(weights, inside, strict=True) if hit) / sum(weights)
        scores["pooled_coverage"] = sum(inside) / len(inside)
        scores["median_width"] = weighted_quantile(widths, weights, 0.5)
    return {key: value if isinstance(value, int) else round(value, 4) for key, value in scores.items()}


def split(rows: Sequence[Row], results: Sequence[Mapping[str, float]], field: str, least: int = 1) -> dict[str, Any]:
    """Scores by the values of a field that have at least `least` rows."""
    table = {}
    for value in dict.fromkeys(row[field] for row in rows):
        chosen = [index for index, row in enumerate(rows) if row[field] == value]
        if len(chosen) >= least:
            table[str(value)] = score([rows[i] for i in chosen], [results[i] for i in chosen])
    return table


def grid_errors() -> dict[str, Any]:
    """Step times of the grid's cells: from 3 and 7 steps of a chain, those of 5; trees against the chain's line."""
    cells = json.loads((DATA / "published_grid.json").read_text(encoding="utf-8"))["cells"]
    groups: dict[tuple[Any, ...], dict[tuple[int, int], float]] = defaultdict(dict)
    for cell in cells:
        key = (cell["target"], cell["draft"], cell["task"], cell["batch"])
        groups[key][cell["steps"], cell["topk"]] = cell["batch"] * cell["accept_length"] / cell["tok_s"]
    chains, trees = [], []
    for times in groups.values():
        if (3, 1) not in times or (7, 1) not in times:
            continue
        slope = (times[7, 1] - times[3, 1]) / 4.0
        for (num_steps, topk), seconds in times.items():
            error = abs(seconds / (times[3, 1] + (num_steps - 3) * slope) - 1.0)
            if topk > 1:
                trees.append(error)
            elif num_steps == 5:
                chains.append(error)
    return {
        "grid_num_chains": len(chains),
        "grid_median_abs_error": round(statistics.median(chains), 4),
        "grid_p90_abs_error": round(float(numpy.quantile(chains, 0.9)), 4),
        "grid_num_trees": len(trees),
        "grid_trees_median_abs_error": round(statistics.median(trees), 4),
    }


def implied_rate(row: Row) -> float:
    """The rate per token at which the model gives a row's speed-up; its acceptance is not published."""
    cost = corrected_cost(parts_of(row), read_data("residual")["coefficients"])
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if tokens_per_round(middle, row["k"]) / cost < row["speedup"] else (low, middle)
    return low


def write(rows: Sequence[Row], parts: Sequence[RoundParts]) -> None:
    """Saves the fit to all rows, and the width from errors of left-out sources."""
    document = {
        "about": "Ridge regression of log(observed / modelled plain steps per round) on shares of a round's time; "
        "log_half_width times log_scale(cost) covers 90 % of left-out rows, every source weighing the same. "
        "Made by python -m tests.benchmarks.plan --write",
        "features": ["rows beyond the first", "drafting", "host", "tree"],
        "coefficients": [round(value, 4) for value in fit(rows, parts)],
        "log_half_width": round(half_width(rows, left_out_scores(rows, parts)[0]), 4),
        "num_rows": len(rows),
        "num_sources": len(by_source(rows)),
    }
    RESIDUAL.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def trust_page(document: Mapping[str, Any]) -> str:
    """docs/plan-trust.md: the errors by kind, engine and source, and how to read them."""
    methods = {
        "plan, source left out": document,
        "the same, its features, penalty and weights chosen without the source too": document["nested"],
        "the model without the residual": document["model_without_residual"],
        "a plain roofline": document["roofline"],
        "always the documented default (other sources' median at k = 3 to 5)": document["always_default"],
    }
    template = (DATA / "plan-trust.md.jinja").read_text(encoding="utf-8")
    return jinja2.Template(template, keep_trailing_newline=True).render(document, methods=methods).lstrip()


def _print(title: str, tables: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    print(f"\n{title:34} rows  median    p90  coverage  width")
    for name, row in tables:
        more = f"  {row['coverage']:8.2f}  {row['median_width']:5.2f}" if "coverage" in row else ""
        print(f"{name[:34]:34} {row['num_rows']:4}  {row['median_abs_error']:6.3f} {row['p90_abs_error']:6.3f}{more}")


def main() -> None:
    if "--store" in sys.argv:
        plan_store.compare(Path(sys.argv[sys.argv.index("--store") + 1]))
        return
    rows = [row for row in read_rows() if usable(row)]
    parts = list(map(parts_of, rows))
    if "--write" in sys.argv:
        write(rows, parts)
    results = leave_one_source_out(rows, parts)
    roofline = [{"speedup": tokens(row) / parts_of(row, ideal).cost} for row in rows]
    physics = [{"speedup": tokens(row) / part.cost} for row, part in zip(rows, parts, strict=True)]
    document = {
        **score(rows, results),
        "nested": score(rows, nested(rows, parts)),
        "roofline": score(rows, roofline),
        "model_without_residual": score(rows, physics),
        "always_default": score(rows, always_default(rows, parts)),
        "by_kind": split(rows, results, "kind"),
        "by_engine": split(rows, results, "engine"),
        "by_source": split(rows, results, "source", 10),
        **grid_errors(),
    }
    if "--write" in sys.argv:
        (ROOT / "docs" / "plan-trust.md").write_text(trust_page(document), encoding="utf-8")
    methods = ("nested", "model_without_residual", "roofline", "always_default")
    _print(
        "every source weighs the same",
        [("plan, source left out", document), *((name, document[name]) for name in methods)],
    )
    for field in ("by_kind", "by_engine", "by_source"):
        _print(field.replace("_", " "), document[field].items())
    pooled = [document[f"pooled_{name}"] for name in ("median_abs_error", "p90_abs_error", "coverage")]
    print("\npooled over rows: median {:.3f}, p90 {:.3f}, coverage {:.2f}".format(*pooled))
    finish(document)


if __name__ == "__main__":
    main()
