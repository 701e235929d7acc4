"""`ServerEngine`: the engine protocol on a server of vLLM, SGLang or llama.cpp that a template starts.

Every setup has a server of its own; drafts are not traced but run. Times are the client's: they contain HTTP and the
server's scheduling, as its users see them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace

from profiles.engines.base import EngineCapabilities
from profiles.engines.llamacpp.flags import keeps_history
from profiles.engines.openai.launch import Launch
from profiles.engines.runs import Run, check_end
from profiles.engines.serving.base import ServedEngine, StepSamples, texts_of
from profiles.engines.serving.completion import Completion
from profiles.engines.serving.http_load import Body, drive, fetch
from profiles.engines.serving.process import Server, ServerPool, start_server
from profiles.engines.serving.redaction import keyed_variables, redacted
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.records.core import PLAIN, Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, StepTimes, TargetTrace

NUM_LOADS, ROUNDS_PER_LOAD = 7, 28  # from which a plain round's seconds are taken
PATTERN, FIRST_TOKEN = 97, 32  # token ids of a text that repeats; below lie special tokens of some models
_VERSIONS = (("/version", "version"), ("/server_info", "version"), ("/props", "build_info"))


class ServerEngine(ServedEngine[Setup, Server]):
    """A target and its drafts behind OpenAI-compatible servers; fits `Engine`. A context manager."""

    _label = "server"

    def __init__(self, target: Model, drafts: tuple[Draft, ...], launch: Launch, device: str) -> None:
        max_alive = 1 if device.startswith("cuda") else 4  # a GPU is taken whole; else a race has so many servers
        super().__init__(target, drafts, ServerPool(self._start, max_alive))
        self._launch, self._device = launch, device
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
        """Plain rounds of a full batch, a mean of each request of seven loads."""
        self._warm_up(PLAIN, workload)
        load, rows = _synthetic(workload, context_length)

        def measure() -> StepSamples:
            runs = [run for _ in range(NUM_LOADS) for run in self._complete(PLAIN, load, rows)]
            return {self.target.run_digest: {1: [run.decode_s / (len(run.token_ids) - 1) for run in runs]}}

        return self._timed(workload, context_length, measure)

    def _start(self, setup: Setup) -> Server:
        launch = self._launch
        variables, command = launch.command(setup)
        return start_server(command, launch.log_path(setup), launch.ready_s, environment=variables)

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
        completions = [kind.read(answer, server.url, body) for answer, body in zip(answers, bodies, strict=True)]
        for completion in completions:
            check_end(f"server with {setup.name}", workload, completion.token_ids)
        return completions

    def _warm_up(self, setup: Setup, workload: Workload) -> None:
        """Drops the first requests of a server at a batch size; their texts are no prompt's."""
        warm = self._server(setup).warm
        if workload.batch_size not in warm:
            self._complete(setup, *_synthetic(workload, workload.context_length))
            warm.add(workload.batch_size)

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        self._check_draft(setup.draft)
        loader.check_prompts(workload, prompts)

    def _prepare(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        if not self._kind.verifies_by_sampling:
            self._check_sampling_once(workload, prompts, setup)

    def _decode(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> Sequence[Run]:
        """The queue through a warm server; one whose drafts have a history is new."""
        if keeps_history(setup):
            self._pool.stop(setup)
        self._warm_up(setup, workload)
        completions = self._complete(setup, workload, prompts)
        if setup.draft is None:
            for completion in completions:
                completion.count(())
        return completions

    def _mean_log_probs(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> Sequence[float]:
        texts = texts_of(workload, prompts)
        more = [{**self._kind.log_probs_of(1), "seed": seed} for _, seed in texts]
        completions = self._complete(setup, workload, [prompt for prompt, _ in texts], more)
        return [completion.mean_log_prob for completion in completions]


def _synthetic(workload: Workload, context_length: int) -> tuple[Workload, tuple[Prompt, ...]]:
    """A load whose rows have `context_length` tokens halfway; long enough for rows that start one after another."""
    size = workload.batch_size
    num_new = ROUNDS_PER_LOAD + size
    length = max(1, min(context_length + num_new // 2, workload.context_length) - num_new)
    texts = ([FIRST_TOKEN + (row + at) % PATTERN for at in range(length)] for row in range(size))
    load = replace(workload, max_new_tokens=num_new, context_length=length + num_new, end_token_ids=())
    return load, tuple(Prompt(domain="steps", token_ids=tuple(text)) for text in texts)


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
