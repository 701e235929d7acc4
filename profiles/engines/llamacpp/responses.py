"""Requests to llama.cpp's `/completion` and its streamed answers: tokens, rounds and the server's own seconds.

Every event has one token and the running totals `predicted_n`, `predicted_ms`, `draft_n` and `draft_n_accepted`. The
milliseconds are read once a round, so tokens with equal ones came of one round.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiles.engines.llamacpp import flags
from profiles.engines.serving.completion import Completion, expected_shape, shapes_of
from profiles.engines.serving.http_load import Answer, Body, fetch
from profiles.engines.serving.server_kind import ServerKind
from profiles.records.core import Workload
from profiles.records.evidence import RoundCount

PATH = "/completion"


def body_of(workload: Workload, token_ids: Sequence[int], **more: Any) -> dict[str, Any]:
    """A request for a timed run: the workload's samplers only, nothing cached, rounds reported.

    Temperature comes before top-k and top-p, as in torch and vLLM; llama.cpp's default order samples differently.
    """
    sampling: dict[str, Any] = {"temperature": workload.temperature, "samplers": ["temperature"]}
    if workload.temperature > 0.0:
        sampling |= {"samplers": ["temperature", "top_k", "top_p"], "top_k": workload.top_k, "top_p": workload.top_p}
    return {
        "prompt": list(token_ids),
        "n_predict": workload.max_new_tokens,
        "seed": workload.seed,
        "ignore_eos": not workload.end_token_ids,
        "cache_prompt": False,
        "return_tokens": True,
        "timings_per_token": True,
        **sampling,
        **more,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One round of a request: when it ended on the client's clock, the server's seconds, and its tokens.

    `rounds` above 1: rounds that cannot be told apart, because they emitted parts of characters only.
    """

    arrived_s: float
    seconds: float
    proposed: int
    accepted: int
    rounds: int


@dataclass(slots=True, kw_only=True)
class LlamaCompletion(Completion):
    """A completion with its rounds one by one, and the server's own seconds of decoding."""

    steps: tuple[Step, ...]
    server_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """The running totals of an event."""

    arrived_s: float
    tokens: int
    milliseconds: float = 0.0
    proposed: int = 0
    accepted: int = 0


@expected_shape()
def read(answer: Answer, url: str, body: Body) -> LlamaCompletion:
    """Reads an answer; its tokens are requested again in one piece where parts of characters were not streamed.

    Raises EngineError: an event of another form.
    """
    first_s = answer.chunks[0][0]
    token_ids: dict[int, int] = {}  # by position
    probs: dict[int, Mapping[str, Any]] = {}
    totals = [_Totals(arrived_s=first_s, tokens=1)]
    for arrived_s, event in answer.chunks:
        timings = event["timings"]
        now = _Totals(
            arrived_s=arrived_s,
            tokens=event["tokens_predicted"],
            milliseconds=timings["predicted_ms"],
            proposed=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
        )
        if now.tokens > 1 and now.milliseconds != totals[-1].milliseconds:
            totals.append(now)
        elif now.tokens > totals[-1].tokens:
            totals[-1] = now
        for token in event["tokens"]:
            token_ids[now.tokens - 1] = int(token)
        for prob in event.get("completion_probabilities", ()):
            probs[now.tokens - 1] = prob
    num_tokens = answer.chunks[-1][1]["tokens_predicted"]
    steps = tuple(_step(before, after) for before, after in itertools.pairwise(totals) if after.tokens > before.tokens)
    ordered = [token_ids[position] for position in sorted(token_ids)]
    log_probs = [_log_probs(probs.get(position, {})) for position in range(num_tokens)] if probs else []
    rounds = Counter(round_count for step in steps for round_count in _rounds_of(step))
    return LlamaCompletion(
        ttft_s=first_s - answer.started_s,
        decode_s=(steps[-1].arrived_s if steps else first_s) - first_s,
        token_ids=tuple(ordered if len(ordered) == num_tokens else tokens_again(url, body)),
        arrivals=((first_s, 1), *((step.arrived_s, step.accepted + step.rounds) for step in steps)),
        server_s=totals[-1].milliseconds / 1000.0,
        log_probs=tuple(log_prob for log_prob, _ in log_probs),
        gaps=tuple(gap for _, gap in log_probs),
        rounds=rounds,
        shapes=shapes_of(rounds),
        refills=answer.refills,
        steps=steps,
    )


def _step(before: _Totals, after: _Totals) -> Step:
    emitted = after.tokens - before.tokens
    # what is accepted past an end token is counted and never emitted
    accepted = min(after.accepted - before.accepted, emitted)
    return Step(
        arrived_s=after.arrived_s,
        seconds=(after.milliseconds - before.milliseconds) / 1000.0,
        proposed=after.proposed - before.proposed,
        accepted=accepted,
        rounds=max(1, emitted - accepted),
    )


def _rounds_of(step: Step) -> list[RoundCount]:
    """A step's rounds; the tokens of several are shared out evenly."""
    shares = [
        [total // step.rounds + (number < total % step.rounds) for number in range(step.rounds)]
        for total in (step.proposed, step.accepted)
    ]
    return list(map(RoundCount, *shares))


def _log_probs(prob: Mapping[str, Any]) -> tuple[float, float]:
    """A token's log-probability and the gap of the two largest logits; -inf and 0 where the server sent none.

    Gaps need `n_probs` 2 and no `post_sampling_probs`, and are 0 without.
    """
    ranked = [top["logprob"] for top in prob.get("top_logprobs", ()) if "logprob" in top]
    gap = max(0.0, ranked[0] - ranked[1]) if len(ranked) > 1 else 0.0
    if "prob" in prob:
        return (math.log(prob["prob"]) if prob["prob"] > 0.0 else -math.inf), gap
    return prob.get("logprob", -math.inf), gap


def tokens_again(url: str, body: Body) -> list[int]:
    """All tokens of a request, parts of characters too, in one piece, which reports no rounds. Raises EngineError."""
    with expected_shape():
        return [int(token) for token in json.loads(fetch(f"{url}{PATH}", body=body))["tokens"]]


SERVER = ServerKind(
    # it stops at its model's own end tokens, and at no others
    body_of=lambda workload, prompt: body_of(workload, prompt.token_ids),
    path=PATH,
    log_probs_of=lambda count: {"n_probs": count},
    read=read,
    objection=flags.objection,
    args_for=lambda setup, _: flags.args_for(setup),
    past_end=False,
    drops_short=True,
    look_up="ngram:max=3,min=3",
    verifies_by_sampling=True,
    reads_gguf=True,
)
