"""draftpick's command line: `check` and `run` measure; `show`, `lookup`, `explain` and `report` tell.

Each verb reads like the story; the rooms below do the work. Heavy libraries are imported by the verb that needs them,
so that `lookup` answers a deploy script without loading torch.
"""

# ruff: noqa: E402
import gc

gc.set_threshold(50_000)  # a look-up is mostly importing, and there is no garbage among modules just loaded

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException

from profiles import builtin
from profiles.hardware import machine
from profiles.hardware.device import ENGINE
from profiles.records import draft_spec
from profiles.records.core import PLAIN, Environment
from profiles.records.errors import DraftpickError, InputError, MatchError, NotMeasuredError
from store import location
from store.evidence_store import EvidenceStore
from tuner.cli import bench_server, bundle, forget, messages, verify
from tuner.cli import options as flags
from tuner.cli.output import print_json, say, say_aside
from tuner.deploy import latest
from tuner.deploy import lookup as answers
from tuner.deploy.match import LEVELS, Level
from tuner.policy import policy as policies

if TYPE_CHECKING:
    from rich.console import Console

    from profiles.engines.bench import Bench, Question
    from tuner.dry_run import DryRun, Loads
    from tuner.run import FinishedRun
    from tuner.search.limits import Limits

OBJECTIVES = ("tpot", "throughput")
EXIT_NOT_PROVEN, EXIT_NOTHING_FEASIBLE, EXIT_INTERRUPTED = 5, 6, 130

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Measures which draft and speculation length decode fastest on this machine, and proves it.",
)
app.add_typer(bundle.app, name="bundle")
app.command("verify")(verify.verify)
app.command("forget")(forget.forget)
app.command("load")(bench_server.load)


@app.command("run")
@flags.of_record(flags.RunFlags)
def run(asked: flags.RunFlags) -> int:
    """Measure every draft at every length, choose, prove the choice, and write the policy."""
    out_of_time = _deadline(asked.budget)
    since_s = None if asked.max_age is None else draft_spec.parse_age(asked.max_age)
    limits = _limits(asked)
    place = location.store_location(asked.store)
    with _console(stderr=True).status("loading"):
        from tuner import dry_run, run
        from tuner import report as reports
        from tuner.cli.progress import StageProgress
        from tuner.pipeline.pipeline import Options, Watch
        from tuner.router import router as routers

        if not asked.dry_run:
            with EvidenceStore.open(
                place
            ) as evidence_store:  # a store that cannot be used is told before models are loaded
                run.TuningSession.of(evidence_store)
        bench, loads, labelled, warnings = _load(asked)
    lengths = draft_spec.parse_lengths(asked.lengths)
    options = Options(lengths=lengths, limits=limits, needed_bytes=bench.needed_bytes, refused=bench.refused)
    with contextlib.closing(bench):  # ends the servers that it started
        engine = bench.engine
        say_aside(
            f"target {asked.target} on {_where(engine.environment)}; store {location.store_name(place)}", *warnings
        )
        say_aside(*(f"left out: {one.name}: {one.detail}" for one in bench.refused))
        if asked.dry_run:
            since = run.utc_ago(since_s)
            return _print_rehearsal(dry_run.dry_run(engine, loads, place, options, since), asked.json_only)
        with EvidenceStore.open(place) as evidence_store, StageProgress(_console(stderr=True)) as progress:
            watch = Watch(progress=progress.update, out_of_time=out_of_time, show=progress.standings)
            done = run.tune(engine, loads, run.TuningSession.of(evidence_store, run.utc_ago(since_s)), options, watch)
    routed = routers.train_and_save(labelled, done.policy_path.with_name(done.policy.router_name), asked.seed)
    document = reports.document(
        done.policy, cost=done.cost, store=location.store_name(place), policy_path=str(done.policy_path)
    )
    if not asked.json_only:
        _console().print(reports.table(done.policy))
        say(*messages.outcome_lines(done), messages.router_line(routed))
    print_json({**document, "router": routed, "left_out": [asdict(one) for one in done.left_out]})
    return _exit_code(done)


