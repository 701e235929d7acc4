"""What differs between kinds of servers, as a record; each engine's folder has its own."""

from __future__ import annotations  # a look-up reads the flags of servers where no HTTP client is installed

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from profiles.engines.releases import EngineRelease
from profiles.engines.serving.completion import Completion
from profiles.records.core import Model, Prompt, Setup, Workload

if TYPE_CHECKING:
    from profiles.engines.serving.http_load import Answer, Body


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """A kind of server.

    A request (`body_of`) holds token ids, the workload's sampling, no other end than the workload's, and nothing from a
    prefix cache, which would shorten the prefills of the second queue.
    """

    body_of: Callable[[Workload, Prompt], Body]
    # reads an answer, with the rounds that the server records; takes the server's URL and the request's body too
    read: Callable[[Answer, str, Body], Completion]
    objection: Callable[[Model, Setup, EngineRelease], str | None]  # why a setup cannot be told, or None
    args_for: Callable[[Setup, EngineRelease], list[str]]  # the arguments that tell a setup
    path: str = "/v1/completions"
    # fields that request the log-probabilities of each token and of the largest so many
    log_probs_of: Callable[[int], Body] = lambda count: {"logprobs": count}
    # arguments that make a server of a version report the rounds of each request
    record_args: Callable[[EngineRelease], Sequence[str]] = lambda _: ()
    past_end: bool = True  # as in `EngineCapabilities`, and so the next
    drops_short: bool = False
    look_up: str = "ngram"  # the default n-gram draft
    # it draws every token from the target and keeps drafted ones that agree: sampling needs no check
    verifies_by_sampling: bool = False
    reads_gguf: bool = False  # it loads GGUF files only


def completions_body(workload: Workload, prompt: Prompt, **more: Any) -> Body:
    """A request to `/v1/completions` of a server that returns token ids and takes a salt for its prefix cache."""
    ends = list(workload.end_token_ids)
    return {
        "prompt": list(prompt.token_ids),
        "max_tokens": workload.max_new_tokens,
        "temperature": workload.temperature,
        "top_p": workload.top_p,
        "top_k": workload.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": workload.seed,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "skip_special_tokens": False,
        "cache_salt": uuid.uuid4().hex,
        **({"stop_token_ids": ends} if ends else {}),
        **more,
    }
