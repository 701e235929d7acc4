"""A load on an HTTP server: streamed requests, a fixed number in flight, every event with its arrival time."""

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from profiles.engines.serving.logs import one_line
from profiles.engines.serving.redaction import redacted
from profiles.records.errors import EngineError
from profiles.timing.clock import Clock

TIMEOUT_S = 300.0
DONE = "[DONE]"
FIRST_ERROR_STATUS = 400
Body = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Answer:
    """One streamed answer: seconds of its request and of its events, on one clock.

    `refills`: other requests whose first event came during it, without those that came in together with it.
    """

    started_s: float = 0.0
    chunks: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    refills: int = 0
    ended: bool = False

    @property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(event for _, event in self.chunks)


def drive(
    base_url: str, path: str, bodies: Sequence[Body], concurrency: int, timeout_s: float = TIMEOUT_S
) -> tuple[Answer, ...]:
    """Posts every body and reads the streams, `concurrency` in flight; answers in the bodies' order.

    A longer queue starts again when it is empty, so that its last answers are decoded under the same load as its first;
    repeated requests are cancelled and dropped. `timeout_s`: how long a server may be silent.
    Raises EngineError: the server is gone, answers an error (its message is given), is silent for too long, or its
    stream is not one of JSON events that comes to an end.
    """
    try:
        return asyncio.run(_drive(f"{base_url}{path}", bodies, concurrency, timeout_s))
    except ExceptionGroup as errors:  # of the requests in flight; the first that failed ended the others
        raise _first(errors) from errors


def fetch(url: str, *, body: Body | None = None) -> str:
    """The text that a GET answers, or a POST of `body`. Raises EngineError: no answer, or an error status."""
    method = "GET" if body is None else "POST"
    try:
        response = httpx2.request(method, url, json=body, timeout=TIMEOUT_S, trust_env=False)
    except httpx2.HTTPError as error:
        raise _connection_error(url, error, TIMEOUT_S) from error
    if response.status_code >= FIRST_ERROR_STATUS:
        raise _status_error(url, response)
    return response.text


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


async def _drive(url: str, bodies: Sequence[Body], concurrency: int, timeout_s: float) -> tuple[Answer, ...]:
    answers = [Answer() for _ in bodies]
    fillers: list[Answer] = []
    waiting = zip(answers, bodies, strict=True)
    repeated = itertools.cycle(bodies) if len(bodies) > concurrency > 1 else iter(())
    clock = Clock("cpu")
    # llama.cpp closes a connection after a stream; a request sent at that moment would be lost
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=0)
    is_encrypted = url.startswith("https")  # reading the certificates takes longer than a short answer
    async with httpx2.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False, verify=is_encrypted) as client:

        async def read(answer: Answer, body: Body) -> None:
            try:
                await _read(client, url, body, answer, clock)
            except httpx2.HTTPError as error:
                raise _connection_error(url, error, timeout_s) from error
            if all(answer.ended for answer in answers):
                all_ended.set()

        async def serve() -> None:
            for answer, body in waiting:  # shared: the slot that is free takes the next
                await read(answer, body)
            for body in repeated:
                fillers.append(Answer())
                await read(fillers[-1], body)

        all_ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            slots = [group.create_task(serve()) for _ in range(concurrency)]
            await all_ended.wait()
            for slot in slots:
                slot.cancel()
    firsts_s = [answer.chunks[0][0] for answer in (*answers, *fillers) if answer.chunks]
    for answer in answers:
        answer.refills = _refills(answer, firsts_s)
    return tuple(answers)


def _refills(answer: Answer, firsts_s: Sequence[float]) -> int:
    """`firsts_s`: the first events of all requests; within half a gap between events they came in together."""
    first_s, last_s = answer.chunks[0][0], answer.chunks[-1][0]
    together_s = first_s + (last_s - first_s) / (2 * len(answer.chunks))
    return sum(together_s < other_s <= last_s for other_s in firsts_s)


async def _read(client: httpx2.AsyncClient, url: str, body: Body, answer: Answer, clock: Clock) -> None:
    ended = False
    answer.started_s = clock.read()
    async with client.stream("POST", url, json={**body, "stream": True}) as response:
        if response.status_code >= FIRST_ERROR_STATUS:
            await response.aread()
            raise _status_error(url, response)
        async for sent in httpx2.EventSource(response):
            arrived_s = clock.read()
            if sent.data == DONE:
                ended = True
            elif sent.data:
                event = _decoded(url, sent.data)
                ended = ended or _is_last(event)
                answer.chunks.append((arrived_s, event))
    if not ended or not answer.chunks:
        raise EngineError(f"{redacted(url)} ended its answer in the middle, after {len(answer.chunks)} events")
    answer.ended = True


def _decoded(url: str, data: str) -> Mapping[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise EngineError(f"{redacted(url)} sent {one_line(data)[:80]!r}: a JSON object is needed")
    if event.get("error"):
        raise EngineError(f"{redacted(url)} says: {_message(event)}")
    return event


def _is_last(event: Mapping[str, Any]) -> bool:
    """Whether an event ends its answer, in llama.cpp's form or in OpenAI's."""
    choices = event.get("choices")
    return event.get("stop") is True or (
        isinstance(choices, list)
        and any(isinstance(choice, dict) and choice.get("finish_reason") for choice in choices)
    )


def _status_error(url: str, response: httpx2.Response) -> EngineError:
    try:
        message = _message(response.json())
    except (ValueError, RecursionError):
        message = one_line(response.text)
    return EngineError(f"{redacted(url)} answers {response.status_code}: {message or 'no message'}")


def _message(value: Any) -> str:
    """The message of an error: `error.message`, `message`, `detail`, or all of it."""
    inner = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail") or inner
    return one_line(inner if isinstance(inner, str) else json.dumps(inner))


def _connection_error(url: str, error: httpx2.HTTPError, timeout_s: float) -> EngineError:
    if isinstance(error, httpx2.TimeoutException):
        return EngineError(f"{redacted(url)} was silent for {timeout_s:g} s")
    return EngineError(f"{redacted(url)} cannot be reached: {one_line(str(error)) or type(error).__name__}")
