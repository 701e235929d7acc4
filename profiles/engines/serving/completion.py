"""One streamed answer of a server as a completion: tokens, their log-probabilities, times and rounds."""

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from profiles.engines.runs import Run
from profiles.engines.serving.logs import one_line
from profiles.records.core import Prompt
from profiles.records.errors import EngineError
from profiles.records.evidence import RoundCount, Rounds, Shapes, StepShape, TargetTrace

if TYPE_CHECKING:
    from profiles.engines.serving.http_load import Answer

CountedRounds = Sequence[tuple[RoundCount, int]]  # rounds, and how often each


@dataclass(slots=True, kw_only=True)
class Completion(Run):
    """A run by the client's times; `log_probs` and `gaps` are empty where they were not requested."""

    arrivals: tuple[tuple[float, int], ...]  # of every event with tokens; how many it had
    log_probs: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()  # between the two largest logits, by token

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def probs(self) -> tuple[float, ...]:
        """The tokens' probabilities, 0 for -inf."""
        return tuple(math.exp(min(0.0, log_prob)) for log_prob in self.log_probs)

    @property
    def mean_log_prob(self) -> float:
        """Raises EngineError: log-probabilities were not requested, or the server has none."""
        self._check_log_probs()
        return statistics.fmean(self.log_probs)

    def count(self, counted: CountedRounds) -> None:
        """Takes what a server counted, and adds the rounds that proposed nothing, the rest of the output.

        The last round may reach past it.
        """
        rounds: Counter[RoundCount] = Counter()
        for pair, count in counted:
            rounds[pair] += count
        emitted = sum((accepted + 1) * count for (_, accepted), count in rounds.items())
        num_plain = max(0, len(self.token_ids) - 1 - emitted)
        most = num_plain + max((accepted for _, accepted in rounds), default=0)
        # an event is one round or a few
        rounds[RoundCount(0, 0)] = min(max(len(self.arrivals) - 1 - rounds.total(), num_plain), most)
        self.rounds = {pair: count for pair, count in rounds.items() if count}
        self.shapes = shapes_of(self.rounds)

    def trace(self, prompt: Prompt, end_token_ids: Sequence[int]) -> TargetTrace:
        """As the trace of a plain run. Probabilities are the server's, of most before temperature and filters.

        Raises EngineError: log-probabilities were not requested, or the server has none.
        """
        self._check_log_probs()
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(self.token_ids),
            target_probs=self.probs,
            logit_gaps=self.gaps,
            ended=self.token_ids[-1] in end_token_ids,
        )

    def _check_log_probs(self) -> None:
        if len(self.log_probs) != len(self.token_ids):
            given, needed = len(self.log_probs), len(self.token_ids)
            raise EngineError(f"the server gave {given} log-probabilities for {needed} tokens")


@contextlib.contextmanager
def expected_shape() -> Iterator[None]:
    """Turns an error in reading an answer of another shape into an EngineError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        detail = one_line(f"{type(error).__name__}: {error}")
        raise EngineError(f"the server's answer has another shape than its kind's: {detail}") from error


@expected_shape()
def read_completion(answer: "Answer", counted_in: Callable[["Answer"], CountedRounds | None]) -> Completion:
    """Reads an answer of `/v1/completions` with token ids; `counted_in`: the rounds with a draft, where recorded.

    Raises EngineError: no token, or another number of tokens than the server counted.
    """
    arrivals: list[tuple[float, int]] = []
    token_ids: list[int] = []
    rows: list[tuple[float, list[float]]] = []
    for at_s, event in answer.chunks:
        for choice in event.get("choices") or ():
            rows += _log_probs(choice.get("logprobs") or {})
            if ids := choice.get("token_ids"):
                token_ids += ids
                arrivals.append((at_s, len(ids)))
    counted = next((usage.get("completion_tokens") for usage in last_events(answer, "usage")), None)
    if not token_ids or counted not in (None, len(token_ids)):
        raise EngineError(f"the server counted {counted} tokens and gave the ids of {len(token_ids)}")
    completion = Completion(
        token_ids=tuple(token_ids),
        ttft_s=arrivals[0][0] - answer.started_s,
        decode_s=arrivals[-1][0] - arrivals[0][0],
        arrivals=tuple(arrivals),
        log_probs=tuple(log_prob for log_prob, _ in rows),
        gaps=tuple(max(0.0, best[0] - best[1]) if len(best) > 1 else 0.0 for _, best in rows),
        refills=answer.refills,
    )
    if (recorded := counted_in(answer)) is not None:
        completion.count(recorded)
    return completion


def last_events(answer: "Answer", name: str) -> list[Mapping[str, Any]]:
    """The objects that events have under a name, the last first."""
    return [event[name] for event in reversed(answer.events) if isinstance(event.get(name), dict)]


def _log_probs(given: Mapping[str, Any]) -> list[tuple[float, list[float]]]:
    """Of every token its log-probability and the largest ones in order."""
    chosen = given.get("token_logprobs") or []
    tops = given.get("top_logprobs") or [{}] * len(chosen)
    return [(value, sorted((top or {}).values(), reverse=True)) for value, top in zip(chosen, tops, strict=True)]


def shapes_of(rounds: Rounds) -> Shapes:
    """The steps of rounds that verified a sequence's own proposals."""
    shapes: Counter[StepShape] = Counter()
    for (proposed, _), count in rounds.items():
        shapes[StepShape(proposed + 1)] += count
    return shapes


def rounds_in_histogram(counts: Sequence[int], num_proposed: int, num_rounds: int) -> CountedRounds:
    """Rounds from how many accepted 0, 1, 2 ... tokens. Raises EngineError: they drafted different numbers."""
    if num_rounds == 0:
        return []
    if num_proposed % num_rounds:
        raise EngineError(f"the server drafted {num_proposed} tokens in {num_rounds} rounds: not equally many in each")
    return [(RoundCount(num_proposed // num_rounds, accepted), count) for accepted, count in enumerate(counts)]
