"""`search`: the fastest setup of a large space by forecasts, or configuration of those that start an engine anew."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from profiles import builtin
from profiles.records.core import PLAIN, Setup
from profiles.records.draft_spec import parse_draft, with_composites
from profiles.records.errors import require
from tuner.cli import options
from tuner.cli.check import drafts_for
from tuner.cli.messages import EXIT_NOTHING_FEASIBLE
from tuner.cli.output import print_json, print_lines, print_notes

if TYPE_CHECKING:
    from profiles.engines.factory import EngineSpec
    from profiles.prompts.reader import Request
    from tuner.search.configurations import Configuration, Measure, Trial

COMMON_OPTIONS = ("draft", "k", "batch_size", "dtype", "threads")  # of every engine; others are the engine's own


def search(
    space: options.SpaceFile = None,
    target: options.Target = builtin.TARGET,
    draft: options.Drafts = None,
    engine: options.SearchEngine = "torch",
    engine_command: options.EngineCommand = None,
    launch: options.Launch = None,
    kind: options.Kind = None,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 64,
    device: options.Device = None,
    budget: options.SearchBudget = 600.0,
    max_memory: options.MaxMemory = None,
    max_p95_tpot: options.MaxP95Tpot = None,
    store: options.Store = None,
    seed: options.Seed = 0,
    json_only: options.JsonOnly = False,
) -> int:
    """Search look-up windows and lengths up to 64 by forecasts; with --space, what needs an engine to start anew."""
    spec = options.engine_spec(engine, device, engine_command=engine_command, launch=launch, kind=kind)
    from profiles.prompts import reader
    from store import location
    from store.evidence_store import EvidenceStore
    from tuner.run import TuningSession
    from tuner.search.configurations import ConfigurationSearch, read_space

    if space is None:
        fits = engine == "torch" and max_memory is None and max_p95_tpot is None
        require(fits, f"engine {engine} or a limit without --space: forecasts are torch's and have none; give --space")
        return _search_forecasts(
            target, draft, prompts, max_new_tokens=max_new_tokens, device=device, store=store, json_only=json_only
        )
    values = read_space(space)
    requests = reader.sample(reader.read_all(prompts or [builtin.ALL_PROMPTS]), 64, seed)
    starter = Starter(spec=spec, target=target, requests=requests, max_new_tokens=max_new_tokens, seed=seed)
    configuration_search = ConfigurationSearch(
        space=values,
        start=starter,
        budget_s=budget,
        max_memory_gib=math.inf if max_memory is None else max_memory,
        max_p95_tpot_ms=math.inf if max_p95_tpot is None else max_p95_tpot,
        show=lambda trial: print_notes(_line(trial)),
        seed=seed,
    )
    with EvidenceStore.open(location.store_location(store)) as evidence_store:
        best = configuration_search.run(
            TuningSession.of(evidence_store).studies, f"configurations of {target} on {engine}"
        )
    if json_only:
        trials = [asdict(trial) for trial in configuration_search.trials]
        print_json({"best": None if best is None else asdict(best), "trials": trials})
    elif best is not None:
        print_lines(f"fastest: {_line(best)}; prove it: `run` with these options")
    else:
        print_lines("nothing could be started, or all broke a limit")
    return EXIT_NOTHING_FEASIBLE if best is None else 0


def _search_forecasts(
    target: str,
    drafts: list[str] | None,
    prompts: list[str] | None,
    *,
    max_new_tokens: int,
    device: str | None,
    store: str | None,
    json_only: bool,
) -> int:
    """The cheap level on the torch engine, with the store's evidence where it has some."""
    from profiles.engines import workloads
    from profiles.engines.bench import Question
    from profiles.engines.torch import load
    from store import location
    from store.cached_engine import CachedEngine
    from store.evidence_store import EvidenceStore, Scope
    from tuner.search.space import search_space

    bench = load.load(target, with_composites(drafts_for(target, drafts)), None, device)
    question = Question(lengths=(1, 2, 3, 4, 5, 6, 7, 8), max_new_tokens=max_new_tokens)
    ((workload, encoded),), notes = workloads.workloads(bench, question, prompts or [builtin.ALL_PROMPTS])
    print_notes(*notes)
    with EvidenceStore.open(location.store_location(store)) as evidence_store:
        engine = CachedEngine(bench.engine, evidence_store)
        evidence_store.save_run(
            Scope(target=engine.target, environment=engine.environment, workload=workload), list(encoded)
        )
        rows = search_space(engine, workload, encoded, question.lengths, (None,))
    if json_only:
        print_json({"setups": [{"setup": row.setup.name, **asdict(row)} for row in rows]})
    else:
        lines = (f"{row.setup.name}: {row.speedup:.2f}, {row.selected:.2f} where it was selected" for row in rows[:5])
        print_lines(*lines, "forecasts only: `run --draft DRAFT --lengths K` proves one")
    return 0


