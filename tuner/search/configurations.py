"""The expensive level of the search: what needs new step times or a server start, by Optuna's ask and tell.

A trial starts an engine with one configuration and decodes a few prompts; of those that got that far the best third
goes on to more prompts (successive halving, Jamieson and Talwalkar 2016). Seconds are the budget. Trials are told to a
study in memory, which is copied to the store's studies afterwards: a damaged or unreachable study ends no run.
"""

import math
import random
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import optuna

from profiles.records.errors import DraftpickError, InputError, require
from tuner.search.studies import Storage, store_study

RUNGS = (2, 6, 18)  # prompts
REDUCTION = 3
Value: TypeAlias = str | int | float | bool
Configuration: TypeAlias = Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a configuration does: output tokens per second of the whole batch, and what limits are on."""

    tok_per_s: float
    memory_gib: float | None = None
    p95_tpot_ms: float | None = None


Measure: TypeAlias = Callable[[int], Measurement]  # on the first prompts, as many as it is given
Start: TypeAlias = Callable[[Configuration], AbstractContextManager[Measure]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A configuration that was started: how many prompts it reached, and why no more."""

    configuration: Configuration
    num_prompts: int = 0
    measurement: Measurement | None = None
    reason: str = ""
    feasible: bool = True

    @property
    def tok_per_s(self) -> float:
        return 0.0 if self.measurement is None else self.measurement.tok_per_s


@dataclass(slots=True, kw_only=True)
class ConfigurationSearch:
    """A search within a budget of seconds.

    Attributes:
        space: The values of every option.
        priors: Configurations with a forecast of tokens per second; they guide the search and are never an answer.
        max_memory_gib, max_p95_tpot_ms: Constraints.
        sampler: None: TPE.
    """

    space: Mapping[str, Sequence[Value]]
    start: Start
    budget_s: float
    priors: Iterable[tuple[Configuration, float]] = ()
    max_memory_gib: float = math.inf
    max_p95_tpot_ms: float = math.inf
    rungs: Sequence[int] = RUNGS
    sampler: optuna.samplers.BaseSampler | None = None
    seed: int = 0
    clock: Callable[[], float] = time.monotonic
    show: Callable[[Trial], None] = lambda _: None
    trials: list[Trial] = field(default_factory=list)

    def run(self, storage: Storage | None = None, study_name: str = "configurations") -> Trial | None:
        """The best feasible trial, of those with the most prompts; None: none could be started or is feasible."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = self.sampler or optuna.samplers.TPESampler(seed=self.seed, multivariate=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {
            name: optuna.distributions.CategoricalDistribution(values) for name, values in self.space.items()
        }
        for configuration, tok_per_s in self.priors:
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(configuration),
                    distributions=distributions,
                    value=tok_per_s,
                    user_attrs={"forecast": True},
                )
            )
        end_s, rng = self.clock() + self.budget_s, random.Random(self.seed)
        tried: dict[frozenset[tuple[str, Value]], Trial] = {}
        while self.clock() < end_s and len(tried) < math.prod(map(len, self.space.values())):
            proposal = study.ask(distributions)
            key = frozenset(proposal.params.items())
            if key in tried:  # the sampler is sure; a random one is next
                study.enqueue_trial({name: rng.choice(values) for name, values in self.space.items()})
            else:
                tried[key] = self._try(proposal, end_s)
                self.trials.append(tried[key])
                self.show(tried[key])
            self._tell(study, proposal, tried[key])
        store_study(study_name, "maximize", study.trials, storage)
        feasible = [trial for trial in self.trials if trial.feasible]
        return max(feasible, key=lambda trial: (trial.num_prompts, trial.tok_per_s), default=None)

    def _try(self, proposal: optuna.Trial, end_s: float) -> Trial:
        trial = Trial(configuration=dict(proposal.params))
        try:
            with self.start(trial.configuration) as measure:
                for num_prompts in self.rungs:
                    measurement = measure(num_prompts)
                    over = [
                        f"{name} {value:.4g} over {most:g}"
                        for name, value, most in self._limited(measurement)
                        if value > most
                    ]
                    trial = replace(
                        trial,
                        num_prompts=num_prompts,
                        measurement=measurement,
                        reason="; ".join(over),
                        feasible=not over,
                    )
                    proposal.report(measurement.tok_per_s, num_prompts)
                    if over or not self._goes_on(trial) or self.clock() >= end_s:
                        break
        except DraftpickError as error:
            trial = Trial(configuration=trial.configuration, reason=str(error), feasible=False)
        return trial

    def _goes_on(self, trial: Trial) -> bool:
        """Whether it is in the best third of the feasible ones with as many prompts or more."""
        others = [other for other in self.trials if other.feasible and other.num_prompts >= trial.num_prompts]
        better = sum(other.tok_per_s > trial.tok_per_s for other in others)
        return better <= len(others) // REDUCTION

    def _limited(self, measurement: Measurement) -> list[tuple[str, float, float]]:
        """Names, values and limits of what is limited and was measured."""
        rows = (
            ("memory in GiB", measurement.memory_gib, self.max_memory_gib),
            ("p95 ms per token", measurement.p95_tpot_ms, self.max_p95_tpot_ms),
        )
        return [(name, value, most) for name, value, most in rows if value is not None and math.isfinite(most)]

    def _tell(self, study: optuna.Study, proposal: optuna.Trial, trial: Trial) -> None:
        if trial.measurement is None:
            proposal.set_user_attr("reason", trial.reason)
            study.tell(proposal, state=optuna.trial.TrialState.FAIL)
            return
        for name, value, most in self._limited(trial.measurement):
            proposal.set_constraint(name, value - most)
        study.tell(proposal, trial.tok_per_s)


def read_space(path: Path) -> dict[str, tuple[Value, ...]]:
    """The values of every option, from TOML like `threads = [1, 2, 4]`. Raises InputError."""
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"search space {str(path)!r}: {error}; give a TOML file like threads = [1, 2]") from error
    for name, values in document.items():
        good = isinstance(values, list) and bool(values) and all(isinstance(each, str | int | float) for each in values)
        require(good, f"search space {str(path)!r}: {name} is {values!r}; a list of texts or numbers is needed")
    require(bool(document), f"search space {str(path)!r} names no option; give one like threads = [1, 2]")
    return {name: tuple(values) for name, values in document.items()}