def _where(environment: Environment) -> str:
    """The device, and the engine where it is not our own."""
    own = environment.engine == ENGINE
    return environment.device if own else f"{environment.device}, {environment.engine} {environment.engine_version}"


def _specs(
    target: str, drafts: list[str] | None, look_up: str = "ngram", builtin_drafts: tuple[str, ...] = builtin.DRAFTS
) -> list[draft_spec.DraftSpec]:
    """The drafts given, by default the builtin ones of the builtin target, and prompt look-up."""
    default = [*(builtin_drafts if target == builtin.TARGET else ()), look_up]
    return [draft_spec.parse_draft(text) for text in drafts or default]


def _bench(asked: flags.RunFlags, question: "Question") -> "Bench":
    """The engine that was asked for, with target and drafts."""
    from profiles.engines import factory
    from profiles.engines.openai.kinds import server_kind
    from profiles.engines.torch import load

    num_tokens = max(question.contexts, default=question.max_new_tokens) * max(question.batch_sizes)
    if asked.engine == "torch":
        specs = draft_spec.with_composites(_specs(asked.target, asked.draft))
        return load.load(asked.target, specs, asked.dtype, asked.device, num_tokens)
    name = asked.kind or "vllm"
    kind = server_kind(name if asked.engine == "server" else asked.engine)
    drafts = builtin.GGUF_MODELS[1:] if kind.reads_gguf else builtin.DRAFTS
    specs = _specs(asked.target, asked.draft, kind.look_up, drafts)
    return factory.open_bench(
        factory.EngineSpec(
            engine=asked.engine,
            command=asked.engine_command,
            launch=asked.launch,
            kind=name,
            version=asked.engine_version,
            threads=asked.threads,
            device=asked.device,
            max_requests=max(question.batch_sizes),
            min_length=min(question.lengths),
            max_length=max(question.lengths),
        ),
        factory.ModelSpec(target=asked.target, drafts=tuple(specs), dtype=asked.dtype),
    )


def _load(asked: flags.RunFlags) -> "tuple[Bench, Loads, list[tuple[str, str]], list[str]]":
    """Engine, workloads, (text, domain) of every prompt, warnings; what is refused is refused before any measuring."""
    from profiles.engines import bench as bench_module
    from profiles.engines import workloads
    from profiles.prompts import reader as files
    from tuner.pipeline.points import plan_points

    question = bench_module.Question(
        lengths=draft_spec.parse_lengths(asked.lengths),
        batch_sizes=tuple(dict.fromkeys(asked.batch_size or [1])),
        contexts=tuple(dict.fromkeys(asked.context or [])),
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        seed=asked.seed,
        engine=asked.engine,
    )
    sources = asked.prompts or [builtin.ALL_PROMPTS]
    with contextlib.ExitStack() as opened:
        bench = _bench(asked, question)
        opened.callback(bench.close)
        requests = [request for source in sources for request in files.read(source, domain=asked.domain)]
        loads, warnings = workloads.workloads_of(bench, question, requests)
        for workload, prompts in loads:
            plan_points(workload, prompts)  # refuses a domain's name, which the run would only do once it is noted
        opened.pop_all()
    notes = [loaded.note for loaded in bench.loaded if loaded.note is not None]
    labelled = [(files.user_text(request), request.domain) for request in requests]
    return bench, loads, labelled, [*notes, *bench.notes, *warnings]


