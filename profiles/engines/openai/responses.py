"""What the streamed answers of an OpenAI-compatible server say: tokens, times and rounds. Starts nothing."""

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.engines.serving.http_load import Answer
from profiles.engines.serving.logs import one_line
from profiles.engines.serving.metrics import Counters
from profiles.engines.serving.server_kind import Counted, ServerKind, found_in
from profiles.records.core import Prompt
from profiles.records.errors import EngineError
from profiles.records.evidence import RoundCount, Rounds, TargetTrace

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer as it is counted: tokens, how many came in each event, and when the events with tokens came."""

    answer: Answer
    token_ids: tuple[int, ...]
    arrivals: tuple[tuple[float, int], ...]  # seconds; tokens of the event, 0 where it does not say

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]


@contextlib.contextmanager
def _as_expected() -> Iterator[None]:
    """Turns what goes wrong in reading an answer of another shape into an EngineError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = one_line(f"{type(error).__name__}: {error}")
        raise EngineError(f"the server's answer has another shape than its kind's: {said}") from error


@_as_expected()
def read(answer: Answer, encode: Encode, again: Callable[[], Sequence[int]] | None = None) -> Completion:
    """The tokens of an answer: their ids where the server gives them, else its text through the target's tokenizer.

    `again` asks for all ids in one piece, where a server streams none for a part of a character. Raises EngineError: no
    token, or a text whose tokens are not as many as the server counted.
    """
    arrivals: list[tuple[float, int]] = []
    token_ids: list[int] = []
    texts: list[str] = []
    gives_ids = False
    for at_s, choice in _choices(answer):
        ids, text = choice.get("token_ids"), str(choice.get("text") or "")
        gives_ids = gives_ids or ids is not None
        texts.append(text)
        token_ids += ids or []
        if ids or (text and ids is None):
            arrivals.append((at_s, len(ids or [])))
    if not gives_ids:
        token_ids = list(encode("".join(texts)))
    counted = next((usage.get("completion_tokens") for usage in found_in(answer, "usage")), None)
    counted = answer.last.get("tokens_predicted", counted)  # llama.cpp's own
    if counted is None and not gives_ids:
        raise EngineError("the server gives neither token ids nor a count of tokens: neither can be checked")
    if again is not None and counted != len(token_ids):
        token_ids = list(again())
    if counted is not None and counted != len(token_ids):
        how = "gave the ids of" if gives_ids else "wrote a text of"
        raise EngineError(f"the server counted {counted} tokens and {how} {len(token_ids)}")
    if not arrivals or not token_ids:
        raise EngineError("the server answered without a token")
    return Completion(answer=answer, token_ids=tuple(token_ids), arrivals=tuple(arrivals))


@_as_expected()
def rounds_of(completion: Completion, dialect: ServerKind) -> Rounds | None:
    """The rounds of one request as its server recorded them; None where it keeps no record of single requests."""
    counted = dialect.counted_in(completion.answer)
    return None if counted is None else _with_plain(completion, counted, dialect)


def rounds_between(completion: Completion, counted: Counters, dialect: ServerKind) -> Rounds | None:
    """The rounds of a request that had the server for itself, from the difference of its counters.

    None where rounds drafted unequally many tokens: then the counters do not say which
    accepted how many.
    """
    if counted.num_drafts <= 0 or counted.num_draft_tokens % counted.num_drafts:
        return None
    length = counted.num_draft_tokens // counted.num_drafts
    reached = (counted.num_drafts, *counted.accepted_by_position, *[0] * (length + 1))
    found = [(RoundCount(length, kept), reached[kept] - reached[kept + 1]) for kept in range(length + 1)]
    return _with_plain(completion, found, dialect)


@_as_expected()
def trace_of(prompt: Prompt, completion: Completion, ends: Sequence[int]) -> TargetTrace:
    """The trace of a plain run that was asked for two log-probabilities a token. Raises EngineError: it has none.

    Probabilities are those the server states, of most servers before temperature and filters.
    """
    rows = _log_probs(completion)
    return TargetTrace(
        prompt_digest=prompt.digest,
        token_ids=completion.token_ids,
        target_probs=tuple(math.exp(min(0.0, chosen)) for chosen, _ in rows),
        logit_gaps=tuple(max(0.0, best[0] - best[1]) if len(best) > 1 else 0.0 for _, best in rows),
        ended=completion.token_ids[-1] in ends,
    )


@_as_expected()
def mean_log_prob(completion: Completion) -> float:
    """Of its tokens, as the server states them. Raises EngineError: it was not asked for them, or has none."""
    return statistics.fmean(chosen for chosen, _ in _log_probs(completion))


def _log_probs(completion: Completion) -> list[tuple[float, list[float]]]:
    """Of every token its own log-probability, and the largest ones, the greatest first."""
    rows: list[tuple[float, list[float]]] = []
    for _, choice in _choices(completion.answer):
        given = choice.get("logprobs") or {}
        if content := given.get("content"):
            rows += [(one["logprob"], [top["logprob"] for top in one.get("top_logprobs", ())]) for one in content]
        else:
            chosen = given.get("token_logprobs") or []
            tops = given.get("top_logprobs") or [{}] * len(chosen)
            rows += [(value, list((top or {}).values())) for value, top in zip(chosen, tops, strict=True)]
    if len(rows) != len(completion.token_ids):
        raise EngineError(f"the server gave {len(rows)} log-probabilities for {len(completion.token_ids)} tokens")
    return [(value, sorted(tops, reverse=True)) for value, tops in rows]


def _choices(answer: Answer) -> Iterator[tuple[float, Mapping[str, Any]]]:
    for at_s, event in answer.chunks:
        for choice in event.get("choices") or ():
            yield at_s, choice
        if "content" in event:  # llama.cpp's own
            given = {"content": event.get("completion_probabilities")}
            yield at_s, {"token_ids": event.get("tokens"), "text": event["content"], "logprobs": given}


def _with_plain(completion: Completion, counted: Counted, dialect: ServerKind) -> Rounds:
    """Adds the rounds that proposed nothing: what is left of the output; the last round may reach past its end."""
    rounds: Counter[RoundCount] = Counter()
    for pair, count in counted:
        rounds[pair] += count
    by_drafts = sum((accepted + 1) * count for (_, accepted), count in rounds.items())
    least = max(0, len(completion.token_ids) - 1 - by_drafts)
    if dialect.past_end and all(
        num_tokens for _, num_tokens in completion.arrivals
    ):  # an event is a round, or a few of them
        most = least + max((accepted for _, accepted in rounds), default=0)
        least = min(max(len(completion.arrivals) - 1 - rounds.total(), least), most)
    rounds[RoundCount(0, 0)] = least
    return {pair: count for pair, count in rounds.items() if count}
