"""`run`: measure, decide, prove, and write the policy."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from profiles import builtin
from profiles.hardware.device import ENGINE
from profiles.records.core import PLAIN, Environment
from profiles.records.draft_spec import parse_age, parse_lengths, with_composites
from profiles.records.errors import InputError
from tuner.cli import options
from tuner.cli.check import drafts_for
from tuner.cli.messages import EXIT_NOT_PROVEN, EXIT_NOTHING_FEASIBLE, prompt_notes, router_line, run_summary
from tuner.cli.output import console, print_json, print_lines, print_notes

if TYPE_CHECKING:
    from profiles.engines.bench import Bench, Question
    from profiles.engines.factory import EngineSpec
    from profiles.prompts.reader import Request, Requests
    from store.database import Location
    from tuner.dry_run import Loads
    from tuner.pipeline.trial import Options
    from tuner.run import FinishedRun


def run(
    target: options.Target = builtin.TARGET,
    draft: options.Drafts = None,
    engine: options.Engine = None,
    engine_command: options.EngineCommand = None,
    launch: options.Launch = None,
    kind: options.Kind = None,
    engine_version: options.EngineVersion = None,
    threads: options.Threads = None,
    engine_arg: options.EngineArgs = None,
    lengths: options.Lengths = "1-8",
    batch_size: options.BatchSizes = None,
    context: options.Contexts = None,
    prompts: options.Prompts = None,
    num_prompts: options.NumPrompts = None,
    domain: options.Domain = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    dtype: options.DType = None,
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = 64,
    store: options.Store = None,
    objective: options.Objective = "tpot",
    max_memory: options.MaxMemory = None,
    max_ttft: options.MaxTtft = None,
    max_p95_tpot: options.MaxP95Tpot = None,
    budget: options.Budget = None,
    max_age: options.MaxAge = None,
    dry_run: options.DryRun = False,
    seed: options.Seed = 0,
    json_only: options.JsonOnly = False,
) -> int:
    """Measure every draft at every length, choose, prove the choice, and write the policy."""
    engine = engine or _default_engine(target, draft, device)
    spec = options.engine_spec(
        engine, device, engine_command=engine_command, launch=launch, kind=kind, engine_version=engine_version,
        threads=threads, engine_arg=engine_arg,
    )  # fmt: skip
    seconds_left = _seconds_left(budget)
    max_age_s = None if max_age is None else parse_age(max_age)
    with console(stderr=True).status("loading"):
        from profiles.engines.bench import Question
        from store.location import store_name
        from tuner.pipeline.trial import Options
        from tuner.run import utc_ago
        from tuner.search.limits import Limits

        since = utc_ago(max_age_s)
        limits = Limits(max_memory_gib=max_memory, max_ttft_ms=max_ttft, max_p95_tpot_ms=max_p95_tpot)
        question = Question(
            lengths=parse_lengths(lengths),
            batch_sizes=tuple(dict.fromkeys(batch_size or [1])),
            contexts=tuple(dict.fromkeys(context or [])),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            engine=engine,
        )
        requests = _read_requests(prompts, domain, num_prompts, seed)
        store_location = _checked_location(store, device, dry_run=dry_run)  # before models are loaded
        bench = _open_bench(spec, question, target, draft, dtype=dtype)
    with contextlib.closing(bench):  # ends the servers that it started
        loads = _loads_of(bench, question, requests)
        print_notes(f"target {target} on {_describe(bench.engine.environment)}; store {store_name(store_location)}")
        print_notes(*(f"left out: {refused.name}: {refused.detail}" for refused in bench.refused))
        tuner_options = Options(
            lengths=question.lengths,
            objective=objective,
            limits=limits,
            needed_bytes=bench.needed_bytes,
            refused=bench.refused,
        )
        if dry_run:
            return _dry_run(bench, loads, store_location, tuner_options, since=since, json_only=json_only)
        finished = _tune(bench, loads, store_location, tuner_options, since=since, seconds_left=seconds_left)
    return _print_finished(finished, requests, store_location, seed=seed, json_only=json_only)


def _default_engine(target: str, drafts: list[str] | None, device: str | None) -> options.EngineName:
    from profiles.engines.factory import default_engine

    engine, reason = default_engine(target, drafts_for(target, drafts), device)
    print_notes(*([] if reason is None else [reason]))
    return engine


def _seconds_left(budget: float | None) -> Callable[[], float]:
    """What is left of `budget` seconds from now; infinite without a budget."""
    if budget is not None and not budget > 0.0:
        raise InputError(f"budget {budget:g} seconds: more than 0 is needed")
    deadline = math.inf if budget is None else time.monotonic() + budget
    return lambda: deadline - time.monotonic()


def _check_load(device: str | None) -> None:
    """Says what other programs use of the processor, before torch starts its threads."""
    from profiles.hardware.nvml import first_gpu
    from profiles.timing.clock import PATIENCE, max_other_cores

    on_gpu = device != "cpu" and first_gpu() is not None
    load = PATIENCE.check_start(max_other_cores(["cuda"] if on_gpu else []))
    print_notes(*filter(None, [load]))


def _checked_location(store: str | None, device: str | None, *, dry_run: bool) -> "Location":
    """The store's location. A run opens store and studies once, and says how busy the machine is. Raises StoreError."""
    from store import location
    from store.evidence_store import EvidenceStore
    from tuner.run import TuningSession

    store_location = location.store_location(store)
    if not dry_run:
        with EvidenceStore.open(store_location) as evidence_store:
            TuningSession.of(evidence_store)
        _check_load(device)
    return store_location


