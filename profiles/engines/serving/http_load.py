"""A load on an HTTP server: requests streamed with a fixed number in flight, every event with its arrival time.

Knows no engine: what the events mean its adapters say.
"""

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from profiles.engines.serving.logs import one_line
from profiles.records.errors import EngineError
from profiles.timing.clock import Clock

TIMEOUT_S = 300.0
POLL_S = 0.002
DONE = "[DONE]"
FIRST_ERROR_STATUS = 400
Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One streamed answer: when it was asked for, and its events with the seconds at which they came, on one clock.

    `refills`: other requests whose first event came during it. Those that came in together with it do not count.
    """

    started_s: float
    chunks: tuple[tuple[float, Mapping[str, Any]], ...]
    refills: int = 0

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
    """Posts every body and reads the streams, `concurrency` in flight all the time; answers in the bodies' order.

    A queue longer than that goes round again when it is empty, so that its last answers are decoded under the same load
    as its first; what is asked for twice is broken off and thrown away. `timeout_s`: how long a server may be silent.
    Raises EngineError: it is gone, answers an error (its message is given), is silent for too long, or its stream is no
    stream of JSON events that comes to an end.
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
    streams = [_Stream() for _ in bodies]
    waiting = iter(list(zip(streams, bodies, strict=True)))
    again = itertools.cycle(bodies) if len(bodies) > concurrency > 1 else iter(())
    fillers: list[_Stream] = []
    clock = Clock("cpu")
    # llama.cpp closes a connection after a stream; a request sent at that moment would be lost
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=0)
    encrypted = url.startswith("https")  # reading the certificates takes longer than a short answer
    async with httpx2.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False, verify=encrypted) as client:

        async def ask(stream: _Stream, body: Body) -> None:
            try:
                await _ask(client, url, (stream, body), clock)
            except httpx2.HTTPError as error:
                raise _lost(url, error, timeout_s) from error

        async def serve() -> None:
            for stream, body in waiting:  # shared: the slot that is free takes the next
                await ask(stream, body)
            for body in again:
                if all(stream.ended for stream in streams):
                    break
                fillers.append(_Stream())
                await ask(fillers[-1], body)

        async def end() -> None:
            while not all(stream.ended for stream in streams):
                await asyncio.sleep(POLL_S)
            for slot in slots:
                slot.cancel()

        async with asyncio.TaskGroup() as group:
            slots = [group.create_task(serve()) for _ in range(concurrency)]
            group.create_task(end())
    firsts_s = [stream.chunks[0][0] for stream in (*streams, *fillers) if stream.chunks]
    return tuple(stream.answer(firsts_s) for stream in streams)


@dataclass(slots=True)
class _Stream:
    """An answer under way."""

    started_s: float = 0.0
    chunks: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)
    ended: bool = False

    def answer(self, firsts_s: Sequence[float]) -> Answer:
        """`firsts_s`: when the first events of all requests came; within half a gap between events it was together."""
        first_s, last_s = self.chunks[0][0], self.chunks[-1][0]
        together_s = first_s + (last_s - first_s) / (2 * len(self.chunks))
        refills = sum(together_s < other_s <= last_s for other_s in firsts_s)
        return Answer(started_s=self.started_s, chunks=tuple(self.chunks), refills=refills)


async def _ask(client: httpx2.AsyncClient, url: str, asked: tuple[_Stream, Body], clock: Clock) -> None:
    (stream, body), ended = asked, False
    chunks = stream.chunks
    stream.started_s = clock.read()
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
    stream.ended = True


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
