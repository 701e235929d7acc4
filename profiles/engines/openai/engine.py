"""`ServerEngine`: the engine protocol on any OpenAI-compatible server that a template starts.

Every setup has a server of its own; drafts are not traced but run. Times are the client's: they contain HTTP and the
server's scheduling, as its users see them.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import replace

from profiles.engines.base import EngineCapabilities
from profiles.engines.llamacpp.flags import keeps_history
from profiles.engines.lossless import check_end
from profiles.engines.openai.launch import Launch
from profiles.engines.serving.base import Run, ServedEngine
from profiles.engines.serving.completion import Completion, Encode, rounds_between
from profiles.engines.serving.http_load import Body, drive, fetch
from profiles.engines.serving.metrics import read_counters
from profiles.engines.serving.pool import ServerPool
from profiles.engines.serving.process import Server
from profiles.engines.serving.redaction import keyed_variables, redacted
from profiles.engines.serving.sampling_check import texts_of
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.records.core import PLAIN, Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, RoundCount, StepTimes, TargetTrace

NUM_LOADS, ROUNDS_PER_LOAD = 7, 28  # from which a plain round's seconds are taken
PATTERN = "The quick brown fox jumps over the lazy dog and runs on. "
_VERSIONS = (("/version", "version"), ("/server_info", "version"), ("/props", "build_info"))


class ServerEngine(ServedEngine[Setup, Server]):
    """A target and its drafts behind OpenAI-compatible servers; fits `Engine`. A context manager.

    `encode`: a text's token ids, nothing added.
    """

    _label = "server"

    def __init__(self, target: Model, drafts: tuple[Draft, ...], launch: Launch, encode: Encode, device: str) -> None:
        max_alive = 1 if device.startswith("cuda") else 2  # a GPU is taken whole; else plain decoding and a draft
        super().__init__(target, drafts, ServerPool(self._start, max_alive))
        self._launch, self._encode, self._device = launch, encode, device
        self._watched_gpus = (device,)
        self._kind = launch.server_kind
        self._environment: Environment | None = None

    @property
    def capabilities(self) -> EngineCapabilities:
        version = self.environment.engine_version
        return EngineCapabilities(
            name="server",
            past_end=self._kind.past_end,
            traced_kinds=(),
            drops_short=self._kind.drops_short,
            origin=f"server {self._launch.kind} {version} {self.target.dtype} {self._launch.digest}",
        )

    @property
    def environment(self) -> Environment:
        """This machine with the server's version, which a plain server reports."""
        if self._environment is None:
            options: dict[str, object] = {"served by": self._launch.identity}
            if variables := keyed_variables(os.environ):
                options["environment"] = variables
            self._environment = replace(
                fingerprint(self._device),
                engine=self._launch.kind,
                engine_version=_version(self._server(PLAIN).url),
                engine_options=json.dumps(options, sort_keys=True),
            )
        return self._environment

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with the two largest log-probabilities of every token."""
        alone = replace(workload, batch_size=1)
        loader.check_prompts(alone, (prompt,))
        [run] = self._complete(PLAIN, alone, (prompt,), [self._kind.log_probs_of(2)])
        return run.trace(prompt, workload.end_token_ids)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """Raises InputError: servers do not score a text with a draft."""
        raise InputError(f"draft {draft.name}: a server does not report its acceptance over a text; it is run instead")

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Plain rounds of a full batch, a mean for each of seven loads."""
        synthetic, rows = self._synthetic(workload, context_length)
        self._warm_up(PLAIN, synthetic, rows)
        plain = self.target.run_digest
        return self._timed(workload, context_length, lambda: {plain: {1: self._plain_rounds(synthetic, rows)}})

    def _start(self, setup: Setup) -> Server:
        launch = self._launch
        variables, command = launch.command(setup)
        server = Server(command, launch.log_path(setup), environment=variables)
        server.wait_ready(launch.ready_s)
        return server

    def _server(self, setup: Setup) -> Server:
        self._check_draft(setup.draft)
        return self._pool.get(setup)

    def _complete(
        self, setup: Setup, workload: Workload, prompts: Sequence[Prompt], more: Sequence[Body] = ()
    ) -> list[Completion]:
        """One load, `more` added to each request; a server that fails is stopped: the next load has a new one."""
        server, kind = self._server(setup), self._kind
        pairs = list(zip(prompts, more or [{}] * len(prompts), strict=True))
        try:
            with server.watched():
                name = _model_name(server.url)
                bodies = [{"model": name, **kind.body_of(workload, prompt), **extra} for prompt, extra in pairs]
                answers = drive(server.url, kind.path, bodies, workload.batch_size, self._launch.silent_s)
        except EngineError:
            self._pool.stop(setup)
            raise
        completions = [
            kind.completion(answer, self._encode, server.url, body)
            for answer, body in zip(answers, bodies, strict=True)
        ]
        for completion in completions:
            check_end(f"server with {setup.name}", workload, completion.token_ids)
        return completions

    def _warm_up(self, setup: Setup, workload: Workload, prompts: Sequence[Prompt]) -> None:
        """Drops the first requests of a server at a batch size."""
        warm = self._server(setup).warm
        if workload.batch_size not in warm:
            self._complete(setup, workload, prompts[: workload.batch_size])
            warm.add(workload.batch_size)

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        self._check_draft(setup.draft)
        loader.check_prompts(workload, prompts)

    def _prepare(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        if not self._kind.verifies_by_sampling:
            self._check_sampling_once(workload, prompts, setup)

    def _decode(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[Run]:
        """The queue through a warm server; one whose drafts have a history is new, and warmed up by other texts."""
        if keeps_history(setup) and self._kind.keeps_history:
            self._pool.stop(setup)
            self._warm_up(setup, *self._synthetic(workload, workload.context_length))
        else:
            self._warm_up(setup, workload, prompts)
        if setup.draft is None:
            completions = self._complete(setup, workload, prompts)
            counts = [len(completion.token_ids) - 1 for completion in completions]
            plain = [{RoundCount(0, 0): count} if count else {} for count in counts]
            return [completion.run(rounds) for completion, rounds in zip(completions, plain, strict=True)]
        prefix = self._kind.counters
        if prefix is None or workload.batch_size > 1:
            return [completion.run() for completion in self._complete(setup, workload, prompts)]
        return [self._counted_run(workload, prompt, setup, prefix) for prompt in prompts]

    def _counted_run(self, workload: Workload, prompt: Prompt, setup: Setup, prefix: str) -> Run:
        """A request that is alone, so that the difference of the server's counters, if it has any, is its own."""
        before = None
        with contextlib.suppress(EngineError):
            before = read_counters(self._server(setup).url, prefix)
        [completion] = self._complete(setup, workload, (prompt,))
        rounds = completion.rounds
        if rounds is None and before is not None:
            with contextlib.suppress(EngineError):
                counted = read_counters(self._server(setup).url, prefix) - before
                rounds = rounds_between(completion, counted, past_end=self._kind.past_end)
        return completion.run(rounds)

    def _mean_log_probs(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> Sequence[float]:
        texts = texts_of(workload, prompts)
        more = [{**self._kind.log_probs_of(1), "seed": seed} for _, seed in texts]
        completions = self._complete(setup, workload, [prompt for prompt, _ in texts], more)
        return [completion.mean_log_prob for completion in completions]

    def _plain_rounds(self, workload: Workload, rows: Sequence[Prompt]) -> tuple[float, ...]:
        """Seconds, a mean for each load. Raises EngineError: in too few of them all rows were in flight together."""
        samples_s: list[float] = []
        for _ in range(2 * NUM_LOADS):
            round_s = _round_s(self._complete(PLAIN, workload, rows))
            samples_s += [] if round_s is None else [round_s]
            if len(samples_s) == NUM_LOADS:
                return tuple(samples_s)
        raise EngineError(f"of {2 * NUM_LOADS} loads of {len(rows)} requests, {len(samples_s)} were decoded together")

    def _synthetic(self, workload: Workload, context_length: int) -> tuple[Workload, tuple[Prompt, ...]]:
        """A load whose rows have `context_length` tokens halfway; long enough for rows that start one after another."""
        size = workload.batch_size
        num_new = ROUNDS_PER_LOAD + size
        length = max(1, min(context_length + num_new // 2, workload.context_length) - num_new)
        pattern = list(self._encode(PATTERN))
        rows = tuple(
            Prompt(domain="steps", token_ids=tuple(itertools.islice(itertools.cycle(pattern), row, row + length)))
            for row in range(size)
        )
        load = replace(workload, max_new_tokens=num_new, context_length=length + num_new, end_token_ids=())
        return load, rows


def _round_s(runs: Sequence[Completion]) -> float | None:
    """Seconds a token of the row that started last, a mean while all rows were in flight; events come in bursts.

    None where they never were.
    """
    until_s = min(run.last_s for run in runs)
    last = max(runs, key=lambda run: run.first_s)
    arrivals = [(at_s, num_tokens or 1) for at_s, num_tokens in last.arrivals if at_s <= until_s]
    if len(arrivals) < 2 or arrivals[-1][0] <= arrivals[0][0]:
        return None
    return (arrivals[-1][0] - arrivals[0][0]) / sum(num_tokens for _, num_tokens in arrivals[1:])


def _model_name(url: str) -> str:
    """The name of the server's first model."""
    try:
        return str(json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{redacted(url)}/v1/models names no model") from error


def _version(url: str) -> str:
    for path, name in _VERSIONS:
        try:
            answer = json.loads(fetch(f"{url}{path}"))
        except (EngineError, ValueError):
            continue
        if isinstance(answer, dict) and answer.get(name):
            return str(answer[name])
    return "unknown"
