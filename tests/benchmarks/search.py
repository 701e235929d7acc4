"""A large space of setups, searched by forecasts: `python -m tests.benchmarks.search [--store FOLDER]`.

Drafts x k = 1..64 x look-up windows x confidence stops of the family that ships. Every setup is forecast, so the regret
of a search is known. Optuna's TPE (warm-started at the old grid), random draws and hill climbing from the old grid
get the same number of evaluations, 5 % of the space. Prompts of a domain in thirds: one selects, one estimates the best
20 of that again, one that neither has seen grades. Then engine configurations that are made up, at equal seconds. The
last line is one JSON document.
"""

import argparse
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import optuna

from profiles.records.core import Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore, Scope
from tests.benchmarks.common import LENGTHS, family, finish
from tuner.forecast.evidence import Evidence, gather
from tuner.forecast.forecaster import Forecaster
from tuner.pipeline.points import plan_points
from tuner.search.configurations import ConfigurationSearch, Measure, Measurement
from tuner.search.objective import candidates
from tuner.search.space import MAX_LENGTH, Space, SpaceForecaster, climb, point_setup

SHARE = 0.05  # of the space that a search may evaluate
FILE = "evidence.db"
NUM_HOPEFUL = 500  # of which the best on unseen prompts is known
NUM_ESTIMATED = 20  # setups that are estimated again on other prompts
Search = Callable[[Space, Callable[[Setup], float], Sequence[Setup], int, int], dict[Setup, float]]


def tpe(
    space: Space, speedup: Callable[[Setup], float], grid: Sequence[Setup], evaluations: int, seed: int
) -> dict[Setup, float]:
    """Optuna's TPE by ask and tell, warm-started at the grid; a setup that it proposes again is no evaluation."""
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    names = {draft.name: draft for draft in space.drafts}
    values: dict[Setup, float] = {}
    for setup in grid[:evaluations]:
        values[setup] = speedup(setup)
        assert setup.draft is not None
        study.enqueue_trial(parameters(space, setup))
        study.tell(ask(study, space, names)[0], values[setup])
    for _ in range(2 * evaluations):
        if len(values) >= evaluations:
            break
        trial, setup = ask(study, space, names)
        if setup not in values:
            values[setup] = speedup(setup)
        study.tell(trial, values[setup])
    return values


def parameters(space: Space, setup: Setup) -> dict[str, Any]:
    draft = setup.draft
    assert draft is not None
    windows, stops = space.choices(draft)
    given: dict[str, Any] = {"draft": draft.name, "k": setup.length}
    if len(windows) > 1:
        given |= {"longest": draft.max_match, "shortest": draft.min_match}
    return given | ({"stop": stops.index(setup.stop_below)} if len(stops) > 1 else {})


def ask(study: optuna.Study, space: Space, names: dict[str, Draft]) -> tuple[optuna.Trial, Setup]:
    """The next trial and the setup that it stands for."""
    trial = study.ask()
    draft = names[trial.suggest_categorical("draft", list(names))]
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


def drawn(
    space: Space, speedup: Callable[[Setup], float], grid: Sequence[Setup], evaluations: int, seed: int
) -> dict[Setup, float]:
    """Random setups, without the grid."""
    return {setup: speedup(setup) for setup in random.Random(seed).sample(space.setups(), evaluations)}


def drawn_after_grid(
    space: Space, speedup: Callable[[Setup], float], grid: Sequence[Setup], evaluations: int, seed: int
) -> dict[Setup, float]:
    """The grid, then random setups."""
    setups = list(dict.fromkeys([*grid, *random.Random(seed).sample(space.setups(), evaluations)]))[:evaluations]
    return {setup: speedup(setup) for setup in setups}


def climbed(
    space: Space, speedup: Callable[[Setup], float], grid: Sequence[Setup], evaluations: int, seed: int
) -> dict[Setup, float]:
    """Hill climbing; it draws nothing, so all seeds are equal."""
    return climb(space, speedup, grid, evaluations)


