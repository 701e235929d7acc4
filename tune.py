"""draftpick's command line: `run` measures and decides, `show`, `lookup` and `report` tell what is known.

Each verb reads like the story; the rooms below do the work. Heavy libraries are imported by the verb that needs them,
so that `lookup` answers a deploy script without loading torch.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import platformdirs
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.exceptions import TyperException

from profiles import spelling
from profiles.errors import DraftpickError, InputError, NotMeasuredError, PolicyError
from store.book import Book
from tuner import export
from tuner import policy as policies
from tuner import report as reports
from tuner.progress import StageProgress

if TYPE_CHECKING:
    from store.runs import FinishedRun

FAMILY_TARGET = "builtin:target"
FAMILY_DRAFTS = ["builtin:draft-general", "builtin:draft-code", "builtin:draft-prose", "builtin:draft-deep", "ngram"]
OBJECTIVES = ("tpot", "throughput")
EXIT_INTERRUPTED = 130
BOOK_NAME = "evidence.db"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Measures which draft and speculation length decode fastest on this machine, and proves it.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


Target = Annotated[str, typer.Option(help="A directory, a hub id or builtin:target.")]
Drafts = Annotated[
    list[str] | None,
    typer.Option("--draft", help="A directory, a hub id, ngram[:max=4,min=2] or early-exit:LAYERS; may be repeated."),
]
Lengths = Annotated[str, typer.Option(help="Speculation lengths: 1-8, 1,2,4 or 3.")]
BatchSizes = Annotated[
    list[int] | None, typer.Option("--batch-size", help="Sequences decoded together; this engine allows 1.")
]
Contexts = Annotated[
    list[int] | None,
    typer.Option("--context", help="Most tokens of prompt and output; default: what the prompts need. Repeatable."),
]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompts", help="A .jsonl, .json or .txt file, or builtin:NAME; may be repeated.")
]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample among the k most likely tokens; 0 is off.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")]
MaxNewTokens = Annotated[int, typer.Option(help="Output tokens per prompt at most.")]
Store = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the store; default: $DRAFTPICK_STORE, else the user's data folder."),
]
Objective = Annotated[str, typer.Option(help="tpot or throughput; at batch 1 they agree.")]
Budget = Annotated[float | None, typer.Option(help="Seconds after which no new measurement is started.")]
Seed = Annotated[int, typer.Option(help="Of sampling and of the order of runs.")]
JsonOnly = Annotated[bool, typer.Option("--json", help="Print nothing but one JSON document on stdout.")]
TunedTarget = Annotated[str | None, typer.Option("--target", help="Name or digest of a tuned target; default: last.")]


@app.command()
def run(
    target: Target = FAMILY_TARGET,
    draft: Drafts = None,
    lengths: Lengths = "1-8",
    batch_size: BatchSizes = None,
    context: Contexts = None,
    prompts: Prompts = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    dtype: DType = None,
    device: Device = None,
    max_new_tokens: MaxNewTokens = 64,
    store: Store = None,
    objective: Objective = "tpot",
    budget: Budget = None,
    seed: Seed = 0,
    json_only: JsonOnly = False,
) -> None:
    """Measure every draft at every length, choose, prove the choice, and write the policy."""
    out_of_time = _deadline(budget)
    _check_objective(objective)
    specs = [spelling.parse_draft(text) for text in draft or (FAMILY_DRAFTS if target == FAMILY_TARGET else ["ngram"])]
    asked_lengths = spelling.parse_lengths(lengths)
    folder = _store_folder(store)
    with Book.open(folder / BOOK_NAME) as book:
        with err.status("loading"):
            from profiles import loading
            from store import runs

            shelf = runs.Shelf.of(book)
            question = loading.Question(
                lengths=asked_lengths,
                batch_sizes=tuple(dict.fromkeys(batch_size or [1])),
                contexts=tuple(dict.fromkeys(context or [])),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
            )
            bench = loading.load(target, specs, dtype, device, max(question.contexts, default=question.max_new_tokens))
            loads, warnings = loading.workloads(bench, question, prompts or ["builtin:all"])
        _say(f"target {target} on {bench.engine.environment.device}; store {folder}", *warnings)
        with StageProgress(err) as progress:
            done = runs.tune(bench.engine, loads, shelf, question.lengths, (progress.update, out_of_time))
    document = reports.document(done.policy, cost=done.cost, store=str(folder), policy_path=str(done.policy_path))
    if not json_only:
        _print_outcome(done)
    _print_json(document)


@app.command()
def show(store: Store = None) -> None:
    """Tell what the store holds: evidence per target, how much and how old, and the latest policy."""
    with Book.open(_existing_store(store)) as book:
        title = Text(f"store {book.path.parent}")
        table = Table("target", "kind", "rows", "newest (UTC)", title=title, title_justify="left")
        for count in book.counts():
            table.add_row(Text(count.target), count.table.replace("_", " "), str(count.rows), count.newest[:19])
        text = book.latest_policy()
        policy = None if text is None else _read_policy(book, text)
    out.print(table)
    if policy is not None:
        out.print(reports.table(policy))


@app.command()
def lookup(
    target: TunedTarget = None,
    batch_size: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and output; default: not known.")] = None,
    domain: Annotated[str | None, typer.Option(help="Domain of the prompts; default: all mixed.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the one that was tuned last.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="json or transformers: what an engine takes.")] = None,
    store: Store = None,
    json_only: JsonOnly = False,
) -> None:
    """Answer which setup to use, from the latest policy; loads no torch."""
    if form is not None and form not in export.FORMS:
        raise InputError(f"format {form!r}: allowed are {', '.join(export.FORMS)}")
    path = _existing_store(store)
    with Book.open(path) as book:
        policy = _find_policy(book, target)
        cost = book.latest_outcome(policy.target).get("cost", {})
    asked = policy.headline.temperature if temperature is None else temperature
    answer = policy.look_up(batch_size=batch_size, context_length=context, domain=domain, temperature=asked)
    if json_only:
        policy_path = str(path.with_name(policy.file_name))
        document = reports.document(policy, cost=cost, store=str(path.parent), policy_path=policy_path)
        _print_json({**document, "answer": reports.answer(answer)})
    elif form is None:
        out.print(f"{answer.choice.setup.name}: {answer.rule}", markup=False, soft_wrap=True)
        out.print(answer.choice.reason, markup=False, soft_wrap=True)
    else:
        made = export.emit(answer.choice, target=policy.target, form=form)
        if made.note:
            _say(made.note)
        sys.stdout.write(made.text)


@app.command()
def report(
    out_path: Annotated[Path, typer.Option("--out", help="The picture to write, .png or .svg.")],
    target: TunedTarget = None,
    store: Store = None,
) -> None:
    """Draw output tokens per second of every setup beside plain decoding, from the latest run."""
    with Book.open(_existing_store(store)) as book:
        policy = _find_policy(book, target)
        rows = [reports.ChartRow.from_json(row) for row in book.latest_outcome(policy.target).get("chart", [])]
    if not rows:
        raise NotMeasuredError(f"no finished run of {policy.target.name} is in the store: run `tune.py run` first")
    subtitle = f"{policy.environment.device}, batch {policy.headline.batch_size}, prompts of all domains"
    reports.bar_chart(rows, out_path, title=f"{policy.target.name}: output tokens per second", subtitle=subtitle)
    _say(f"wrote {out_path}")


def _check_objective(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r}: allowed are {', '.join(OBJECTIVES)}")


def _deadline(budget: float | None) -> Callable[[], bool]:
    """Tells whether `budget` seconds from now are over; never when there is no budget."""
    if budget is not None and not budget > 0.0:
        raise InputError(f"budget {budget:g} seconds: more than 0 is needed")
    deadline = math.inf if budget is None else time.monotonic() + budget
    return lambda: time.monotonic() > deadline


def _print_outcome(done: "FinishedRun") -> None:
    """The table, what was left out and why, and what it cost."""
    out.print(reports.table(done.policy))
    for failed in done.outcome.infeasible:
        out.print(f"left out: {failed.setup.name}: {failed.detail}", markup=False, soft_wrap=True)
    measured = [choice.measured for choice in done.outcome.choices if choice.measured is not None]
    grid = done.outcome.grid_seconds_estimate
    text = f"measured {done.cost['measured_seconds']:.0f} s, reused {done.cost['reused_units']} known units"
    if grid is not None:
        text += f"; really running all {len(done.outcome.anchors[0].forecasts)} setups would take about {grid:.0f} s"
    partings, disturbed = sum(one.num_partings for one in measured), sum(one.num_disturbed for one in measured)
    out.print(text, soft_wrap=True)
    out.print(f"outputs parted at near-ties: {partings}; pairs of runs disturbed by other programs: {disturbed}")
    noises = [f"{anchor.race.noise:+.1%}" for anchor in done.outcome.anchors if anchor.race and anchor.race.noise]
    if noises:
        out.print(f"plain against plain, the races' noise floor: {', '.join(noises)}")
    out.print(f"policy: {done.policy_path}", markup=False, soft_wrap=True)


def _print_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")


def _store_folder(asked: Path | None) -> Path:
    named = asked or os.environ.get("DRAFTPICK_STORE")
    return Path(named) if named else platformdirs.user_data_path("draftpick")


def _existing_store(asked: Path | None) -> Path:
    path = _store_folder(asked) / BOOK_NAME
    if not path.exists():
        raise NotMeasuredError(f"no store in {path.parent}: run `tune.py run` first, or name another with --store")
    return path


def _find_policy(book: Book, target: str | None) -> policies.Policy:
    text = book.latest_policy(target)
    if text is None:
        asked = f"of target {target!r} " if target else ""
        raise NotMeasuredError(f"no policy {asked}in store {book.path}: run `tune.py run` first")
    return _read_policy(book, text)


def _read_policy(book: Book, text: str) -> policies.Policy:
    try:
        return policies.from_json(text)
    except PolicyError as error:
        raise PolicyError(f"the policy in store {book.path}: {error}") from error


def _say(*lines: str) -> None:
    for line in lines:
        err.print(line, markup=False, soft_wrap=True)


def main() -> None:
    """Runs the asked verb; every failure is one line on stderr and the exit code that README lists."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C outside of the measuring
            _say("error: interrupted")
        sys.exit(code)
    except TyperException as error:
        _say(f"error: {error.format_message()}")
        sys.exit(2)
    except DraftpickError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
