"""`ServerEngine`: the engine protocol on any OpenAI-compatible server, started from a template or running already.

Every setup has a server of its own; drafts are not traced but really run. Times are the client's: they contain HTTP and
the server's scheduling, as its users see them. How a setup is spelled for the server it is told.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from profiles.engines.base import SERVED_KINDS, EngineCapabilities
from profiles.engines.llamacpp import responses as llamacpp_responses
from profiles.engines.llamacpp.flags import keeps_history
from profiles.engines.lossless import check_end, check_queues
from profiles.engines.openai import responses
from profiles.engines.openai.launch import Launch
from profiles.engines.openai.responses import Completion, Encode
from profiles.engines.serving import metrics
from profiles.engines.serving.base import Served
from profiles.engines.serving.http_load import Body, drive, fetch
from profiles.engines.serving.pool import ServerPool
from profiles.engines.serving.process import RunningServer, Server
from profiles.engines.serving.sampling_check import check_means, texts_of
from profiles.engines.serving.server_kind import SERVER_KINDS_BY_NAME
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.records.core import PLAIN, Draft, Environment, Model, Prompt, Setup, Workload, digest_of
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, RoundCount, Rounds, Sample, StepShape, StepTimes, TargetTrace

NUM_LOADS, ROUNDS_OF_A_LOAD = 7, 28  # of which a plain round's seconds are taken
PATTERN = "The quick brown fox jumps over the lazy dog and runs on. "
_VERSIONS = (("/version", "version"), ("/server_info", "version"), ("/props", "build_info"))

Started = Server | RunningServer
Counted = tuple[Completion, Rounds | None]


class ServerEngine(Served[Setup, Started]):
    """A target and its drafts behind OpenAI-compatible servers; fits `protocol.Engine`, and is a context manager.

    `encode`: a text's token ids, nothing added.
    """

    def __init__(self, target: Model, drafts: tuple[Draft, ...], launch: Launch, encode: Encode, device: str) -> None:
        most_alive = launch.most_alive or (1 if device.startswith("cuda") else 2)
        super().__init__(target, drafts, ServerPool(self._start, most_alive))
        self._launch, self._encode, self._device = launch, encode, device
        self._dialect = SERVER_KINDS_BY_NAME[launch.kind]
        self._warm: WeakKeyDictionary[Started, set[int]] = WeakKeyDictionary()
        self._sampled_well: set[tuple[Draft | None, str]] = set()
        self._environment: Environment | None = None

    @property
    def capabilities(self) -> EngineCapabilities:
        kind = self._launch.kind
        return EngineCapabilities(
            name="server",
            times="rounds",
            past_end=self._dialect.past_end,
            batching="continuous",
            num_drafts="rounds that proposed",
            draft_kinds=SERVED_KINDS,
            traced_kinds=(),
            length_change="restart",
            keeps_history=self._dialect.keeps_history,
            drops_short=self._dialect.drops_short,
            origin=f"server {kind} {self.environment.engine_version} {self.target.dtype} {self._launch.digest}",
        )

    @property
    def environment(self) -> Environment:
        """This machine with the server's version, which is asked of a plain server; where a URL is, is not known."""
        if self._environment is None:
            kind = self._launch.kind
            options = {"served by": self._launch.template or self._launch.url}
            self._environment = replace(
                fingerprint(self._device),
                engine=kind,
                engine_version=_version(self._server(self._launch.running).url),
                engine_options=json.dumps(options, sort_keys=True),
            )
        return self._environment

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with the two largest log-probabilities of every token."""
        alone = replace(workload, batch_size=1)
        loader.check_prompts(alone, (prompt,))
        [run] = self._drive(PLAIN, alone, (prompt,), [self._dialect.log_probs_of(2)])
        return responses.trace_of(prompt, run, workload.end_token_ids)

    def trace_draft(
        self,
        workload: Workload,  # noqa: ARG002 -- the protocol's
        prompt: Prompt,  # noqa: ARG002
        trace: TargetTrace,  # noqa: ARG002
        draft: Draft,
        max_length: int,  # noqa: ARG002
    ) -> Acceptance:
        """Raises InputError: servers do not score a text with a draft."""
        raise InputError(f"draft {draft.name}: a server does not tell its acceptance over a text; it is run instead")

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:  # noqa: ARG002
        """Plain rounds of a full batch, a mean for each of seven loads."""
        asked, rows = self._synthetic(workload, context_length)
        self._warm_up(PLAIN, asked, rows)
        samples_s, disturbed = self._quietest(lambda: self._plain_rounds(asked, rows))
        times = StepTimes(
            component_digest=self.target.run_digest,
            batch_size=workload.batch_size,
            context_length=context_length,
            samples_s={1: samples_s},
            disturbed=disturbed,
        )
        return {times.component_digest: times}

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """The queue through each setup's server in turn, again while the machine is disturbed."""
        loader.check_prompts(workload, prompts)
        found = []
        for setup in setups:
            self._check_sampling(setup, workload, prompts)
            found.append(self._quietest(functools.partial(self._fresh_queue, setup, workload, prompts)))
        outputs = [
            (setup, [run.token_ids for run, _ in queue]) for setup, (queue, _) in zip(setups, found, strict=True)
        ]
        check_queues(self.target, workload, prompts, outputs, self.trace_target)
        return tuple(
            replace(_sample(setup, prompts, queue, number), disturbed=was_disturbed)
            for setup, (queue, was_disturbed) in zip(setups, found, strict=True)
            for number in range(len(prompts))
        )

    @property
    def _watched(self) -> tuple[str, ...] | None:
        return (self._device,) if self._launch.url is None else None

    def _start(self, setup: Setup) -> Started:
        launch = self._launch
        if launch.url is not None:
            if setup != launch.running:
                raise InputError(f"{setup.name}: the server {launch.url} runs {launch.running.name}, and only that")
            server: Started = RunningServer(launch.url)
            server.wait_ready(launch.silent_s)
            return server
        variables, words = launch.command(setup)
        server = Server(words, launch.log_path(setup), environment=variables)
        server.wait_ready(launch.ready_s)
        return server

    def _server(self, setup: Setup) -> Started:
        if setup.draft is not None:
            self._known(setup.draft)
        return self._fleet.ask(setup)

    def _drive(
        self, setup: Setup, workload: Workload, prompts: Sequence[Prompt], more: Sequence[Body] = ()
    ) -> list[Completion]:
        """One load, `more` added to each request; a server that fails is stopped: the next one meets a fresh one."""
        server, dialect = self._server(setup), self._dialect
        pairs = list(zip(prompts, more or [{}] * len(prompts), strict=True))
        try:
            with server.watched():
                name = _served_model(server.url)
                bodies = [{"model": name, **dialect.body_of(workload, prompt), **own} for prompt, own in pairs]
                answers = drive(server.url, dialect.path, bodies, workload.batch_size, self._launch.silent_s)
        except EngineError:
            self._fleet.stop(setup)
            raise
        piece = functools.partial(llamacpp_responses.tokens_again, server.url)
        again = [functools.partial(piece, body) if dialect.cuts_characters else None for body in bodies]
        runs = [responses.read(answer, self._encode, one) for answer, one in zip(answers, again, strict=True)]
        for run in runs:
            check_end(f"server with {setup.name}", workload, run.token_ids)
        return runs

    def _warm_up(self, setup: Setup, workload: Workload, prompts: Sequence[Prompt]) -> None:
        """The first requests of a server at a batch size are thrown away."""
        sizes = self._warm.setdefault(self._server(setup), set())
        if workload.batch_size not in sizes:
            self._drive(setup, workload, prompts[: workload.batch_size])
            sizes.add(workload.batch_size)

    def _fresh_queue(self, setup: Setup, workload: Workload, prompts: Sequence[Prompt]) -> list[Counted]:
        """As `_queue`, of a warm server whose drafts know nothing of what ran before, nor of the queue itself."""
        if keeps_history(setup) and self._dialect.keeps_history and self._launch.url is None:
            self._fleet.stop(setup)
            self._warm_up(setup, *self._synthetic(workload, workload.context_length))
        else:
            self._warm_up(setup, workload, prompts)
        return self._queue(setup, workload, prompts)

    def _queue(self, setup: Setup, workload: Workload, prompts: Sequence[Prompt]) -> list[Counted]:
        """A queue through a setup's server, each request with its rounds as far as the server tells."""
        prefix, dialect = self._dialect.counters, self._dialect
        if setup.draft is None or prefix is None or workload.batch_size > 1:
            return [(run, responses.rounds_of(run, dialect)) for run in self._drive(setup, workload, prompts)]
        found = []  # one request at a time, so that the counters' difference is its own
        for prompt in prompts:
            before = self._counters(setup, prefix)
            [run] = self._drive(setup, workload, (prompt,))
            rounds = responses.rounds_of(run, dialect)
            if rounds is None and before is not None and (after := self._counters(setup, prefix)) is not None:
                rounds = responses.rounds_between(run, after - before, dialect)
            found.append((run, rounds))
        return found

    def _check_sampling(self, setup: Setup, workload: Workload, prompts: Sequence[Prompt]) -> None:
        """Once for a draft and a way to sample: texts with and without it must be equally likely to the target.

        Raises EngineError when they are not, beyond chance. Not asked is what draws every token from the target.
        """
        law, dialect = (setup.draft, workload.sampling_digest), self._dialect
        is_sampled = workload.temperature > 0.0 and not dialect.draws_every_token
        if setup.draft is None or not is_sampled or law in self._sampled_well:
            return
        texts = texts_of(workload, prompts)
        more = [{**dialect.log_probs_of(1), "seed": seed} for _, seed in texts]
        drafted, plain = (self._drive(one, workload, [prompt for prompt, _ in texts], more) for one in (setup, PLAIN))
        check_means(
            f"server with {setup.name}", *(list(map(responses.mean_log_prob, runs)) for runs in (drafted, plain))
        )
        self._sampled_well.add(law)

    def _plain_rounds(self, workload: Workload, rows: Sequence[Prompt]) -> tuple[float, ...]:
        """Seconds, a mean for each load. Raises EngineError: in too few of them all rows were in flight together."""
        samples_s: list[float] = []
        for _ in range(2 * NUM_LOADS):
            round_s = _round_s(self._drive(PLAIN, workload, rows))
            samples_s += [] if round_s is None else [round_s]
            if len(samples_s) == NUM_LOADS:
                return tuple(samples_s)
        raise EngineError(f"of {2 * NUM_LOADS} loads of {len(rows)} requests, {len(samples_s)} were decoded together")

    def _counters(self, setup: Setup, prefix: str) -> metrics.Counters | None:
        """None where the server publishes none: rounds are then not known."""
        try:
            return metrics.read_counters(self._server(setup).url, prefix)
        except EngineError:
            return None

    def _synthetic(self, workload: Workload, context_length: int) -> tuple[Workload, tuple[Prompt, ...]]:
        """A load whose rows have `context_length` tokens halfway; long enough for rows that start one after another."""
        size = workload.batch_size
        num_new = ROUNDS_OF_A_LOAD + size
        length = max(1, min(context_length + num_new // 2, workload.context_length) - num_new)
        pattern = list(self._encode(PATTERN))
        rows = tuple(
            Prompt(domain="steps", token_ids=tuple(itertools.islice(itertools.cycle(pattern), row, row + length)))
            for row in range(size)
        )
        asked = replace(workload, max_new_tokens=num_new, context_length=length + num_new, end_token_ids=())
        return asked, rows


def _sample(setup: Setup, prompts: Sequence[Prompt], queue: Sequence[Counted], number: int) -> Sample:
    run, rounds = queue[number]
    num_tokens = len(run.token_ids)
    if setup.draft is None:
        rounds = {RoundCount(0, 0): num_tokens - 1} if num_tokens > 1 else {}
    shapes: Counter[StepShape] = Counter()
    for (proposed, _), count in (rounds or {}).items():
        shapes[StepShape(proposed + 1)] += count
    return Sample(
        setup_digest=setup.digest,
        prompt_digest=prompts[number].digest,
        ttft_s=run.first_s - run.answer.started_s,
        decode_s=run.last_s - run.first_s,
        output_tokens=num_tokens,
        rounds=rounds or {},
        shapes=shapes,
        refills=run.answer.refills,
        output_digest=digest_of(run.token_ids),
    )


def _round_s(runs: Sequence[Completion]) -> float | None:
    """Seconds a token of the row that started last, while all rows were in flight; a mean, for events come in bursts.

    None where they never were.
    """
    until_s = min(run.last_s for run in runs)
    last = max(runs, key=lambda run: run.first_s)
    seen = [(at_s, num_tokens or 1) for at_s, num_tokens in last.arrivals if at_s <= until_s]
    if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
        return None
    return (seen[-1][0] - seen[0][0]) / sum(num_tokens for _, num_tokens in seen[1:])


def _served_model(url: str) -> str:
    """The name a server gives its model; its first, where it has several."""
    try:
        return str(json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{url}/v1/models names no model") from error


def _version(url: str) -> str:
    for path, name in _VERSIONS:
        try:
            found = json.loads(fetch(f"{url}{path}"))
        except (EngineError, ValueError):
            continue
        if isinstance(found, dict) and found.get(name):
            return str(found[name])
    return "unknown"