def grid_only(
    space: Space, speedup: Callable[[Setup], float], grid: Sequence[Setup], evaluations: int, seed: int
) -> dict[Setup, float]:
    """What a run without this search has."""
    return {setup: speedup(setup) for setup in grid}


SEARCHES: dict[str, Search] = {
    "tpe": tpe, "random": drawn, "grid_random": drawn_after_grid, "climb": climbed, "grid": grid_only
}  # fmt: skip
DRAWING = ("tpe", "random", "grid_random")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, help="folder of a `make tune` on this machine, whose evidence is taken")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bench, workload, prompts = family(10_000, options.tokens)
    chosen = plan_points(workload, prompts)[0].forecast_prompts
    with tempfile.TemporaryDirectory() as folder, EvidenceStore.open((options.store or Path(folder)) / FILE) as store:
        engine = CachedEngine(bench.engine, store)
        store.save_run(Scope(target=engine.target, environment=engine.environment, workload=workload), list(prompts))
        evidence = gather(engine, workload, chosen, (*LENGTHS, MAX_LENGTH), progress=lambda stage, *_: print(stage))
    document = compare(evidence, workload, bench.engine.target.run_digest, options.seeds)
    finish({**document, **configurations(2 * options.seeds)})


def compare(evidence: Evidence, workload: Workload, target_component: str, num_seeds: int) -> dict[str, Any]:
    """Every search on every domain; prints a line for each."""
    forecaster = Forecaster(evidence, workload, target_component)
    priced = SpaceForecaster(evidence, workload, forecaster, MAX_LENGTH)
    space = Space(drafts=evidence.drafts)
    setups = space.setups()
    grid = candidates(evidence.drafts, LENGTHS)[1:]
    evaluations = round(SHARE * len(setups))
    print(f"{len(setups)} setups, {evaluations} evaluations, a grid of {len(grid)}")
    rows: list[dict[str, Any]] = []
    for domain in dict.fromkeys(prompt.domain for prompt in evidence.prompts):
        of_domain = [prompt for prompt in evidence.prompts if prompt.domain == domain]
        thirds = [of_domain[part::3] for part in range(3)]
        every = {setup: priced.speedup(setup, thirds[0]) for setup in setups}
        best = max(every.values())
        hopeful = sorted(every, key=every.__getitem__)[-NUM_HOPEFUL:]
        oracle = max(priced.speedup(setup, thirds[2]) for setup in hopeful)
        for name, search in SEARCHES.items():
            for seed in range(num_seeds if name in DRAWING else 1):
                values = search(space, every.__getitem__, grid, evaluations, seed)
                row = grade(priced, values, best, thirds)
                rows.append({"domain": domain, "search": name, "seed": seed, "oracle": oracle, **row})
            last = rows[-1]
            print(
                f"{domain:6} {name:12} regret {last['regret']:.4f} promised {last['promised']:.3f} unseen "
                f"{last['unseen_at_once']:.3f}, estimated again {last['unseen']:.3f} of {oracle:.3f}: {last['setup']}",
                flush=True,
            )
    return document_of(rows, len(setups), evaluations)


def document_of(rows: Sequence[dict[str, Any]], size: int, evaluations: int) -> dict[str, Any]:
    document: dict[str, Any] = {"benchmark": "search", "space": size, "evaluations": evaluations, "rows": rows}
    for name in SEARCHES:
        of_search = [row for row in rows if row["search"] == name]
        document[f"regret_{name}"] = interval([row["regret"] for row in of_search])
        document[f"held_out_regret_{name}"] = interval([row["oracle"] / row["unseen"] - 1.0 for row in of_search])
        document[f"held_out_regret_at_once_{name}"] = interval(
            [row["oracle"] / row["unseen_at_once"] - 1.0 for row in of_search]
        )
        print(name, {key: document[f"{key}_{name}"] for key in ("regret", "held_out_regret")})
    return document


if __name__ == "__main__":
    main()
