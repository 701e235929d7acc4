"""The expensive level of the search, on engines that are made up."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest

from profiles.records.errors import EngineError, InputError
from tests.support.cli import call
from tuner.search.configurations import Configuration, ConfigurationSearch, Measure, Measurement, read_space
from tuner.search.studies import open_storage

SPACE = {"threads": (2, 4, 8), "dtype": ("float32", "bfloat16"), "batch_size": (1, 4, 8)}


class World:
    """More of everything is faster; bfloat16 with 8 threads fails to start, batch 8 needs 8 GiB and takes 8 ms."""

    def __init__(self) -> None:
        self.now_s, self.started, self.prompts = 0.0, 0, 0

    @contextmanager
    def start(self, configuration: Configuration) -> Iterator[Measure]:
        self.started += 1
        self.now_s += 10.0
        threads, batch = int(configuration["threads"]), int(configuration["batch_size"])
        if configuration["dtype"] == "bfloat16" and threads == 8:
            raise EngineError("no memory")

        def measure(num_prompts: int) -> Measurement:
            self.now_s += num_prompts
            self.prompts += num_prompts
            rate = threads * batch * (3.0 if configuration["dtype"] == "bfloat16" else 1.0)
            return Measurement(tok_per_s=rate, memory_gib=float(batch), p95_tpot_ms=float(batch))

        yield measure

    def search(self, budget_s: float = 1e9, **changes: object) -> ConfigurationSearch:
        values = {"space": SPACE, "start": self.start, "budget_s": budget_s, "clock": lambda: self.now_s, **changes}
        return ConfigurationSearch(**values)  # type: ignore[arg-type]


def test_a_small_space_is_exhausted_and_failed_starts_are_told(tmp_path: Path) -> None:
    world, storage = World(), open_storage(tmp_path / "studies.db")
    search = world.search()
    best = search.run(storage, "configurations")
    assert best.configuration == {"threads": 4, "dtype": "bfloat16", "batch_size": 8}
    assert world.started == len(search.trials) == 18
    failed = [trial for trial in search.trials if trial.measurement is None]
    assert {trial.reason for trial in failed} == {"no memory"}
    assert storage is not None
    states = [trial.state for trial in optuna.load_study(study_name="configurations", storage=storage).trials]
    assert states.count(optuna.trial.TrialState.FAIL) >= len(failed) == 3


def test_few_configurations_reach_the_most_prompts() -> None:
    world = World()
    search = world.search()
    search.run()
    assert sum(trial.num_prompts == 18 for trial in search.trials) < len(search.trials) / 2
    assert world.prompts < 0.7 * 18 * len(search.trials)


@pytest.mark.parametrize("limit", ["max_memory_gib", "max_p95_tpot_ms"])
def test_what_breaks_a_limit_is_no_answer(limit: str) -> None:
    best = World().search(**{limit: 4.0}).run()
    assert best.configuration["batch_size"] == 4
    assert World().search(**{limit: 0.5}).run() is None


def test_the_budget_ends_it_and_forecasts_are_no_answer() -> None:
    world = World()
    prior = ({"threads": 2, "dtype": "float32", "batch_size": 1}, 1e6)
    search = world.search(60.0, priors=[prior])
    best = search.run()
    assert best.measurement.tok_per_s < 1e6
    assert world.now_s < 60.0 + 10.0 + 26.0


def test_a_study_that_cannot_be_written_ends_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path / "studies.db")

    def fail(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("disk")

    monkeypatch.setattr(type(storage), "create_new_study", fail)
    assert World().search(100.0).run(storage) is not None


def test_optuna_wins_over_random_draws_at_equal_seconds() -> None:
    space = {f"option {number}": tuple(range(6)) for number in range(4)}

    def regret(seed: int, sampler: optuna.samplers.BaseSampler | None) -> float:
        world = World()

        @contextmanager
        def start(configuration: Configuration) -> Iterator[Measure]:
            world.now_s += 10.0
            far = sum(abs(int(value) - 2 - seed % 3) for value in configuration.values())
            yield lambda _: Measurement(tok_per_s=math.exp(-0.1 * far))

        best = world.search(250.0, space=space, start=start, sampler=sampler, seed=seed).run()
        return 1.0 / best.measurement.tok_per_s - 1.0

    regrets = [(regret(seed, None), regret(seed, optuna.samplers.RandomSampler(seed=seed))) for seed in range(3)]
    assert sum(tpe for tpe, _ in regrets) < sum(drawn for _, drawn in regrets)


@pytest.mark.parametrize("text", ["", "threads = 2", "threads = []", "threads = [[1]]", "= 1"])
def test_a_space_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_space(path)
    assert "\n" not in str(caught.value)


def test_the_command_searches_the_torch_engine(tmp_path: Path) -> None:
    space = tmp_path / "space.toml"
    space.write_text('k = [0, 4]\ndraft = ["none", "ngram"]\nmood = ["good", "bad"]\n')
    refused = call(tmp_path, "search", "--space", space, "--json")
    assert refused.code == 6
    assert any("has no such option" in trial["reason"] for trial in refused.document["trials"])
    space.write_text('k = [2]\ndraft = ["ngram"]\n')
    done = call(tmp_path, "search", "--space", space, "--json", "--max-new-tokens", "4")
    assert done.document["best"]["measurement"]["tok_per_s"] > 0.0
    assert done.document["best"]["num_prompts"] == 18