def _open_bench(
    spec: "EngineSpec", question: "Question", target: str, drafts: list[str] | None, *, dtype: str | None
) -> "Bench":
    from profiles.engines import factory
    from profiles.engines.openai.launch import server_kind
    from profiles.engines.torch import load

    if spec.engine == "torch":
        specs = with_composites(drafts_for(target, drafts))
        longest_context = max(question.contexts, default=question.max_new_tokens)
        return load.load(target, specs, dtype, spec.device, longest_context * max(question.batch_sizes))
    engine_kind = server_kind(spec.kind if spec.engine == "server" else spec.engine)
    builtin_drafts = builtin.GGUF_MODELS[1:] if engine_kind.reads_gguf else builtin.DRAFTS
    specs = drafts_for(target, drafts, engine_kind.look_up, builtin_drafts)
    spec = replace(
        spec, max_requests=max(question.batch_sizes), min_length=min(question.lengths), max_length=max(question.lengths)
    )
    return factory.open_bench(spec, factory.ModelSpec(target=target, drafts=tuple(specs), dtype=dtype))


def _read_requests(prompts: list[str] | None, domain: str | None, num_prompts: int | None, seed: int) -> "Requests":
    from profiles.prompts import reader

    requests = reader.read_all(prompts or [builtin.ALL_PROMPTS], domain=domain)
    return requests if num_prompts is None else reader.sample(requests, num_prompts, seed)


def _loads_of(bench: "Bench", question: "Question", requests: "Requests") -> "Loads":
    """Every workload with its prompts; whatever cannot be run is refused here."""
    from profiles.engines import workloads
    from tuner.pipeline.points import plan_points

    loads, warnings = workloads.workloads_of(bench, question, requests)
    for workload, tokenized in loads:
        plan_points(workload, tokenized)  # refuses a domain's name before anything is measured
    too_few = prompt_notes(Counter(prompt.domain for prompt in loads[0][1]))
    print_notes(*(loaded.note for loaded in bench.loaded if loaded.note is not None), *bench.notes, *warnings, *too_few)
    return loads


def _describe(environment: Environment) -> str:
    """The device, and the engine where it is not draftpick's own or its times are not to be served by."""
    if environment.engine == ENGINE and environment.compute_capability is None:
        return environment.device
    if environment.engine == ENGINE:
        return f"{environment.device}, torch engine: a reference, its times on a GPU are not a serving engine's"
    return f"{environment.device}, {environment.engine} {environment.engine_version}"


def _tune(
    bench: "Bench",
    loads: "Loads",
    store_location: "Location",
    tuner_options: "Options",
    *,
    since: str,
    seconds_left: Callable[[], float],
) -> "FinishedRun":
    from store.evidence_store import EvidenceStore
    from tuner import run as runs
    from tuner.cli.progress import StageProgress
    from tuner.pipeline.pipeline import Watch

    with EvidenceStore.open(store_location) as evidence_store, StageProgress(console(stderr=True)) as progress:
        session = runs.TuningSession.of(evidence_store, since)
        watch = Watch(
            progress=progress.update,
            out_of_time=lambda: seconds_left() < 0.0,
            seconds_left=seconds_left,
        )
        return runs.tune(bench.engine, loads, session, tuner_options, watch)


def _dry_run(
    bench: "Bench", loads: "Loads", store_location: "Location", tuner_options: "Options", *, since: str, json_only: bool
) -> int:
    from tuner import dry_run as dry_runs

    plan = dry_runs.dry_run(bench.engine, loads, store_location, tuner_options, since)
    if not json_only:
        print_lines(*(f"{stage}: {count} units to measure" for stage, count in plan.new_units.items()))
        print_lines(f"{plan.known_units} units are stored; measuring the rest takes about {plan.seconds:.0f} s")
    print_json(asdict(plan))
    return 0


def _print_finished(
    finished: "FinishedRun", requests: "list[Request]", store_location: "Location", *, seed: int, json_only: bool
) -> int:
    """Prints the outcome, trains the router, and returns the exit code.

    0: a draft is proven. 5: none is, and plain decoding is the choice. 6: plain decoding itself breaks a limit.
    """
    from profiles.prompts import reader
    from store.location import store_name
    from tuner.report import tables
    from tuner.router.router import train_and_save

    policy = finished.policy
    labelled = [(reader.user_text(request), request.domain) for request in requests]
    router = train_and_save(labelled, finished.policy_path.with_name(policy.router_name), seed)
    if not json_only:
        console().print(tables.table(policy))
        print_lines(*run_summary(finished), router_line(router))
    document = tables.document(
        policy, cost=finished.cost, store=store_name(store_location), policy_path=str(finished.policy_path)
    )
    left_out = [asdict(refused) for refused in finished.left_out]
    print_json({**document, "router": router, "left_out": left_out})
    choices_of_run = policy.choices[: len(finished.outcome.choices)]  # then come those of earlier runs
    if any(choice.proven for choice in choices_of_run):
        return 0
    return EXIT_NOTHING_FEASIBLE if finished.outcome.points[0].ruled_out(PLAIN) else EXIT_NOT_PROVEN
