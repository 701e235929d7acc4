"""A load on an HTTP server: requests streamed with a fixed number in flight, every event with its arrival time.

Knows no engine: what the events mean its adapters say.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from profiles.clock import Clock
from profiles.errors import EngineError
from profiles.serving.log import one_line

TIMEOUT_S = 300.0
DONE = "[DONE]"
FIRST_ERROR_STATUS = 400
Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One streamed answer: when it was asked for, and its events with the seconds at which they came, on one clock."""

    started_s: float
    chunks: tuple[tuple[float, Mapping[str, Any]], ...]

    @property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(event for _, event in self.chunks)

    @property
    def last(self) -> Mapping[str, Any]:
        """The last event, where servers put their totals."""
        return self.chunks[-1][1]


def drive(
    base_url: str, path: str, bodies: Sequence[Body], concurrency: int, timeout_s: float = TIMEOUT_S
) -> tuple[Answer, ...]:
    """Posts every body and reads the streams, `concurrency` in flight until none is left; answers in the bodies' order.

    `timeout_s`: how long a server may be silent. Raises EngineError: it is gone, answers an error (its message is
    given), is silent for too long, or its stream is no stream of JSON events that comes to an end.
    """
    try:
        return asyncio.run(_drive(f"{base_url}{path}", bodies, concurrency, timeout_s))
    except ExceptionGroup as errors:  # of the requests in flight; the first that failed ended the others
        raise _first(errors) from errors


def fetch(url: str, timeout_s: float = TIMEOUT_S) -> str:
    """The text that a GET answers. Raises EngineError: no answer, or an error status."""
    try:
        answer = httpx2.get(url, timeout=timeout_s, trust_env=False)
    except httpx2.HTTPError as error:
        raise _lost(url, error, timeout_s) from error
    if answer.status_code >= FIRST_ERROR_STATUS:
        raise _refused(url, answer)
    return answer.text


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    one = errors.exceptions[0]
    return _first(one) if isinstance(one, ExceptionGroup) else one


async def _drive(url: str, bodies: Sequence[Body], concurrency: int, timeout_s: float) -> tuple[Answer, ...]:
    answers: list[Answer | None] = [None] * len(bodies)
    waiting = iter(enumerate(bodies))
    clock = Clock("cpu")
    # llama.cpp closes a connection after a stream; a request sent at that moment would be lost
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False) as client:

        async def serve(requests: Iterator[tuple[int, Body]]) -> None:
            for index, body in requests:  # shared: the slot that is free takes the next
                try:
                    answers[index] = await _ask(client, url, body, clock)
                except httpx2.HTTPError as error:
                    raise _lost(url, error, timeout_s) from error

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(serve(waiting))
    return tuple(answer for answer in answers if answer is not None)


async def _ask(client: httpx2.AsyncClient, url: str, body: Body, clock: Clock) -> Answer:
    chunks: list[tuple[float, Mapping[str, Any]]] = []
    ended = False
    started_s = clock.read()
    async with client.stream("POST", url, json={**body, "stream": True}) as response:
        if response.status_code >= FIRST_ERROR_STATUS:
            await response.aread()
            raise _refused(url, response)
        async for sent in httpx2.EventSource(response):
            arrived_s = clock.read()
            if sent.data == DONE:
                ended = True
            elif sent.data:
                event = _decoded(url, sent.data)
                ended = ended or _is_last(event)
                chunks.append((arrived_s, event))
    if not ended or not chunks:
        raise EngineError(f"{url} ended its answer in the middle, after {len(chunks)} events")
    return Answer(started_s=started_s, chunks=tuple(chunks))


def _decoded(url: str, data: str) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise EngineError(f"{url} sent {one_line(data)[:80]!r}: a JSON object is needed")
    if event.get("error"):
        raise EngineError(f"{url} says: {_message(event)}")
    return event


def _is_last(event: Mapping[str, Any]) -> bool:
    """Whether an event says that its answer is complete, in llama.cpp's way or in OpenAI's."""
    if event.get("stop") is True:
        return True
    choices = event.get("choices")
    return isinstance(choices, list) and any(isinstance(one, dict) and one.get("finish_reason") for one in choices)


def _refused(url: str, answer: httpx2.Response) -> EngineError:
    try:
        said = _message(answer.json())
    except (ValueError, RecursionError):
        said = one_line(answer.text)
    return EngineError(f"{url} answers {answer.status_code}: {said or 'it says nothing'}")


def _message(said: Any) -> str:
    """The message in an error as servers write it: `error.message`, `message`, `detail`, or all of it."""
    inner = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    return one_line(inner if isinstance(inner, str) else json.dumps(inner))


def _lost(url: str, error: httpx2.HTTPError, timeout_s: float) -> EngineError:
    if isinstance(error, httpx2.TimeoutException):
        return EngineError(f"{url} was silent for {timeout_s:g} s")
    return EngineError(f"{url} cannot be talked to: {one_line(str(error)) or type(error).__name__}")
