"""What differs between kinds of OpenAI-compatible servers, as a record; each engine's folder has its own."""

from __future__ import annotations  # a look-up reads the flags of servers where no HTTP client is installed

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from profiles.engines.releases import EngineRelease
from profiles.engines.serving.completion import (
    Completion,
    CountedRounds,
    Encode,
    expected_shape,
    read_completion,
    rounds_of,
)
from profiles.records.core import Model, Prompt, Setup, Workload
from profiles.records.errors import EngineError
from profiles.records.evidence import RoundCount

if TYPE_CHECKING:
    from profiles.engines.serving.http_load import Answer, Body


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """A kind of server.

    A request (`body_of`) holds token ids, the workload's sampling, no other end than the workload's, and nothing from a
    prefix cache, which would shorten the prefills of the second queue.
    """

    body_of: Callable[[Workload, Prompt], Body]
    path: str = "/v1/completions"
    # fields that request the log-probabilities of each token and of the largest so many
    log_probs_of: Callable[[int], Body] = lambda count: {"logprobs": count}
    # the rounds with a draft by the server's own record of one request, None where it has none
    counted_in: Callable[[Answer], CountedRounds | None] = lambda _: None
    # replaces the reader of OpenAI's form; takes the answer, the server's URL and the request's body
    read: Callable[[Answer, str, Body], Completion] | None = None
    # why a setup cannot be told, or None
    objection: Callable[[Model, Setup, EngineRelease], str | None] = lambda *_: "such a server takes no draft's flags"
    args_for: Callable[[Setup, EngineRelease], list[str]] = lambda *_: []  # the arguments that tell a setup
    # arguments that make a server of a version report the rounds of each request
    record_args: Callable[[EngineRelease], Sequence[str]] = lambda _: ()
    counters: str | None = None  # prefix of its counters' names
    past_end: bool = True  # as in `EngineCapabilities`, and so the next two
    keeps_history: tuple[str, ...] = ()
    drops_short: bool = False
    look_up: str = "ngram"  # the default n-gram draft
    # it draws every token from the target and keeps drafted ones that agree: sampling needs no check
    verifies_by_sampling: bool = False
    reads_gguf: bool = False  # it loads GGUF files only

    def completion(self, answer: Answer, encode: Encode, url: str, body: Body) -> Completion:
        """Reads an answer with its rounds."""
        if self.read is not None:
            return self.read(answer, url, body)
        completion = read_completion(answer, encode)
        with expected_shape():
            counted = self.counted_in(answer)
        if counted is None:
            return completion
        return replace(completion, rounds=rounds_of(completion, counted, past_end=self.past_end))


def openai_body(workload: Workload, prompt: Prompt) -> dict[str, Any]:
    """OpenAI's own fields; such a server, and an old SGLang, has to be started without a prefix cache."""
    ends = list(workload.end_token_ids)
    return {
        "prompt": list(prompt.token_ids),
        "max_tokens": workload.max_new_tokens,
        "temperature": workload.temperature,
        "top_p": workload.top_p,
        "seed": workload.seed,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
        **({"stop_token_ids": ends} if ends else {}),
        **({"top_k": workload.top_k} if workload.top_k else {}),
    }


def salted_body(workload: Workload, prompt: Prompt, **more: Any) -> Body:
    """For servers that return token ids and take a salt, which keeps a request out of the prefix cache."""
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "top_k": workload.top_k or -1}
    fields = {"return_token_ids": True, "skip_special_tokens": False, "cache_salt": uuid.uuid4().hex}
    return {**openai_body(workload, prompt), **neutral, **fields, **more}


def rounds_in_histogram(counts: Sequence[int], num_proposed: int, num_rounds: int) -> CountedRounds:
    """Rounds from how many accepted 0, 1, 2 ... tokens. Raises EngineError: they drafted different numbers."""
    if num_rounds == 0:
        return []
    if num_proposed % num_rounds:
        raise EngineError(f"the server drafted {num_proposed} tokens in {num_rounds} rounds: not equally many in each")
    return [(RoundCount(num_proposed // num_rounds, accepted), count) for accepted, count in enumerate(counts)]
