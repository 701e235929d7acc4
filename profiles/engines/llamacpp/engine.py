"""`LlamaCppEngine`: the engine protocol on llama.cpp's server, one process for every setup and batch size.

Drafting cannot be changed while a server runs, so a setup is a server; a few are kept alive. Rounds are read from the
stream of each request, times are the server's own.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace

from profiles.engines.base import EngineCapabilities
from profiles.engines.llamacpp import flags, ngram, timing
from profiles.engines.llamacpp.responses import SERVER, LlamaCompletion, body_of
from profiles.engines.llamacpp.servers import Options, Program, Weights, complete, weights_of
from profiles.engines.runs import Run, check_end
from profiles.engines.serving.base import ServedEngine
from profiles.engines.serving.process import Server, ServerPool, start_server
from profiles.hardware import software
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.models.loader import DescribedModel
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, AcceptanceTrace, StepTimes, TargetTrace

NAME = "llamacpp"
WARM_UP_TOKENS = 16
START_TIMEOUT_S = 600.0
MAX_ALIVE = 4  # servers kept on a CPU; a GPU holds one
SPARE_TOKENS = 80  # a row's cache beside its context: llama.cpp drafts less near the end of it
# float32 models are compared with the torch engine token by token, so caches are float32 too
EXACT, EXACT_DRAFT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32"), ("-ctkd", "f32", "-ctvd", "f32")
ON_GPU, ON_CPU = ("-ngl", "99"), ("-dev", "none")
DRAFT_ON_GPU, DRAFT_ON_CPU = ("-ngld", "99"), ("-devd", "none")


class LlamaCppEngine(ServedEngine[tuple[str, ...], Server]):
    """A target and its drafts as GGUF files under llama.cpp; fits `Engine`. A context manager.

    Raises InputError: a draft that llama.cpp does not have, a GPU that it cannot use; ModelError: a model without GGUF.
    """

    _label = NAME

    def __init__(self, target: DescribedModel, drafts: tuple[Draft, ...], program: Program, options: Options) -> None:
        self._described, self._program, self._options = target, program, options
        if options.on_gpu and not software.server_devices(program.command):
            lack = f"{program.version} finds no GPU; take cpu, or a llama-server with CUDA"
            raise InputError(f"device {options.device!r}: {lack}")
        for draft in drafts:
            check_draft(draft)
        self._file = weights_of(target.record)
        self._weights = {draft.digest: weights_of(draft.model) if draft.model else None for draft in drafts}
        self._watched_gpus = (options.device,)
        self._device_args = ON_GPU if options.on_gpu else ON_CPU
        self._exact_args = EXACT if self._file.float_type == "float32" else ()
        super().__init__(target.record, drafts, ServerPool(self._start, 1 if options.on_gpu else MAX_ALIVE))
        more = [*self._device_args, *self._exact_args]
        shown = {"more": more, "weights": self._file.float_type}
        self.environment = replace(
            fingerprint(options.device),
            engine=NAME,
            engine_version=program.version,
            threads=options.threads,
            engine_options=json.dumps(shown, sort_keys=True, separators=(",", ":")),
        )

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            name=NAME,
            past_end=SERVER.past_end,
            traced_kinds=("model", "ngram"),
            drops_short=SERVER.drops_short,
            origin=f"{NAME} {self._program.version} {self._file.float_type}",
        )

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run; a token that is part of a character is not reported, so its probability and gap are 0."""
        alone = replace(workload, batch_size=1)
        self._check(alone, (prompt,), PLAIN)
        server = self._server(PLAIN, alone)
        body = body_of(alone, prompt.token_ids, n_probs=2)
        [run] = complete(server, [body], 1)
        check_end(NAME, workload, run.token_ids)
        if workload.temperature > 0.0:  # probabilities after the filters
            [filtered] = complete(server, [body | {"n_probs": 1, "post_sampling_probs": True}], 1)
            run = replace(run, log_probs=filtered.log_probs)
        return run.trace(prompt, workload.end_token_ids)

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """A look-up along the trace, or the next token of a draft model at every position of it.

        llama.cpp's drafts are greedy at any temperature: a token is accepted exactly when it is what the target emits.
        """
        self._check_draft(draft)
        if draft.kind == "ngram":
            return ngram.trace_lookup(draft, prompt, trace, max_length)
        weights = self._weights[draft.digest]
        if weights is None or draft.kind != "model":
            raise InputError(f"draft {draft.name}: llama.cpp does not report what it would draft; it is run instead")
        alone = replace(workload, batch_size=1, temperature=0.0)
        text = [*prompt.token_ids, *trace.token_ids]
        bodies = [
            body_of(alone, text[:end], n_predict=1, n_probs=1, cache_prompt=True, ignore_eos=False)
            for end in range(len(prompt.token_ids), len(text))
        ]
        runs = complete(self._pool.get(self._command(weights, alone)), bodies, 1)
        accepted = (tuple(run.token_ids) == (token,) for run, token in zip(runs, trace.token_ids, strict=True))
        return AcceptanceTrace(
            prompt_digest=prompt.digest,
            draft_digest=draft.digest,
            accept_probs=tuple(map(float, accepted)),
            confidences=tuple(run.probs[0] for run in runs),
        )

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Whole rounds of the target alone and of every traced draft, one server after another, shortest drafts first.

        Drafts are accepted by synthetic rates where the build has them, so that every round drafts in full.
        """
        loader.check_context(self._described, context_length=context_length, max_length=max_length)
        has_rates = self._program.has_synthetic_rates
        plan = timing.plan_of(self.target, self.drafts, max_length, has_synthetic_rates=has_rates)
        shape = timing.Shape(
            batch_size=workload.batch_size,
            context_length=context_length,
            max_tokens=min(workload.context_length + SPARE_TOKENS, self._described.max_positions),
        )
        measure = functools.partial(timing.time_plan, plan, shape, lambda visit: self._rounds(visit, shape, workload))
        return self._timed(workload, context_length, measure)

    def _server(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> Server:
        """The server of a setup and batch size; other `more` arguments are another. Raises EngineError: no start."""
        return self._pool.get(self._command_for(setup, workload, more))

    def _command_for(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The command of a setup's server, its key in the pool."""
        if setup.draft is None:
            return self._command(self._file, workload, more)
        weights = self._weights.get(setup.draft.digest)
        args = flags.args_for(setup, None if weights is None else weights.path)
        if weights is not None:
            args += ["-td", str(self._options.threads), "-tbd", str(self._options.threads)]
            args += DRAFT_ON_GPU if self._options.on_gpu else DRAFT_ON_CPU
            args += EXACT_DRAFT if self._exact_args else ()
        return self._command(self._file, workload, [*args, *more])

    def _command(self, weights: Weights, workload: Workload, args: Sequence[str] = ()) -> tuple[str, ...]:
        row = min(workload.context_length + SPARE_TOKENS, self._described.max_positions)
        batch_size, threads = str(workload.batch_size), str(self._options.threads)
        command = [*self._program.command, "-m", weights.path, "--host", "{host}", "--port", "{port}"]
        command += ["-c", str(row * workload.batch_size), "-np", batch_size, "-t", threads, "-tb", threads]
        return (*command, *self._device_args, *self._exact_args, "--metrics", *args)

    def _start(self, command: tuple[str, ...]) -> Server:
        log_path = self._options.log_folder / f"llama-server-{self._pool.num_starts}.log"
        return start_server(command, log_path, START_TIMEOUT_S)

    def _decode(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> Sequence[Run]:
        """The queue through a warm server, a new one where drafts have a history."""
        if flags.keeps_history(setup):
            self._pool.stop(self._command_for(setup, workload))
        server = self._server(setup, workload)
        self._warm_up(server, workload)
        bodies = [body_of(workload, prompt.token_ids) for prompt in prompts]
        completions = complete(server, bodies, workload.batch_size)
        for completion in completions:
            check_end(NAME, workload, completion.token_ids)
        self._check_drafted(setup, completions, server)
        return [replace(completion, decode_s=completion.server_s) for completion in completions]

    def _rounds(self, visit: timing.Visit, shape: timing.Shape, workload: Workload) -> list[float]:
        """Seconds of full rounds of a visit, by a server that has run its batch before."""
        server = self._server(visit.setup, workload, visit.args)
        bodies = [timing.body_of(visit, shape)] * shape.batch_size
        if not server.warm:
            complete(server, bodies, shape.batch_size)
            server.warm.add(shape.batch_size)
        return timing.full_rounds(complete(server, bodies, shape.batch_size), visit.width)

    def _warm_up(self, server: Server, workload: Workload) -> None:
        """The first requests of a server pay for its buffers: one for each row is dropped."""
        if not server.warm:
            short = replace(workload, max_new_tokens=min(WARM_UP_TOKENS, workload.max_new_tokens), end_token_ids=())
            num_prompt = min(workload.context_length - short.max_new_tokens, WARM_UP_TOKENS)
            body = body_of(short, timing.pattern(2, num_prompt))
            complete(server, [body] * workload.batch_size, workload.batch_size)
            server.warm.add(workload.batch_size)

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        self._check_draft(setup.draft)
        if setup.draft is not None and (reason := flags.objection(self.target, setup, self._program.release)):
            raise InputError(f"{setup.name}: {reason}")
        loader.check_prompts(workload, prompts)
        loader.check_context(self._described, context_length=workload.context_length, max_length=setup.length)

    def _check_drafted(self, setup: Setup, completions: Sequence[LlamaCompletion], server: Server) -> None:
        """Raises EngineError: a draft model that never drafted; llama.cpp goes on without one that it cannot use."""
        if setup.draft is None or setup.draft.kind != "model":
            return
        could_draft = any(len(completion.token_ids) > 2 for completion in completions)
        if could_draft and not any(step.proposed for completion in completions for step in completion.steps):
            reason = server.last_error_line() or "its log is empty"
            raise EngineError(f"{setup.name}: llama.cpp drafted nothing: {reason}")


def check_draft(draft: Draft) -> None:
    """Raises InputError: a draft that llama.cpp does not have."""
    if draft.kind == "ngram":
        ngram.match_size(draft)
    flags.args_for(Setup(draft=draft, length=1), "")
