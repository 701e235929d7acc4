"""`ServedEngine`: what the adapters of serving engines share: a pool of processes, queues of requests, checks.

It fits `profiles.engines.base.Engine` together with what an adapter adds: how a queue is decoded.
"""

import functools
import itertools
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Self

from profiles.engines.runs import DecodedQueue, Run, samples_of
from profiles.engines.serving.process import Key, Member, ServerPool
from profiles.records.core import PLAIN, Draft, Model, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Sample, StepTimes, TargetTrace
from profiles.timing.clock import cores_used, quietest

NUM_TEXTS = 16
FALSE_ALARM = 6e-5  # the chance to refuse a draft that samples as it should: four standard errors of many texts
StepSamples = Mapping[str, Mapping[int, Sequence[float]]]  # seconds by component digest and width


class ServedEngine(ABC, Generic[Key, Member]):
    """An engine whose setups run in processes of a pool; a context manager, which ends them.

    `notes`: lines about this engine that the user is told.
    """

    notes: tuple[str, ...] = ()
    _label: str  # the engine's name in errors
    _watched_gpus: Sequence[str]  # while something is timed

    def __init__(self, target: Model, drafts: Sequence[Draft], pool: ServerPool[Key, Member]) -> None:
        self.target, self.drafts, self._pool = target, tuple(drafts), pool
        self._checked_sampling: set[tuple[str, str]] = set()  # (draft, sampling) digests

    @property
    def num_starts(self) -> int:
        """Processes started so far."""
        return self._pool.num_starts

    @property
    def starting_s(self) -> float:
        """Seconds that the starts took."""
        return self._pool.starting_s

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that run now."""
        return tuple(pid for member in self._pool.members for pid in member.pids)

    def close(self) -> None:
        """Ends the processes; a later call of the engine starts what it needs."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_together(
        self, workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str
    ) -> tuple[Sample, ...]:
        """Timed runs of the queue, one setup after another; a queue is run again while the machine is disturbed."""
        for setup in setups:
            self._check(workload, prompts, setup)
        queues: list[DecodedQueue] = []
        for setup in setups:
            self._prepare(workload, prompts, setup)
            decode = functools.partial(self._decode, workload, prompts, setup)
            (runs, cores), disturbed = quietest(functools.partial(cores_used, decode), self._watched_gpus)
            self._check_effect(setup, runs)
            queues.append(DecodedQueue(setup, runs, cores, disturbed))
        return samples_of(self.target, workload, prompts, queues, trace_target=self.trace_target)

    def check_sampling(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """Raises EngineError: the target's mean log-probabilities of sampled text differ from plain decoding's.

        A coarse check: wrong distributions can have equal means.
        """
        drafted, plain = (self._mean_log_probs(workload, prompts, compared) for compared in (setup, PLAIN))
        check_means(f"{self._label} with {setup.name}", drafted, plain)

    def _check_sampling_once(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """Checks each draft and way to sample once."""
        if setup.draft is None or workload.temperature == 0.0:
            return
        key = setup.draft.digest, workload.sampling_digest
        if key not in self._checked_sampling:
            self.check_sampling(workload, prompts, setup)
            self._checked_sampling.add(key)

    def _check_effect(self, setup: Setup, runs: Sequence[Run]) -> None:
        """Raises EngineError: rounds proposed another number of tokens than the setup's, which was ignored."""
        most = max((count.proposed for run in runs for count in run.rounds), default=setup.length)
        is_long = max(len(run.token_ids) for run in runs) > setup.length + 2
        if most > self._longest_round(setup) or (most < setup.length and is_long and self._proposes_all(setup)):
            raise EngineError(
                f"{self._label} was started for {setup.name} and proposes up to {most} tokens a round: it ignores the "
                f"setting; leave this draft out, or measure it with another version"
            )

    def _longest_round(self, setup: Setup) -> int:
        """The most tokens that a round may propose."""
        return setup.length

    def _proposes_all(self, setup: Setup) -> bool:
        """Whether a round proposes the whole length, unless the output ends in it."""
        return setup.draft is not None and setup.draft.kind == "model" and setup.stop_below is None

    def _check_draft(self, draft: Draft | None) -> None:
        if draft is not None and draft not in self.drafts:
            names = ", ".join(loaded.name for loaded in self.drafts) or "none"
            raise InputError(f"draft {draft.name} is not one of this engine's; they are {names}")

    def _timed(
        self, workload: Workload, context_length: int, measure: Callable[[], StepSamples]
    ) -> dict[str, StepTimes]:
        """What `measure` gives while the machine is quiet, by component; widths without a sample are left out."""
        samples, disturbed = quietest(measure, self._watched_gpus)
        return {
            component: StepTimes(
                component_digest=component,
                batch_size=workload.batch_size,
                context_length=context_length,
                samples_s={width: tuple(seconds) for width, seconds in by_width.items() if seconds},
                disturbed=disturbed,
            )
            for component, by_width in samples.items()
        }

    @abstractmethod
    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace: ...

    @abstractmethod
    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """Raises InputError or ModelError for what this engine cannot run."""

    def _prepare(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """Starts, warms up and checks what decodes a setup, before it is timed."""

    @abstractmethod
    def _decode(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> Sequence[Run]:
        """One queue under one setup, a run per prompt."""

    def _mean_log_probs(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> Sequence[float]:
        """The target's mean log-probability of each text that a setup samples (`texts_of`)."""
        raise InputError(f"{setup.name}: {self._label} reports no log-probabilities of sampled text")


def texts_of(workload: Workload, prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """The prompts and seeds of the texts to sample: the prompts in turn, each text with a seed of its own."""
    in_turn = itertools.islice(itertools.cycle(prompts), NUM_TEXTS)
    return [(prompt, workload.seed + number) for number, prompt in enumerate(in_turn)]


def check_means(name: str, drafted: Sequence[float], plain: Sequence[float]) -> None:
    """Compares the target's mean log-probability of sampled texts, with the draft `name` and without, by text.

    Pairs with NaN are left out. Raises: EngineError: the means are further apart than chance makes them, by Student's
    t-test of paired differences. InputError: fewer than two texts.
    """
    from scipy import stats  # slow to import, and only sampling needs it

    pairs = [pair for pair in zip(drafted, plain, strict=True) if not any(map(math.isnan, pair))]
    if len(pairs) < 2:
        raise InputError(f"sampling is compared over {len(pairs)} texts: at least 2 of more than one token are needed")
    differences = [first - second for first, second in pairs]
    means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    most = float(stats.t.isf(FALSE_ALARM / 2, len(differences) - 1))
    if abs(statistics.fmean(differences)) > most * error:
        raise EngineError(
            f"{name} writes another text than plain decoding: mean log-probability {means[0]:.2f} "
            f"against {means[1]:.2f} over {len(pairs)} texts; allowed is a difference of {most * error:.2f}"
        )
