"""A large space of setups, searched by forecasts: `python -m tests.benchmarks.search`.

Drafts x k = 1..64 x look-up windows x confidence stops of the family that ships, on evidence recorded on one machine
(`--record` records it anew, in minutes), so that every machine prints the same regrets. Every setup is forecast, which
is what `draftpick search` does; Optuna's TPE (warm-started at the grid of a run) and random draws get 5 % of the
space. Prompts of a domain in thirds: one selects, one estimates the best 20 of that again, one that neither has seen
grades. Then engine configurations that are made up, at equal seconds. `--measure SECONDS` runs the pick of the copy
domain beyond k = 8 against k = 8, on prompts that chose neither. The last line is one JSON document.
"""

import gzip
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import optuna

from profiles import builtin
from profiles.engines.torch import load
from profiles.records import codec, draft_spec
from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import AcceptanceTrace, Sample, StepTimes, TargetTrace
from profiles.stats import median, speedup_interval
from tests.benchmarks.common import LENGTHS, arguments, family, finish
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.pipeline.points import plan_points
from tuner.search.configurations import ConfigurationSearch, Measure, Measurement
from tuner.search.objective import candidates
from tuner.search.space import MAX_LENGTH, NUM_ESTIMATED, Space, SpaceForecaster, point_setup

SHARE = 0.05  # of the space that TPE and random draws may evaluate
BATCH = 10  # trials asked for at once
NUM_HOPEFUL = 500  # of which the best on unseen prompts is known
TOKENS = 64
RECORDED = Path(__file__).parent / "data" / "search.json.gz"
Speedup = Callable[[Setup], float]
Search = Callable[[Space, Speedup, Sequence[Setup], int], dict[Setup, float]]  # the last is the seed


def num_evaluations(space: Space) -> int:
    return round(SHARE * len(space.setups()))


