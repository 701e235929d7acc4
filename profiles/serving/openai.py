"""What is asked of an OpenAI-compatible server, and what its streamed answers say: tokens, times and rounds.

Each kind of server has requests and records of its own beside the common ones; all of that is here. Starts nothing.
"""

import contextlib
import math
import statistics
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from profiles.errors import EngineError, InputError
from profiles.serving import llama_answers
from profiles.serving.load import Answer, Body
from profiles.serving.log import one_line
from profiles.serving.metrics import Counters
from profiles.terms import Prompt, Rounds, TargetTrace, Workload

PATHS = {"llamacpp": llama_answers.PATH}  # of the kinds that tell token ids elsewhere than under OpenAI's path
PATH = "/v1/completions"
Kind = Literal["vllm", "sglang", "llamacpp", "trtllm", "openai"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Encode = Callable[[str], Sequence[int]]


def kind_of(name: str) -> Kind:
    """A kind of server by its name. Raises InputError."""
    kind = next((one for one in KINDS if one == name), None)
    if kind is None:
        raise InputError(f"kind of server {name!r}: allowed are {', '.join(KINDS)}")
    return kind


def body_of(kind: Kind, model: str, workload: Workload, prompt: Prompt) -> Body:
    """The request for one prompt: its token ids, the workload's sampling and nothing else, ends only where it says.

    Nothing may come from a prefix cache, or the queue that runs second had shorter prefills: each request has a salt of
    its own. What knows no salt (older SGLang, kinds `trtllm` and `openai`) is to be started without such a cache,
    SGLang with `--disable-radix-cache`.
    """
    if kind == "llamacpp":  # it stops at its model's own end tokens, and at no others
        return {"model": model, **llama_answers.body_of(workload, prompt.token_ids)}
    ends = list(workload.end_token_ids)
    common: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt.token_ids),
        "max_tokens": workload.max_new_tokens,
        "temperature": workload.temperature,
        "top_p": workload.top_p,
        "seed": workload.seed,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    own: dict[str, Any] = {"stop_token_ids": ends} if ends else {}
    if kind in ("openai", "trtllm"):
        own |= {"top_k": workload.top_k} if workload.top_k else {}
    else:
        own |= {"cache_salt": uuid.uuid4().hex, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
        own |= {"return_token_ids": True, "top_k": workload.top_k or -1}
    if kind == "sglang":
        own |= {"return_spec_tokens_details": True, "no_stop_trim": True}
    return {**common, **own}


def log_probs_of(kind: Kind, count: int) -> dict[str, Any]:
    """What is added to a request for the log-probabilities of its tokens and of the `count` largest at each place."""
    if kind == "llamacpp":
        return {"n_probs": count}
    return {"logprobs": count} | ({"return_tokens_as_token_ids": True} if kind == "vllm" else {})


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
    counted = next((usage.get("completion_tokens") for usage in _found(answer, "usage")), None)
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
def rounds_of(completion: Completion) -> Rounds | None:
    """The rounds of one request as its server recorded them; None where it keeps no record of single requests."""
    answer = completion.answer
    for metrics in _found(answer, "metrics"):
        if record := metrics.get("speculative_decoding"):
            return _with_plain(completion, _of_vllm(record), past_end=True)
    for extension in _found(answer, "sglext"):
        if record := extension.get("spec_tokens_details"):
            return _with_plain(completion, _of_sglang(record), past_end=True)
    timings = [event["timings"] for event in answer.events if isinstance(event.get("timings"), dict)]
    if any("draft_n" in one for one in timings):
        return _with_plain(completion, _of_llamacpp(timings), past_end=False)
    return None


def rounds_between(completion: Completion, counted: Counters, *, past_end: bool) -> Rounds | None:
    """The rounds of a request that had the server for itself, from the difference of its counters.

    `past_end` as in `Properties`. None where rounds drafted unequally many tokens: then the counters do not say which
    accepted how many.
    """
    if counted.num_drafts <= 0 or counted.num_draft_tokens % counted.num_drafts:
        return None
    length = counted.num_draft_tokens // counted.num_drafts
    reached = (counted.num_drafts, *counted.accepted_by_position, *[0] * (length + 1))
    found = [((length, kept), reached[kept] - reached[kept + 1]) for kept in range(length + 1)]
    return _with_plain(completion, found, past_end=past_end)


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


def _found(answer: Answer, name: str) -> Iterator[Mapping[str, Any]]:
    """What the events have under a name, the last first."""
    return (event[name] for event in reversed(answer.events) if isinstance(event.get(name), dict))


Counted = Sequence[tuple[tuple[int, int], int]]


def _of_vllm(record: Mapping[str, Any]) -> Counted:
    drafted, accepted = record.get("per_step_drafted"), record.get("per_step_accepted")
    if drafted is None or accepted is None:
        return _histogram(record["acceptance_histogram"], record["num_draft_tokens"], record["num_spec_steps"])
    return [(pair, 1) for pair in zip(drafted, accepted, strict=True)]


def _of_sglang(record: Mapping[str, Any]) -> Counted:
    proposed, checks = record["spec_num_proposed_drafts"], record["spec_verify_ct"]
    return _histogram(record["spec_correct_drafts_histogram"], proposed, checks)


def _histogram(counts: Sequence[int], num_proposed: int, num_rounds: int) -> Counted:
    if num_rounds == 0:
        return []
    if num_proposed % num_rounds:
        raise EngineError(f"the server drafted {num_proposed} tokens in {num_rounds} rounds: not equally many in each")
    return [((num_proposed // num_rounds, kept), count) for kept, count in enumerate(counts)]


def _of_llamacpp(timings: Sequence[Mapping[str, Any]]) -> Counted:
    totals = [(one.get("draft_n", 0), one.get("draft_n_accepted", 0)) for one in timings]
    pairs = zip([(0, 0), *totals], totals, strict=False)
    rounds = [(now[0] - before[0], now[1] - before[1]) for before, now in pairs]
    return [(pair, 1) for pair in rounds if pair[0] > 0]


def _with_plain(completion: Completion, counted: Counted, *, past_end: bool) -> Rounds:
    """Adds the rounds that proposed nothing: what is left of the output; the last round may reach past its end."""
    rounds: Counter[tuple[int, int]] = Counter()
    for pair, count in counted:
        rounds[pair] += count
    by_drafts = sum((accepted + 1) * count for (_, accepted), count in rounds.items())
    least = max(0, len(completion.token_ids) - 1 - by_drafts)
    if past_end and all(num_tokens for _, num_tokens in completion.arrivals):  # an event is a round, or a few of them
        most = least + max((accepted for _, accepted in rounds), default=0)
        least = min(max(len(completion.arrivals) - 1 - rounds.total(), least), most)
    rounds[(0, 0)] = least
    return {pair: count for pair, count in rounds.items() if count}
