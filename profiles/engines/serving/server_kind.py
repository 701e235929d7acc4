"""The kinds of OpenAI-compatible servers as data: what each is asked, where it tells its rounds, and how its texts end.

What all have in common is read elsewhere; a new kind of server is a row here. Starts nothing.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from profiles.engines.llamacpp import responses
from profiles.engines.llamacpp.flags import KEEPS_HISTORY
from profiles.engines.serving import metrics
from profiles.engines.serving.http_load import Answer, Body
from profiles.records.core import Prompt, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import RoundCount

Kind = Literal["vllm", "sglang", "llamacpp", "trtllm", "openai"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Counted = Sequence[tuple[RoundCount, int]]  # rounds, and how often each


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """A kind of server.

    `body_of`: the request for one prompt, but for the model's name: its token ids, the workload's sampling and nothing
    else, ends only where it says, and nothing from a prefix cache, or the queue that runs second had shorter prefills.
    `log_probs_of`: what is added for the log-probabilities of each token and of the largest so many at its place.
    `counted_in`: the rounds that proposed something by a server's own record of one request; None where it has none.
    `counters`: what its counters' names begin with. `past_end`, `keeps_history`, `drops_short`: as in
    `EngineCapabilities`.
    `look_up`: the n-gram draft to try first. `draws_every_token`: it draws each from the target and keeps a draft's
    where they agree, so that sampling is the target's, and tells no log-probabilities while it drafts.
    `cuts_characters`: it streams no id for a part of a character.
    """

    body_of: Callable[[Workload, Prompt], Body]
    path: str = "/v1/completions"
    log_probs_of: Callable[[int], Body] = lambda count: {"logprobs": count}
    counted_in: Callable[[Answer], Counted | None] = lambda _: None
    counters: str | None = None
    past_end: bool = True
    keeps_history: tuple[str, ...] = ()
    drops_short: bool = False
    look_up: str = "ngram"
    draws_every_token: bool = False
    cuts_characters: bool = False


def kind_of(name: str) -> Kind:
    """A kind of server by its name. Raises InputError."""
    kind = next((one for one in KINDS if one == name), None)
    if kind is None:
        raise InputError(f"kind of server {name!r}: allowed are {', '.join(KINDS)}")
    return kind


def found_in(answer: Answer, name: str) -> list[Mapping[str, Any]]:
    """What the events have under a name, the last first."""
    return [event[name] for event in reversed(answer.events) if isinstance(event.get(name), dict)]


def _plain_body(workload: Workload, prompt: Prompt) -> dict[str, Any]:
    """As OpenAI says; such a server, and an older SGLang, is to be started without a prefix cache."""
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


def _body(workload: Workload, prompt: Prompt, **own: Any) -> Body:
    """Of a server that tells token ids and takes a salt, which keeps a request out of its prefix cache."""
    neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "top_k": workload.top_k or -1}
    more = {"return_token_ids": True, "skip_special_tokens": False, "cache_salt": uuid.uuid4().hex}
    return {**_plain_body(workload, prompt), **neutral, **more, **own}


def _in_vllm(answer: Answer) -> Counted | None:
    records = [one["speculative_decoding"] for one in found_in(answer, "metrics") if one.get("speculative_decoding")]
    if not records:
        return None
    drafted, accepted = records[0].get("per_step_drafted"), records[0].get("per_step_accepted")
    if drafted is None or accepted is None:
        names = ("acceptance_histogram", "num_draft_tokens", "num_spec_steps")
        return _histogram(*(records[0][name] for name in names))
    return [(RoundCount(*pair), 1) for pair in zip(drafted, accepted, strict=True)]


def _in_sglang(answer: Answer) -> Counted | None:
    records = [one["spec_tokens_details"] for one in found_in(answer, "sglext") if one.get("spec_tokens_details")]
    if not records:
        return None
    names = ("spec_correct_drafts_histogram", "spec_num_proposed_drafts", "spec_verify_ct")
    return _histogram(*(records[0][name] for name in names))


def _histogram(counts: Sequence[int], num_proposed: int, num_rounds: int) -> Counted:
    if num_rounds == 0:
        return []
    if num_proposed % num_rounds:
        raise EngineError(f"the server drafted {num_proposed} tokens in {num_rounds} rounds: not equally many in each")
    return [(RoundCount(num_proposed // num_rounds, accepted), count) for accepted, count in enumerate(counts)]


def _in_llamacpp(answer: Answer) -> Counted | None:
    timings = [event["timings"] for event in answer.events if isinstance(event.get("timings"), dict)]
    if not any("draft_n" in one for one in timings):
        return None
    totals = [(one.get("draft_n", 0), one.get("draft_n_accepted", 0)) for one in timings]
    pairs = zip([(0, 0), *totals], totals, strict=False)
    rounds = [RoundCount(now[0] - before[0], now[1] - before[1]) for before, now in pairs]
    return [(each, 1) for each in rounds if each.proposed > 0]


VLLM = ServerKind(
    body_of=_body,
    log_probs_of=lambda count: {"logprobs": count, "return_tokens_as_token_ids": True},
    counted_in=_in_vllm,
    counters=metrics.VLLM,
)
LLAMA_CPP = ServerKind(
    # it stops at its model's own end tokens, and at no others
    body_of=lambda workload, prompt: responses.body_of(workload, prompt.token_ids),
    path=responses.PATH,
    log_probs_of=lambda count: {"n_probs": count},
    counted_in=_in_llamacpp,
    counters=metrics.LLAMA_CPP,
    past_end=False,
    keeps_history=KEEPS_HISTORY,
    drops_short=True,
    look_up="ngram:max=3,min=3",
    draws_every_token=True,
    cuts_characters=True,
)
SERVER_KINDS_BY_NAME: Mapping[str, ServerKind] = {
    "vllm": VLLM,
    "sglang": ServerKind(
        body_of=lambda workload, prompt: _body(workload, prompt, return_spec_tokens_details=True, no_stop_trim=True),
        counted_in=_in_sglang,
    ),
    "llamacpp": LLAMA_CPP,
    "trtllm": ServerKind(body_of=_plain_body),
    "openai": ServerKind(body_of=_plain_body),
}
