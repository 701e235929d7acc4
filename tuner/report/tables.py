"""Says what was decided: a table for the terminal, and a JSON document for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from profiles.records.core import Interval
from profiles.records.errors import InputError
from tuner.policy.estimates import Measured
from tuner.policy.policy import Answer, Choice, Policy, crossover_of

UNCHANGED = Interval(estimate=1.0, low=1.0, high=1.0)


def figures_table(name: str, figures: Sequence[str], *, title: str | None = None, caption: str | None = None) -> Table:
    """An empty table of named rows for a terminal: names fold, figures stay whole at the right."""
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # so that names fit on 80 columns
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    shown.add_column(name, overflow="fold")
    for figure in figures:
        shown.add_column(figure, justify="right", no_wrap=True)
    return shown


def table(policy: Policy) -> Group:
    """The choices, one row per operating point, and the reasons below; what all rows share is in the title."""
    points = {
        "batch": [str(choice.batch_size) for choice in policy.choices],
        "context": [str(choice.context_length) for choice in policy.choices],
        "temperature": [f"{choice.temperature:g}" for choice in policy.choices],
    }
    varied = {name: cells for name, cells in points.items() if len(set(cells)) > 1}
    shared = ", ".join(f"{name} {cells[0]}" for name, cells in points.items() if name not in varied)
    title = f"{policy.target.name} on {policy.environment.device}, {policy.created[:10]}"
    shown = Table(title=Text(f"{title}\n{shared}" if shared else title), title_justify="left", box=SIMPLE_HEAD)
    for name in varied:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("domain", no_wrap=True)
    shown.add_column("setup", overflow="fold")
    for name in ("speed-up (95 %)", "end to end", "proven"):
        shown.add_column(name, no_wrap=True)
    reasons = Text(overflow="fold")
    for choice, *point in zip(policy.choices, *varied.values(), strict=True):
        shown.add_row(*point, Text(choice.domain), Text(choice.setup.name, "bold"), *_cells(choice))
        parts = (f"{name} {value}" for name, value in zip(varied, point, strict=True))
        reasons.append(f"{', '.join([choice.domain, *parts])}: ", "bold").append(f"{choice.reason}\n")
    if (crossover := crossover_sentence(policy.choices)) is not None:
        reasons.append(f"{crossover}\n")
    return Group(shown, reasons)


def crossover_sentence(choices: Sequence[Choice]) -> str | None:
    """From which batch on plain decoding is the choice, at the first choice's temperature; None with one batch size."""
    rows = [choice for choice in choices if choice.temperature == choices[0].temperature and choice.is_decided]
    if len({choice.batch_size for choice in rows}) < 2:
        return None
    crossover = crossover_of(rows)
    if crossover is None:
        return "A draft still wins at the largest measured batch."
    return f"From batch {crossover} on plain decoding is the choice over all domains."


def _cells(choice: Choice) -> tuple[str, str, str]:
    if choice.setup.draft is None:
        return "1", "1", "no"
    end_to_end = _end_to_end(choice)
    cells = f"{_speedup(choice):.2f}", "unknown" if end_to_end is None else f"{end_to_end:.2f}"
    return (*cells, "yes" if choice.proven else "no")


def document(
    policy: Policy, *, cost: Mapping[str, object], store: str | None, policy_path: str | None
) -> dict[str, Any]:
    """The policy as the one JSON document a program reads: the headline choice's figures, then every operating point's.

    Rates are output tokens per second of one row of the batch, decode only; `end_to_end` is the ratio with prefill. A
    figure that is not known is None. `cost` is passed through.
    """
    return {
        "target": asdict(policy.target),
        "environment": {**asdict(policy.environment), "digest": policy.environment.digest},
        **_figures(policy.headline),
        "anchors": [{**choice.point._asdict(), **_figures(choice)} for choice in policy.choices],
        "crossover_batch": policy.crossover_batch,
        "cost": dict(cost),
        "store": store,
        "policy": policy_path,
    }


def answer(answer_: Answer) -> dict[str, Any]:
    """What a look-up found, for the same document: how, and the figures of its choice."""
    return {"matched": answer_.matched, "rule": answer_.rule, **_figures(answer_.choice)}


def _figures(choice: Choice) -> dict[str, Any]:
    setup, draft = choice.setup, choice.setup.draft
    chosen: dict[str, object] = {"draft": None if draft is None else draft.name, "length": setup.length}
    if draft is not None:
        chosen |= {"kind": draft.kind, "stop_below": setup.stop_below}
    plain_tok_per_s, chosen_tok_per_s = _rates(choice)
    return {
        "choice": chosen,
        "speedup": asdict(_speedup(choice)),
        "end_to_end": _end_to_end(choice),
        "plain_tok_per_s": plain_tok_per_s,
        "chosen_tok_per_s": chosen_tok_per_s,
        "proven": choice.proven,
        "reason": choice.reason,
        "not_proven": None if choice.proven or choice.measured is None else _not_proven(choice.measured),
    }


def _not_proven(measured: Measured) -> dict[str, Any]:
    """What was measured of a setup that is not chosen, and the gain that would have been shown 80 % of the time."""
    return {
        "setup": measured.setup.name,
        "speedup": asdict(measured.speedup),
        "end_to_end": measured.end_to_end.estimate,
        "p_value": measured.p_value,
        "num_prompts": measured.num_prompts,
        "minimum_detectable_speedup": measured.detectable_speedup,
    }


def _speedup(choice: Choice) -> Interval:
    if choice.setup.draft is None:
        return UNCHANGED
    if choice.figures is None:
        raise InputError(f"the choice {choice.setup.name!r} has neither a measurement nor a forecast of its own")
    return choice.figures.speedup


def _end_to_end(choice: Choice) -> float | None:
    if choice.setup.draft is None:
        return 1.0
    return choice.figures.end_to_end.estimate if isinstance(choice.figures, Measured) else None


def _rates(choice: Choice) -> tuple[float | None, float | None]:
    """Tokens per second of plain decoding and of the choice."""
    figures = choice.measured or choice.forecast
    if figures is None:
        return None, None
    rate = figures.tok_per_s.estimate
    plain = figures.plain_tok_per_s.estimate if isinstance(figures, Measured) else rate / figures.speedup.estimate
    return plain, rate if choice.setup.draft else plain