@app.command()
def check(
    target: flags.Target = builtin.TARGET,
    draft: flags.Drafts = None,
    batch_size: flags.AskedBatch = 1,
    context: flags.AskedContext = None,
    prompts: flags.Prompts = None,
    dtype: flags.DType = None,
    device: flags.Device = None,
    json_only: flags.JsonOnly = False,
) -> int:
    """Tell in seconds whether drafts fit a target: tokens, positions, memory, and a first look at acceptance."""
    specs = _specs(target, draft)
    with _console(stderr=True).status("loading"):
        from profiles.fit import check as checks
        from profiles.prompts import reader as files
        from tuner.cli.check_table import check_table

        shape = checks.Shape(batch_size=batch_size, context_length=context, dtype=dtype, device=device)
        requests = [request for source in prompts or [] for request in files.read(source)]
        found = checks.check(target, specs, shape, requests)
    if json_only:
        print_json(found.to_json())
    else:
        _console().print(check_table(found))
    return InputError.exit_code if any(one.problem is not None for one in found.drafts) else 0


@app.command()
def show(store: flags.Store = None) -> None:
    """Tell what the store knows, how old it is and from which machine, and the latest policy."""
    from store.inventory import inventory
    from tuner import report as reports
    from tuner.cli.inventory_table import inventory_table

    place = location.existing_store(store)
    with EvidenceStore.open(place) as evidence_store:
        entries = inventory(evidence_store)
        text = evidence_store.latest_policy()
        policy = None if text is None else answers.read_policy(evidence_store, text)
    say(f"store {location.store_name(place)}")
    _console().print(inventory_table(entries, datetime.now(UTC)))
    if policy is not None:
        _console().print(reports.table(policy))


@app.command()
def lookup(
    target: flags.TunedTarget = None,
    batch_size: flags.AskedBatch = 1,
    context: flags.AskedContext = None,
    domain: flags.AskedDomain = None,
    temperature: flags.AskedTemperature = None,
    form: flags.Form = None,
    engine_version: flags.EngineVersion = None,
    require: flags.Require = None,
    environment: flags.MachineFile = None,
    device: flags.AskedDevice = None,
    store: flags.Store = None,
    json_only: flags.JsonOnly = False,
) -> None:
    """Answer which setup to use on this machine and how well that is known; loads no torch and changes nothing."""
    if engine_version is not None and form is None:
        raise InputError(f"engine version {engine_version!r}: --format must say of which engine")
    if device is not None and environment is not None:
        raise InputError(f"device {device!r}: --environment says which device it is")
    engine = messages.engine_asked(form)
    level = _level(require)
    question = answers.Question(
        target=target, batch_size=batch_size, context_length=context, domain=domain, temperature=temperature
    )
    here = machine.read_machine(environment, engine) if environment else machine.this_machine(engine, device)
    place = location.existing_store(store)
    with EvidenceStore.open_read_only(place) as evidence_store:
        found = answers.lookup(evidence_store, question, here)
        if json_only:
            print_json(messages.lookup_document(found, evidence_store, location.store_name(place)))
    if not found.reaches(level):
        raise MatchError(f"{found.caveat}; required was {level}")
    if not json_only:
        text, asides = messages.lookup_text(found, form, engine_version)
        say_aside(*asides)
        typer.echo(text, nl=False)


def _level(name: str | None) -> Level:
    """Raises InputError: no such match level."""
    found = next((level for level in LEVELS if level == (name or "none")), None)
    if found is None:
        raise InputError(f"required match {name!r}: allowed are {', '.join(LEVELS)}")
    return found


@app.command()
def explain(
    target: flags.TunedTarget = None,
    batch_size: flags.AskedBatch = 1,
    context: flags.AskedContext = None,
    domain: flags.AskedDomain = None,
    temperature: flags.AskedTemperature = None,
    instead: Annotated[str | None, typer.Option(help="A setup as tables name it: why it was not chosen.")] = None,
    store: flags.Store = None,
    json_only: flags.JsonOnly = False,
) -> None:
    """Say why this setup and not that one: where a round's time goes, and what drafting must yield to pay."""
    from tuner.report import explain as explains

    with EvidenceStore.open(location.existing_store(store)) as evidence_store:
        policy = latest.find_policy(evidence_store, target)
        report_data = latest.find_report_data(evidence_store, policy)
    answer = _ask(policy, batch_size, context, domain, temperature)
    figures = [anchor for anchor in report_data.anchors if anchor.choice.filtered_point == answer.choice.filtered_point]
    if not figures:
        raise NotMeasuredError(f"the last run did not decide this: {answer.rule}; run `tune.py run` for it")
    found = explains.explain(figures[0], instead)
    if json_only:
        print_json(found.to_json())
    else:
        say(*explains.sentences(found))
        _console().print(explains.comparison(found.accounts))