def _line(trial: "Trial") -> str:
    options_text = ", ".join(f"{name} {value}" for name, value in trial.configuration.items())
    if trial.measurement is None:
        return f"{options_text}: failed: {trial.reason}"
    result = f"{options_text}: {trial.measurement.tok_per_s:.4g} tok/s on {trial.num_prompts} prompts"
    return f"{result}; {trial.reason}" if trial.reason else result


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """Starts an engine with a configuration; what it measures is kept in the study alone, no evidence is stored."""

    spec: "EngineSpec"
    target: str
    requests: "list[Request]"
    max_new_tokens: int
    seed: int

    @contextmanager
    def __call__(self, configuration: "Configuration") -> "Iterator[Measure]":
        import numpy

        from profiles.engines import workloads
        from profiles.engines.bench import Question
        from tuner.search.configurations import Measurement

        length, batch_size = int(configuration.get("k", 0)), int(configuration.get("batch_size", 1))
        draft = str(configuration.get("draft", "none"))
        matches = (length == 0) == (draft == "none")
        require(matches, f"draft {draft!r} with k {length}: a draft needs a length, and plain decoding none")
        question = Question(
            lengths=(max(1, length),), batch_sizes=(batch_size,), max_new_tokens=self.max_new_tokens, seed=self.seed,
            engine=self.spec.engine,
        )  # fmt: skip
        bench = _open(self.spec, self.target, draft, configuration)
        try:
            ((workload, encoded),), _ = workloads.workloads_of(bench, question, self.requests)
            setup = Setup(draft=bench.engine.drafts[0], length=length) if length else PLAIN

            def measure(num_prompts: int) -> Measurement:
                queue = encoded[: num_prompts * batch_size]
                samples = bench.engine.run_together(workload, queue, (setup,), f"search {num_prompts}")
                timed = [sample for sample in samples if sample.output_tokens > 1]
                seconds = sum(sample.decode_s for sample in timed)
                tokens = sum(sample.output_tokens - 1 for sample in timed)
                needed = bench.needed_bytes(setup, workload)
                each_ms = [1e3 * sample.decode_s / (sample.output_tokens - 1) for sample in timed]
                return Measurement(
                    tok_per_s=batch_size * tokens / seconds,
                    memory_gib=None if needed is None else needed / 2**30,
                    p95_tpot_ms=float(numpy.percentile(each_ms, 95)),
                )

            yield measure
        finally:
            bench.close()


def _open(spec: "EngineSpec", target: str, draft: str, configuration: Mapping[str, Any]) -> Any:
    """The engine with the configuration's options. Raises InputError: an option that the engine does not have."""
    engine_options = {name: value for name, value in configuration.items() if name not in COMMON_OPTIONS}
    dtype, threads = configuration.get("dtype"), configuration.get("threads")
    specs = [] if draft == "none" else [parse_draft(draft)]
    if spec.engine == "torch":
        has = f"--engine torch has no such option; it has {', '.join(COMMON_OPTIONS)}"
        require(not engine_options, f"{', '.join(engine_options)}: {has}")
        import torch

        from profiles.engines.torch import load

        bench = load.load(target, specs, dtype, spec.device)
        torch.set_num_threads(int(threads or torch.get_num_threads()))
        return bench
    from profiles.engines import factory

    launch = spec.launch
    if launch is not None:
        for name, value in engine_options.items():
            launch = launch.replace(f"{{{name}}}", str(value))
    options_text = tuple(f"{name}={value}" for name, value in engine_options.items())
    spec = replace(
        spec,
        launch=launch,
        threads=threads,
        engine_args=options_text if spec.engine == "vllm" else (),
        max_requests=int(configuration.get("batch_size", 1)),
        max_length=max(1, int(configuration.get("k", 0))),
    )
    return factory.open_bench(spec, factory.ModelSpec(target=target, drafts=tuple(specs), dtype=dtype))
