"""One streamed answer of a server as a completion: tokens, their log-probabilities, times and rounds."""

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from profiles.engines.serving.base import Run
from profiles.engines.serving.logs import one_line
from profiles.records.core import Prompt
from profiles.records.errors import EngineError
from profiles.records.evidence import RoundCount, Rounds, StepShape, TargetTrace

if TYPE_CHECKING:
    from profiles.engines.serving.http_load import Answer

Encode = Callable[[str], Sequence[int]]
CountedRounds = Sequence[tuple[RoundCount, int]]  # rounds, and how often each


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A completion; `log_probs` and `gaps` are empty where they were not requested."""

    started_s: float
    token_ids: tuple[int, ...]
    arrivals: tuple[tuple[float, int], ...]  # of every event with tokens; how many it had, 0 where it does not say
    log_probs: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()  # between the two largest logits, by token
    rounds: Rounds | None = None  # None where the server keeps no record of single requests
    refills: int = 0

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

    def run(self, rounds: Rounds | None = None) -> Run:
        """As a run by the client's times; `rounds` replace the completion's own."""
        rounds = (self.rounds if rounds is None else rounds) or {}
        shapes: Counter[StepShape] = Counter()
        for (proposed, _), count in rounds.items():
            shapes[StepShape(proposed + 1)] += count
        return Run(
            token_ids=self.token_ids,
            ttft_s=self.first_s - self.started_s,
            decode_s=self.last_s - self.first_s,
            rounds=rounds,
            shapes=shapes,
            refills=self.refills,
        )

    def trace(self, prompt: Prompt, end_token_ids: Sequence[int]) -> TargetTrace:
        """As the trace of a plain run. Probabilities are the server's, of most before temperature and filters.

        Raises EngineError: log-probabilities were not requested, or the server has none.
        """
        self._check_log_probs()
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=self.token_ids,
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
def read_completion(answer: "Answer", encode: Encode) -> Completion:
    """Reads an answer of `/v1/completions`: token ids where the server gives them, else its text tokenized by `encode`.

    Raises EngineError: no token, or another number of tokens than the server counted.
    """
    arrivals: list[tuple[float, int]] = []
    token_ids: list[int] = []
    texts: list[str] = []
    rows: list[tuple[float, list[float]]] = []
    gives_ids = False
    for at_s, event in answer.chunks:
        for choice in event.get("choices") or ():
            ids, text = choice.get("token_ids"), str(choice.get("text") or "")
            gives_ids = gives_ids or ids is not None
            texts.append(text)
            token_ids += ids or []
            rows += _log_probs(choice.get("logprobs") or {})
            if ids or (text and ids is None):
                arrivals.append((at_s, len(ids or [])))
    if not gives_ids:
        token_ids = list(encode("".join(texts)))
    counted = next((usage.get("completion_tokens") for usage in last_events(answer, "usage")), None)
    if counted is None and not gives_ids:
        raise EngineError("the server gives neither token ids nor a count of tokens: neither can be checked")
    if counted is not None and counted != len(token_ids):
        how = "gave the ids of" if gives_ids else "wrote a text of"
        raise EngineError(f"the server counted {counted} tokens and {how} {len(token_ids)}")
    if not arrivals or not token_ids:
        raise EngineError("the server answered without a token")
    return Completion(
        started_s=answer.started_s,
        token_ids=tuple(token_ids),
        arrivals=tuple(arrivals),
        log_probs=tuple(log_prob for log_prob, _ in rows),
        gaps=tuple(max(0.0, best[0] - best[1]) if len(best) > 1 else 0.0 for _, best in rows),
        refills=answer.refills,
    )


def last_events(answer: "Answer", name: str) -> list[Mapping[str, Any]]:
    """The objects that events have under a name, the last first."""
    return [event[name] for event in reversed(answer.events) if isinstance(event.get(name), dict)]


def _log_probs(given: Mapping[str, Any]) -> list[tuple[float, list[float]]]:
    """Of every token its log-probability and the largest ones in order."""
    if content := given.get("content"):  # as chat completions have them
        tops_of = ([top["logprob"] for top in token.get("top_logprobs", ())] for token in content)
        return [(token["logprob"], sorted(tops, reverse=True)) for token, tops in zip(content, tops_of, strict=True)]
    chosen = given.get("token_logprobs") or []
    tops = given.get("top_logprobs") or [{}] * len(chosen)
    return [(value, sorted((top or {}).values(), reverse=True)) for value, top in zip(chosen, tops, strict=True)]


def rounds_of(completion: Completion, counted: CountedRounds, *, past_end: bool) -> Rounds:
    """Adds the rounds that proposed nothing, the rest of the output; with `past_end` the last may reach past it."""
    rounds: Counter[RoundCount] = Counter()
    for pair, count in counted:
        rounds[pair] += count
    emitted = sum((accepted + 1) * count for (_, accepted), count in rounds.items())
    num_plain = max(0, len(completion.token_ids) - 1 - emitted)
    if past_end and all(num_tokens for _, num_tokens in completion.arrivals):  # an event is one round or a few
        most = num_plain + max((accepted for _, accepted in rounds), default=0)
        num_plain = min(max(len(completion.arrivals) - 1 - rounds.total(), num_plain), most)
    rounds[RoundCount(0, 0)] = num_plain
    return {pair: count for pair, count in rounds.items() if count}


def rounds_between(completion: Completion, counted: Counter[str | int], *, past_end: bool) -> Rounds | None:
    """The rounds of a request that had the server for itself, from the difference of the server's counters.

    None where rounds drafted different numbers of tokens: the counters do not say which accepted how many.
    """
    num_drafts, num_tokens = counted["num_drafts"], counted["num_draft_tokens"]
    if num_drafts <= 0 or num_tokens % num_drafts:
        return None
    length = num_tokens // num_drafts
    reached = (num_drafts, *(counted[position] for position in range(length + 1)))
    rounds = [
        (RoundCount(length, accepted), reached[accepted] - reached[accepted + 1]) for accepted in range(length + 1)
    ]
    return rounds_of(completion, rounds, past_end=past_end)