@app.command()
def report(
    out_path: Annotated[Path, typer.Option("--out", help="The page (.html) or picture (.png, .svg) to write.")],
    target: flags.TunedTarget = None,
    store: flags.Store = None,
) -> None:
    """Draw the latest run: a page with everything, or the chart of output tokens per second as a picture."""
    from tuner.report import page

    with EvidenceStore.open(location.existing_store(store)) as evidence_store:
        report_data = latest.find_report_data(evidence_store, latest.find_policy(evidence_store, target))
    page.write(report_data, out_path)
    say_aside(f"wrote {out_path}")


def _ask(
    policy: policies.Policy, batch_size: int, context: int | None, domain: str | None, temperature: float | None
) -> policies.Answer:
    """The policy's answer; without a temperature, at the one that was tuned last."""
    asked = policy.headline.temperature if temperature is None else temperature
    return policy.look_up(batch_size=batch_size, context_length=context, domain=domain, temperature=asked)


def _limits(asked: flags.RunFlags) -> "Limits":
    """Raises InputError: a limit not above 0, or another objective than those that are known."""
    from tuner.search.limits import Limits

    if asked.objective not in OBJECTIVES:
        raise InputError(f"objective {asked.objective!r}: allowed are {', '.join(OBJECTIVES)}")
    return Limits(max_memory_gib=asked.max_memory, max_ttft_ms=asked.max_ttft, max_p95_tpot_ms=asked.max_p95_tpot)


def _deadline(budget: float | None) -> Callable[[], bool]:
    """Tells whether `budget` seconds from now are over; never when there is no budget."""
    if budget is not None and not budget > 0.0:
        raise InputError(f"budget {budget:g} seconds: more than 0 is needed")
    deadline = math.inf if budget is None else time.monotonic() + budget
    return lambda: time.monotonic() > deadline


def _print_rehearsal(found: "DryRun", json_only: bool) -> int:
    """What a run would measure; nothing was."""
    if not json_only:
        from tuner import dry_run

        _console().print(dry_run.units_table(found))
        _console().print(f"{found.known_units} units are known; measuring the rest takes about {found.seconds:.0f} s")
    print_json(asdict(found))
    return 0


def _exit_code(done: "FinishedRun") -> int:
    """0: something was proven. 5: nothing was, so the choice is plain decoding. 6: nothing is within the limits."""
    own = done.policy.choices[: len(done.outcome.choices)]  # then come those of earlier runs
    if any(choice.proven for choice in own):
        return 0
    return EXIT_NOTHING_FEASIBLE if done.outcome.points[0].ruled_out(PLAIN) else EXIT_NOT_PROVEN


def _console(stderr: bool = False) -> "Console":
    """For tables; made where one is printed, because a look-up has no time to import rich."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _usage_message(error: TyperException) -> str:
    """typer's sentence, and the value that it could not read, which it leaves out."""
    unread: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()  # pydantic's
    return error.format_message() + (f", not {unread[0]['input']!r}" if unread else "")


def main() -> None:
    """Runs the asked verb; every failure is one line on stderr and the exit code that README lists."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # what typer makes of Ctrl-C outside of the measuring
            say_aside("error: interrupted")
        sys.exit(code)
    except OSError as error:  # all others are translated where they arise
        say_aside(f"error: output: {error.strerror or error}")
        sys.exit(2)
    except TyperException as error:
        say_aside(f"error: {_usage_message(error)}")
        sys.exit(2)
    except DraftpickError as error:
        say_aside(f"error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
