"""What llama.cpp's `/completion` is asked and how its stream is read: tokens, rounds and the server's own seconds.

Every event holds one token and the running totals `predicted_n`, `predicted_ms`, `draft_n` and `draft_n_accepted`; the
milliseconds are read once a round, so tokens with equal ones came of one round.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from profiles.engines.serving.http_load import TIMEOUT_S, Answer
from profiles.engines.serving.logs import one_line
from profiles.records.core import Prompt, Setup, Workload, digest_of
from profiles.records.errors import EngineError
from profiles.records.evidence import RoundCount, Rounds, Sample, Shapes, StepShape

PATH = "/completion"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One round of a request: when it ended (client's clock), seconds on the server's, and what came of it.

    `rounds` above 1: so many rounds that cannot be told apart, because they emitted nothing but parts of a character.
    """

    arrived_s: float
    seconds: float
    proposed: int
    accepted: int
    rounds: int

    @property
    def split(self) -> list[RoundCount]:
        """(proposed, accepted) of its rounds; of several, shared out evenly."""
        proposed, accepted = _shares(self.proposed, self.rounds), _shares(self.accepted, self.rounds)
        return list(map(RoundCount, proposed, accepted))


def _shares(total: int, count: int) -> list[int]:
    return [total // count + (place < total % count) for place in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One answer: its tokens and what was told of each, by place (parts of characters are missing), and its rounds."""

    num_tokens: int
    tokens: Mapping[int, int]
    probs: Mapping[int, Mapping[str, Any]]
    steps: tuple[Step, ...]
    started_s: float
    first_s: float
    last_s: float
    decode_s: float
    refills: int

    @property
    def token_ids(self) -> list[int] | None:
        """All tokens in order; None where some were not streamed, see `tokens_again`."""
        ordered = [self.tokens[place] for place in sorted(self.tokens)]
        return ordered if len(ordered) == self.num_tokens else None

    @property
    def rounds(self) -> Rounds:
        return Counter(pair for step in self.steps for pair in step.split)

    @property
    def shapes(self) -> Shapes:
        return Counter(StepShape(proposed + 1) for step in self.steps for proposed, _ in step.split)


def body_of(workload: Workload, token_ids: Sequence[int], **more: Any) -> dict[str, Any]:
    """A request for a timed run: samplers as the workload says and no others, nothing cached, rounds told.

    Temperature comes before top-k and top-p, as in torch and vLLM; llama.cpp's own order is another law.
    """
    law = {"temperature": workload.temperature, "samplers": ["temperature"]}
    if workload.temperature > 0.0:
        law |= {"samplers": ["temperature", "top_k", "top_p"], "top_k": workload.top_k, "top_p": workload.top_p}
    return {
        "prompt": list(token_ids),
        "n_predict": workload.max_new_tokens,
        "seed": workload.seed,
        "ignore_eos": not workload.end_token_ids,
        "cache_prompt": False,
        "return_tokens": True,
        "timings_per_token": True,
        **law,
        **more,
    }


def read(answer: Answer, url: str) -> Generated:
    """The answer's tokens and rounds. Raises EngineError: an event that llama.cpp does not send."""
    try:
        return _read(answer)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise EngineError(f"{url} answers as no llama-server does: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    arrived_s: float
    tokens: int
    milliseconds: float
    proposed: int
    accepted: int


def _totals(arrived_s: float, event: Mapping[str, Any]) -> _Totals:
    timings = event["timings"]
    return _Totals(
        arrived_s=arrived_s,
        tokens=event["tokens_predicted"],
        milliseconds=timings["predicted_ms"],
        proposed=timings.get("draft_n", 0),
        accepted=timings.get("draft_n_accepted", 0),
    )


def _read(answer: Answer) -> Generated:
    tokens: dict[int, int] = {}
    probs: dict[int, Mapping[str, Any]] = {}
    first_s = answer.chunks[0][0]
    totals = [_Totals(arrived_s=first_s, tokens=1, milliseconds=0.0, proposed=0, accepted=0)]
    for arrived_s, event in answer.chunks:
        now = _totals(arrived_s, event)
        if now.tokens > 1 and now.milliseconds != totals[-1].milliseconds:
            totals.append(now)
        elif now.tokens > totals[-1].tokens:
            totals[-1] = now
        for token in event["tokens"]:
            tokens[now.tokens - 1] = int(token)
        for told in event.get("completion_probabilities", ()):
            probs[now.tokens - 1] = told
    last = answer.last
    return Generated(
        num_tokens=last["tokens_predicted"],
        tokens=tokens,
        probs=probs,
        steps=tuple(_step(*pair) for pair in itertools.pairwise(totals) if pair[1].tokens > pair[0].tokens),
        started_s=answer.started_s,
        first_s=first_s,
        last_s=answer.chunks[-1][0],
        decode_s=totals[-1].milliseconds / 1000.0,
        refills=answer.refills,
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


def probs_of(run: Generated) -> tuple[list[float], list[float]]:
    """The probability of every token and the gap of the two largest logits; 0 and 0 where the server told none.

    Gaps need `n_probs` 2 and no `post_sampling_probs`, and are 0 without.
    """
    probs, gaps = [], []
    for place in range(run.num_tokens):
        told = run.probs.get(place, {"prob": 0.0})
        ranked = [one["logprob"] for one in told.get("top_logprobs", ())]
        probs.append(told["prob"] if "prob" in told else math.exp(told["logprob"]))
        gaps.append(max(0.0, ranked[0] - ranked[1]) if len(ranked) > 1 else 0.0)
    return probs, gaps


def tokens_again(url: str, body: Mapping[str, Any]) -> list[int]:
    """All tokens of a request, parts of characters too: asked again in one piece, where no round is told.

    Raises EngineError.
    """
    try:
        answer = httpx2.post(f"{url}{PATH}", json=dict(body), timeout=TIMEOUT_S, trust_env=False)
        answer.raise_for_status()
        return [int(token) for token in answer.json()["tokens"]]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{url}{PATH} did not answer: {one_line(str(error)) or type(error).__name__}") from error


def sample_of(setup: Setup, prompt: Prompt, number: int, runs: Sequence[Generated], token_ids: list[int]) -> Sample:
    """The run of one prompt among those of its queue; a first token of another that came meanwhile was a refill."""
    run = runs[number]
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompt.digest,
        ttft_s=run.first_s - run.started_s,
        decode_s=run.decode_s,
        output_tokens=len(token_ids),
        rounds=run.rounds,
        shapes=run.shapes,
        refills=run.refills,
        output_digest=digest_of(token_ids),
    )
