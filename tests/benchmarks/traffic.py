"""Streams of requests as data, and what may go wrong while they are served: the input of `tests.benchmarks.simulator`.

A stream is a list of requests in their order; every builder draws it from the same prompts by a seed. It knows nothing
of setups, engines or times.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from profiles.records.core import Prompt, Setup
from profiles.records.errors import InputError

ALL = ()  # a phase of all domains, in turn


class Request(NamedTuple):
    """A prompt to decode, and how many rows may be in use when it is let in, itself included.

    `most_tokens`: it wants no more output than that; None: as the workload has it. `phase` numbers its part of the
    stream.
    """

    prompt: Prompt
    concurrency: int
    most_tokens: int | None = None
    phase: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`num_requests` of some domains in turn (none named: of all), `concurrency` at a time."""

    num_requests: int
    domains: tuple[str, ...] = ALL
    concurrency: int = 1
    most_tokens: int | None = None

    def __post_init__(self) -> None:
        for what, value in (("requests", self.num_requests), ("rows", self.concurrency)):
            if value < 1:
                raise InputError(f"a phase of {value} {what}: at least 1 is needed")
        if self.most_tokens is not None and self.most_tokens < 1:
            raise InputError(f"requests of {self.most_tokens} tokens: at least 1 is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Requests in the order in which they are let in."""

    name: str
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise InputError(f"stream {self.name!r} has no requests: at least 1 is needed")

    @property
    def most_rows(self) -> int:
        """The largest batch it can come to."""
        return max(request.concurrency for request in self.requests)


def stream_of(name: str, phases: Sequence[Phase], prompts: Sequence[Prompt], seed: int) -> Stream:
    """The stream of these phases; every domain's prompts are dealt in a drawn order before any is used again.

    Raises InputError for a domain that no prompt has.
    """
    rng = random.Random(f"{seed} {name}")
    domains = tuple(dict.fromkeys(prompt.domain for prompt in prompts))
    decks: Mapping[str, list[Prompt]] = {domain: [] for domain in domains}
    requests = []
    for number, phase in enumerate(phases):
        wanted = phase.domains or domains
        for number_in_phase in range(phase.num_requests):
            domain = wanted[number_in_phase % len(wanted)]
            if domain not in decks:
                raise InputError(f"domain {domain!r}: the prompts have {', '.join(domains)}")
            deck = decks[domain]
            if not deck:
                deck += (prompt for prompt in prompts if prompt.domain == domain)
                rng.shuffle(deck)
            requests.append(Request(deck.pop(), phase.concurrency, phase.most_tokens, number))
    return Stream(name=name, requests=tuple(requests))


def steady(prompts: Sequence[Prompt], seed: int, *, num_requests: int = 60, concurrency: int = 1) -> Stream:
    """All domains in turn, request by request."""
    return stream_of("steady", [Phase(num_requests=num_requests, concurrency=concurrency)], prompts, seed)


def shifting(
    prompts: Sequence[Prompt], seed: int, *, domains: Sequence[str], num_requests: int = 16, concurrency: int = 1
) -> Stream:
    """One domain after the other, `num_requests` of each."""
    phases = [Phase(num_requests=num_requests, domains=(domain,), concurrency=concurrency) for domain in domains]
    return stream_of("domain shift", phases, prompts, seed)


def batch_shift(
    prompts: Sequence[Prompt], seed: int, *, batches: Sequence[int], turns: int = 2, domains: tuple[str, ...] = ALL
) -> Stream:
    """The batch goes up through `batches` and down again, each kept full for `turns` requests a row."""
    there_and_back = [*batches, *reversed(batches[:-1])]
    phases = [Phase(num_requests=turns * size, domains=domains, concurrency=size) for size in there_and_back]
    return stream_of("batch shift", phases, prompts, seed)


def bursty(prompts: Sequence[Prompt], seed: int, *, batches: Sequence[int], num_bursts: int = 12) -> Stream:
    """The batch jumps among `batches` at drawn moments; a burst is one to three requests a row."""
    rng = random.Random(f"{seed} bursts")
    phases = []
    for _ in range(num_bursts):
        size = rng.choice(list(batches))
        phases.append(Phase(num_requests=size * rng.randint(1, 3), concurrency=size))
    return stream_of("bursty", phases, prompts, seed)


def flipping(prompts: Sequence[Prompt], seed: int, *, batch: int, most_tokens: int = 4, num_flips: int = 60) -> Stream:
    """One long request at a time, joined every few rounds by short ones that fill the batch and leave at once."""
    calm = Phase(num_requests=1)
    rush = Phase(num_requests=batch - 1, concurrency=batch, most_tokens=most_tokens)
    return stream_of("flipping", [calm, rush] * num_flips, prompts, seed)


def mislabelled(stream: Stream) -> Stream:
    """The same requests under the names of other domains, each under the one that comes next."""
    domains = tuple(dict.fromkeys(request.prompt.domain for request in stream.requests))
    names = dict(zip(domains, (*domains[1:], *domains[:1]), strict=True))
    requests = tuple(
        request._replace(prompt=replace(request.prompt, domain=names[request.prompt.domain]))
        for request in stream.requests
    )
    return Stream(name=f"{stream.name}, mislabelled", requests=requests)


class Moment(NamedTuple):
    """A round about to be played: its number in the stream, seconds so far, its setup, how it came about.

    `rounds_on`: how many rounds in a row this very draft was used before; 0 when it is just switched to.
    """

    number: int
    seconds: float
    setup: Setup
    rounds_on: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What disturbs a simulated server.

    `slows`: how many times longer a round takes, whatever it runs. `fails`: probability with which each token that
    would be accepted is rejected.
    """

    slows: Callable[[Moment], float] = lambda _: 1.0
    fails: Callable[[Moment], float] = lambda _: 0.0


def useless_at_first(num_rounds: int) -> Disturbance:
    """A draft is useless for the first rounds after it was switched to, and as it should be later."""
    return Disturbance(fails=lambda moment: moment.rounds_on < num_rounds)


def useless_later(num_rounds: int) -> Disturbance:
    """A draft is as it should be for a while after it was switched to, and useless from then on."""
    return Disturbance(fails=lambda moment: moment.rounds_on >= num_rounds)


def outages(period: int, num_rounds: int) -> Disturbance:
    """All drafts are useless for the last `num_rounds` out of every `period`."""
    return Disturbance(fails=lambda moment: moment.number % period >= period - num_rounds)


def spikes(period: int, num_rounds: int, factor: float) -> Disturbance:
    """The last `num_rounds` out of every `period` take `factor` times as long."""
    return Disturbance(slows=lambda moment: factor if moment.number % period >= period - num_rounds else 1.0)


def drift(num_rounds: int, share: float) -> Disturbance:
    """The acceptance of model drafts falls by `share` over so many rounds, and stays there."""

    def fails(moment: Moment) -> float:
        is_model = moment.setup.draft is not None and moment.setup.draft.kind == "model"
        return share * min(1.0, moment.number / num_rounds) if is_model else 0.0

    return Disturbance(fails=fails)