def tpe(space: Space, speedup: Speedup, grid: Sequence[Setup], seed: int) -> dict[Setup, float]:
    """Optuna's TPE by ask and tell, warm-started at the grid; a setup that it proposes again is no evaluation."""
    evaluations = num_evaluations(space)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0, n_ei_candidates=8)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    values: dict[Setup, float] = {}
    for setup in grid:
        study.enqueue_trial(parameters(space, setup))
    for _ in range(6 * evaluations // (5 * BATCH)):  # some are repeats
        for trial, setup in [ask(study, space) for _ in range(BATCH)]:
            if len(values) < evaluations or setup in values:
                values[setup] = speedup(setup)
                study.tell(trial, values[setup])
        if len(values) >= evaluations:
            break
    return values


def parameters(space: Space, setup: Setup) -> dict[str, Any]:
    draft = setup.draft
    assert draft is not None
    windows, stops = space.choices(draft)
    given: dict[str, Any] = {"draft": draft.name, "k": setup.length}
    if len(windows) > 1:
        given |= {"longest": draft.max_match, "shortest": draft.min_match}
    return given | ({"stop": stops.index(setup.stop_below)} if len(stops) > 1 else {})


def ask(study: optuna.Study, space: Space) -> tuple[optuna.Trial, Setup]:
    """The next trial and the setup that it stands for."""
    trial = study.ask()
    drafts = {draft.name: draft for draft in space.drafts}
    draft = drafts[trial.suggest_categorical("draft", list(drafts))]
    windows, stops = space.choices(draft)
    window, stop = None, None
    length = trial.suggest_int("k", 1, space.max_length, log=True)
    if len(windows) > 1:
        most = max(longest for longest, _ in space.windows)
        longest = trial.suggest_int("longest", 1, most)
        window = longest, min(longest, trial.suggest_int("shortest", 1, most))
    if len(stops) > 1:
        stop = stops[trial.suggest_int("stop", 0, len(stops) - 1)]
    return trial, point_setup(draft, length, window, stop)


def drawn(space: Space, speedup: Speedup, grid: Sequence[Setup], seed: int) -> dict[Setup, float]:
    """Random setups, without the grid."""
    return {setup: speedup(setup) for setup in random.Random(seed).sample(space.setups(), num_evaluations(space))}


def grid_only(space: Space, speedup: Speedup, grid: Sequence[Setup], seed: int) -> dict[Setup, float]:
    """What a run without this search has."""
    return {setup: speedup(setup) for setup in grid}


def every(space: Space, speedup: Speedup, grid: Sequence[Setup], seed: int) -> dict[Setup, float]:
    """What `draftpick search` does."""
    return {setup: speedup(setup) for setup in space.setups()}


SEARCHES: dict[str, Search] = {"tpe": tpe, "random": drawn, "grid": grid_only, "every": every}
DRAWING = ("tpe", "random")


def grade(
    forecaster: SpaceForecaster, values: dict[Setup, float], best: float, thirds: Sequence[Sequence[Prompt]]
) -> dict[str, Any]:
    """Regret on the prompts that selected, and what the choice is worth on prompts that it has not seen."""
    _, again, unseen = thirds
    ranked = sorted(values, key=values.__getitem__, reverse=True)
    first = max(ranked[:NUM_ESTIMATED], key=lambda setup: forecaster.speedup(setup, again))
    return {
        "regret": best / values[ranked[0]] - 1.0,
        "promised": values[ranked[0]],
        "unseen_at_once": forecaster.speedup(ranked[0], unseen),
        "unseen": forecaster.speedup(first, unseen),
        "setup": first.name,
        "evaluations": len(values),
    }


def configurations(num_seeds: int) -> dict[str, Any]:
    """The expensive level on made-up engines: TPE, with and without forecasts, against random draws at equal seconds.

    Options multiply the rate, two of them interact, runs are noisy, a start takes 20 s and some fail; the budget pays
    for about 6 % of 720 configurations. A forecast is off by 20 %.
    """
    options = {
        "threads": (1, 2, 4, 8, 16), "dtype": ("float32", "bfloat16", "int8"), "batch_size": (1, 2, 4, 8, 16, 32),
        "attention": ("eager", "sdpa"), "block": (16, 32, 64, 128),
    }  # fmt: skip
    every = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    regrets: dict[str, list[float]] = {"tpe": [], "tpe_with_forecasts": [], "random": []}
    for seed, name in itertools.product(range(num_seeds), regrets):
        rng = numpy.random.default_rng(seed)
        effects = {
            option: dict(zip(values, rng.normal(0.0, 0.25, len(values)), strict=True))
            for option, values in options.items()
        }
        together = {pair: rng.normal(0.0, 0.1) for pair in itertools.product(options["threads"], options["batch_size"])}

        def rate(configuration: Mapping[str, Any], effects: Any = effects, together: Any = together) -> float:
            total = sum(effects[option][value] for option, value in configuration.items())
            return 100.0 * math.exp(total + together[configuration["threads"], configuration["batch_size"]])

        def fails(configuration: Mapping[str, Any]) -> bool:
            return configuration["dtype"] == "int8" and configuration["batch_size"] == 32

        clock = [0.0]

        @contextmanager
        def start(
            configuration: Mapping[str, Any], clock: list[float] = clock, rate: Any = rate, rng: Any = rng
        ) -> Iterator[Measure]:
            clock[0] += 20.0
            if fails(configuration):
                raise EngineError("out of memory")

            def measure(num_prompts: int) -> Measurement:
                clock[0] += num_prompts
                return Measurement(tok_per_s=rate(configuration) * math.exp(rng.normal(0.0, 0.06 / num_prompts**0.5)))

            yield measure

        drawn_for = rng.permutation(len(every))[:100] if name == "tpe_with_forecasts" else []
        search = ConfigurationSearch(
            space=options, start=start, budget_s=1200.0, clock=lambda clock=clock: clock[0], seed=seed,
            priors=[(every[index], rate(every[index]) * math.exp(rng.normal(0.0, 0.2))) for index in drawn_for],
            sampler=optuna.samplers.RandomSampler(seed=seed) if name == "random" else None,
        )  # fmt: skip
        best = search.run()
        assert best is not None
        most = max(rate(configuration) for configuration in every if not fails(configuration))
        regrets[name].append(most / rate(best.configuration) - 1.0)
    document = {f"configuration_regret_{name}": interval(values) for name, values in regrets.items()}
    print("engine configurations at equal seconds", document)
    return document


def interval(values: Sequence[float]) -> list[float]:
    """Mean and its 95 % interval over seeds and domains."""
    mean = float(numpy.mean(values))
    half = 1.96 * float(numpy.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]


def record(path: Path) -> None:
    """Gathers evidence of the space on the prompts that choose in `make tune`, and writes what forecasts need of it.

    Of step times the medians; look-ups are not written, because they follow from the traces.
    """
    bench, workload, prompts = family(10_000, TOKENS)
    chosen = plan_points(workload, prompts)[0].forecast_prompts
    evidence = gather(bench.engine, workload, chosen, (*LENGTHS, MAX_LENGTH), progress=lambda stage, *_: print(stage))
    models = [trace for trace in evidence.acceptances.values() if isinstance(trace, AcceptanceTrace)]
    document = {
        "workload": workload,
        "target_component": bench.engine.target.run_digest,
        "prompts": evidence.prompts,
        "traces": list(evidence.traces.values()),
        "acceptances": [
            replace(trace, confidences=tuple(round(value, 3) for value in trace.confidences)) for trace in models
        ],
        "steps": [
            replace(times, samples_s={width: (median(values),) for width, values in times.samples_s.items()})
            for times in evidence.steps.values()
        ],
        "calibration": evidence.calibration,
        "drafts": evidence.drafts,
    }
    path.write_bytes(gzip.compress(codec.to_json(document).encode(), mtime=0))


def recorded(path: Path) -> tuple[Evidence, Workload, str]:
    """The evidence in a file, its workload, and the digest of the target."""
    raw = codec.parse_json(gzip.decompress(path.read_bytes()), path.name)

    def records(kind: Any, name: str) -> tuple[Any, ...]:
        return tuple(codec.from_builtins(kind, entry, f"{path.name}.{name}") for entry in raw[name])

    runs = tuple(
        (codec.from_builtins(Setup, setup, path.name), codec.from_builtins(Sample, sample, path.name))
        for setup, sample in raw["calibration"]
    )
    evidence = Evidence(
        prompts=records(Prompt, "prompts"),
        traces={trace.prompt_digest: trace for trace in records(TargetTrace, "traces")},
        acceptances={(each.draft_digest, each.prompt_digest): each for each in records(AcceptanceTrace, "acceptances")},
        steps={times.component_digest: times for times in records(StepTimes, "steps")},
        calibration=runs,
        drafts=records(Draft, "drafts"),
        infeasible=(),
    )
    return evidence, codec.from_builtins(Workload, raw["workload"], path.name), raw["target_component"]


def measure_long_pick(priced: SpaceForecaster, evidence: Evidence, seconds: float) -> dict[str, Any]:
    """The copy domain's pick beyond the grid against the grid's pick, really run on prompts that chose neither."""
    _, workload, prompts = family(10_000, TOKENS)
    seen = {prompt.digest for prompt in evidence.prompts}
    fresh = [prompt for prompt in prompts if prompt.domain == "copy" and prompt.digest not in seen]
    copies = [prompt for prompt in evidence.prompts if prompt.domain == "copy"]
    halves = copies[::2], copies[1::2]
    within = [setup for setup in candidates(evidence.drafts, LENGTHS) if setup.draft is not None]
    beyond = [setup for setup in Space(drafts=evidence.drafts, stops=(None,)).setups() if setup.length > max(LENGTHS)]

    def pick(setups: Sequence[Setup]) -> Setup:
        ranked = sorted(setups, key=lambda setup: priced.speedup(setup, halves[0]), reverse=True)[:NUM_ESTIMATED]
        return max(ranked, key=lambda setup: priced.speedup(setup, halves[1]))

    short, long = pick(within), pick(beyond)
    specs = {setup.draft.name: draft_spec.parse_draft(setup.draft.name) for setup in (short, long) if setup.draft}
    bench = load.load(builtin.TARGET, list(specs.values()), None, None)
    columns: dict[Setup, list[float]] = {short: [], long: []}
    tokens: list[int] = []
    until = time.monotonic() + seconds
    for prompt in fresh:
        if time.monotonic() > until:
            break
        samples = bench.engine.run_together(workload, (prompt,), (short, long, long, short), "search")
        if samples[0].output_tokens > 1:
            tokens.append(samples[0].output_tokens - 1)
            columns[short].append(samples[0].decode_s + samples[3].decode_s)
            columns[long].append(samples[1].decode_s + samples[2].decode_s)
    ratio, _ = speedup_interval(columns[short], tokens, columns[long], tokens)
    forecast = priced.speedup(long, copies) / priced.speedup(short, copies)
    print(f"{long.name} against {short.name} on {len(tokens)} unseen prompts: {ratio}, forecast {forecast:.3f}")
    figures = [round(value, 4) for value in (ratio.estimate, ratio.low, ratio.high)]
    return {
        "long_pick": long.name,
        "short_pick": short.name,
        "long_over_short": figures,
        "forecast": round(forecast, 4),
    }


def compare(evidence: Evidence, priced: SpaceForecaster, num_seeds: int) -> dict[str, Any]:
    """Every search on every domain; prints a line for each. The slowest draft is left out: 10,000 setups are enough."""
    space = Space(drafts=tuple(draft for draft in evidence.drafts if "deep" not in draft.name))
    setups = space.setups()
    grid = candidates(space.drafts, LENGTHS)[1:]
    rows: list[dict[str, Any]] = []
    for domain in dict.fromkeys(prompt.domain for prompt in evidence.prompts):
        of_domain = [prompt for prompt in evidence.prompts if prompt.domain == domain]
        thirds = [of_domain[part::3] for part in range(3)]
        began_s = time.monotonic()
        values = {setup: priced.speedup(setup, thirds[0]) for setup in setups}
        print(f"{domain}: {len(setups)} setups forecast in {time.monotonic() - began_s:.1f} s", flush=True)
        best = max(values.values())
        hopeful = sorted(values, key=values.__getitem__)[-NUM_HOPEFUL:]
        oracle = max(priced.speedup(setup, thirds[2]) for setup in hopeful)
        for name, search in SEARCHES.items():
            for seed in range(num_seeds if name in DRAWING else 1):
                began_s = time.monotonic()
                row = grade(priced, search(space, values.__getitem__, grid, seed), best, thirds)
                seconds = time.monotonic() - began_s
                rows.append(
                    {"domain": domain, "search": name, "seed": seed, "oracle": oracle, "seconds": seconds, **row}
                )
            print(
                f"{domain:6} {name:12} regret {row['regret']:.4f} promised {row['promised']:.3f} unseen "
                f"{row['unseen_at_once']:.3f}, estimated again {row['unseen']:.3f} of {oracle:.3f}: {row['setup']} "
                f"({seconds:.1f} s)",
                flush=True,
            )
    return document_of(rows, len(setups), num_evaluations(space))


def document_of(rows: Sequence[dict[str, Any]], size: int, evaluations: int) -> dict[str, Any]:
    document: dict[str, Any] = {"benchmark": "search", "space": size, "evaluations": evaluations, "rows": rows}
    for name in SEARCHES:
        of_search = [row for row in rows if row["search"] == name]
        document[f"regret_{name}"] = interval([row["regret"] for row in of_search])
        document[f"seconds_{name}"] = round(median(row["seconds"] for row in of_search), 2)
        document[f"held_out_regret_{name}"] = interval([row["oracle"] / row["unseen"] - 1.0 for row in of_search])
        document[f"held_out_regret_at_once_{name}"] = interval(
            [row["oracle"] / row["unseen_at_once"] - 1.0 for row in of_search]
        )
        print(name, {key: document[f"{key}_{name}"] for key in ("regret", "held_out_regret", "seconds")})
    return document


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--record", action="store_true", help="record the evidence anew, on this machine")
    parser.add_argument("--measure", type=float, default=0.0, metavar="SECONDS", help="run the long pick as well")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.record:
        record(RECORDED)
    evidence, workload, target_component = recorded(RECORDED)
    priced = SpaceForecaster(evidence, workload, Forecaster(evidence, workload, target_component), MAX_LENGTH)
    document = compare(evidence, priced, options.seeds)
    if options.measure:
        document |= measure_long_pick(priced, evidence, options.measure)
    finish({**document, **configurations(5 * options.seeds)})


if __name__ == "__main__":
    main()
