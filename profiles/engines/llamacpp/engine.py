"""`LlamaCppEngine`: the engine protocol on llama.cpp's server, one process for every setup and number of rows.

Drafting cannot be changed while a server runs, so a setup is a server; a few are kept. Rounds are read from the stream
of each request, times are the server's own. Knows nothing of stores or searches.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace

from profiles.engines.base import SERVED_KINDS, EngineCapabilities
from profiles.engines.llamacpp import ngram, responses, timing
from profiles.engines.llamacpp.binary import Program, Weights, weights_of
from profiles.engines.llamacpp.flags import args_for, keeps_history
from profiles.engines.llamacpp.responses import Generated, body_of
from profiles.engines.llamacpp.servers import SPARE_TOKENS, LlamaServer, LlamaServers, Options
from profiles.engines.lossless import check_end, check_queues
from profiles.engines.serving.base import Served
from profiles.engines.serving.server_kind import LLAMA_CPP
from profiles.hardware.fingerprint import fingerprint
from profiles.models import loader
from profiles.models.loader import DescribedModel
from profiles.records.core import PLAIN, Draft, Environment, Prompt, Setup, Workload
from profiles.records.errors import EngineError, InputError
from profiles.records.evidence import Acceptance, AcceptanceTrace, Sample, StepTimes, TargetTrace

NAME = "llamacpp"
WARM_UP_TOKENS = 16


class LlamaCppEngine(Served[tuple[str, ...], LlamaServer]):
    """A target and its drafts as GGUF files under llama.cpp; fits `protocol.Engine`. A context manager.

    Raises InputError: a draft that llama.cpp does not have, a GPU that it cannot use; ModelError: a model that is not
    to be had as GGUF.
    """

    def __init__(self, target: DescribedModel, drafts: tuple[Draft, ...], program: Program, options: Options) -> None:
        self._target, self._program, self._options = target, program, options
        program.check_device(options.device)
        for draft in drafts:
            self._check_kind(draft)
        self._file = weights_of(target.record)
        self._weights = {draft.digest: weights_of(draft.model) if draft.model else None for draft in drafts}
        self._servers = LlamaServers(program, options, self._file, self._weights, target.max_positions)
        super().__init__(target.record, drafts, self._servers.pool)
        self._environment = replace(
            fingerprint(options.device),
            engine=NAME,
            engine_version=program.version,
            threads=options.threads,
            engine_options=json.dumps(self._servers.told, sort_keys=True, separators=(",", ":")),
        )

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            name=NAME,
            times="rounds",
            past_end=LLAMA_CPP.past_end,
            batching="continuous",
            num_drafts="rounds that proposed",
            draft_kinds=SERVED_KINDS,
            traced_kinds=("model", "ngram"),
            length_change="restart",
            keeps_history=LLAMA_CPP.keeps_history,
            drops_short=LLAMA_CPP.drops_short,
            origin=f"{NAME} {self._program.version} {self._file.float_type}",
        )

    @property
    def environment(self) -> Environment:
        return self._environment

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run; a token that is half of a character has probability and gap 0, for it is not told."""
        alone = replace(workload, batch_size=1)
        self._check(alone, (prompt,), PLAIN)
        server = self._servers.of(PLAIN, alone)
        body = body_of(alone, prompt.token_ids, n_probs=2)
        [run] = server.ask([body], 1)
        token_ids = server.tokens_of(body, run)
        probs, gaps = responses.probs_of(run)
        if workload.temperature > 0.0:
            [filtered] = server.ask([body | {"n_probs": 1, "post_sampling_probs": True}], 1)
            probs, _ = responses.probs_of(filtered)
        check_end(NAME, workload, token_ids)
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(token_ids),
            target_probs=tuple(probs),
            logit_gaps=tuple(gaps),
            ended=token_ids[-1] in workload.end_token_ids,
        )

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """A look-up along the trace, or a draft model asked for its next token at every place of it.

        llama.cpp's drafts are greedy at any temperature: a token is kept exactly when it is what the target emits.
        """
        weights = self._weights_of(draft)
        if draft.kind == "ngram":
            return ngram.trace_lookup(draft, prompt, trace, max_length)
        if weights is None or draft.kind != "model":
            raise InputError(f"draft {draft.name}: llama.cpp does not tell what it would draft; it is run instead")
        alone = replace(workload, batch_size=1, temperature=0.0)
        server = self._servers.scoring(weights, alone)
        text = [*prompt.token_ids, *trace.token_ids]
        bodies = [
            body_of(alone, text[:end], n_predict=1, n_probs=1, cache_prompt=True, ignore_eos=False)
            for end in range(len(prompt.token_ids), len(text))
        ]
        runs = server.ask(bodies, 1)
        choices = [server.tokens_of(body, run) for body, run in zip(bodies, runs, strict=True)]
        keeps = (choice == [token] for choice, token in zip(choices, trace.token_ids, strict=True))
        return AcceptanceTrace(
            prompt_digest=prompt.digest,
            draft_digest=draft.digest,
            accept_probs=tuple(map(float, keeps)),
            confidences=tuple(responses.probs_of(run)[0][0] for run in runs),
        )

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Whole rounds of the target alone and of every traced draft, one server after another, shortest drafts first.

        Drafts are accepted by made-up rates where the build can, so that every round drafts in full; all look-ups cost
        the same and are timed once.
        """
        self._check_positions(context_length, max_length)
        plan = timing.plan_of(self.target, self._drafts, max_length, self._program.has_synthetic)
        shape = timing.Shape(
            batch_size=workload.batch_size,
            context_length=context_length,
            most_tokens=min(workload.context_length + SPARE_TOKENS, self._target.max_positions),
        )
        times, disturbed = self._quietest(
            lambda: timing.time_plan(plan, shape, lambda asked: self._rounds(asked, shape, workload))
        )
        return {part: replace(rounds, disturbed=disturbed) for part, rounds in times.items()}

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """Timed runs, one setup after another; a server whose drafts remember earlier requests is started anew."""
        for setup in setups:
            self._check(workload, prompts, setup)
        found = [self._quietest(functools.partial(self._run, workload, prompts, setup)) for setup in setups]
        queues = [(setup, outputs) for setup, ((_, outputs), _) in zip(setups, found, strict=True)]
        check_queues(self.target, workload, prompts, queues, self.trace_target)
        return tuple(
            replace(responses.sample_of(setup, prompt, number, runs, outputs[number]), disturbed=disturbed)
            for setup, ((runs, outputs), disturbed) in zip(setups, found, strict=True)
            for number, prompt in enumerate(prompts)
        )

    @property
    def _watched(self) -> tuple[str, ...] | None:
        return (self._options.device,) if self._program.running is None else None

    def _run(
        self, workload: Workload, prompts: Sequence[Prompt], setup: Setup
    ) -> tuple[list[Generated], list[list[int]]]:
        """One queue under one setup: its runs and their tokens."""
        server = self._servers.anew(setup, workload) if keeps_history(setup) else self._servers.of(setup, workload)
        self._warm_up(server, workload)
        bodies = [body_of(workload, prompt.token_ids) for prompt in prompts]
        runs = server.ask(bodies, workload.batch_size)
        outputs = [server.tokens_of(*pair) for pair in zip(bodies, runs, strict=True)]
        for token_ids in outputs:
            check_end(NAME, workload, token_ids)
        self._check_drafted(setup, runs, server)
        return runs, outputs

    def _rounds(self, asked: timing.Timed, shape: timing.Shape, workload: Workload) -> list[float]:
        """Seconds of full rounds of one kind, of a batch that was there before."""
        server = self._servers.of(asked.setup, workload, asked.words)
        bodies = [timing.body_of(asked, shape)] * shape.batch_size
        if not server.is_warm:
            server.ask(bodies, shape.batch_size)
            server.is_warm = True
        return timing.full_rounds(server.ask(bodies, shape.batch_size), asked.width)

    def _warm_up(self, server: LlamaServer, workload: Workload) -> None:
        """The first requests of a server pay for its buffers: as many as it has rows are thrown away."""
        if not server.is_warm:
            short = replace(workload, max_new_tokens=min(WARM_UP_TOKENS, workload.max_new_tokens), end_token_ids=())
            room = workload.context_length - short.max_new_tokens
            body = body_of(short, timing.pattern(2, min(room, WARM_UP_TOKENS)))
            server.ask([body] * workload.batch_size, workload.batch_size)
            server.is_warm = True

    def _weights_of(self, draft: Draft) -> Weights | None:
        if draft.digest not in self._weights:
            known = ", ".join(known.name for known in self._drafts) or "none"
            raise InputError(f"draft {draft.name} is not loaded; loaded are {known}")
        return self._weights[draft.digest]

    def _check_kind(self, draft: Draft) -> None:
        """Raises InputError: a draft that llama.cpp does not have."""
        if draft.kind == "ngram":
            ngram.check(draft)
        args_for(Setup(draft=draft, length=1), self._program.spelling, "")

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        draft = setup.draft
        if draft is not None:
            self._weights_of(draft)
            if draft.kind == "ngram" and setup.length < ngram.check(draft):
                raise InputError(
                    f"{setup.name}: llama.cpp drops look-ups shorter than the match, {draft.min_match} tokens here"
                )
        if setup.stop_below is not None:
            raise InputError(f"{setup.name}: llama.cpp has no such stop")
        loader.check_prompts(workload, prompts)
        self._check_positions(workload.context_length, setup.length)

    def _check_positions(self, context_length: int, length: int) -> None:
        most = self._target.max_positions
        if context_length + length > most:
            raise InputError(
                f"context {context_length} with speculation length {length}: model {self.target.name!r} has {most} "
                f"positions; allowed are contexts up to {most - length} with that length"
            )

    def _check_drafted(self, setup: Setup, runs: Sequence[Generated], server: LlamaServer) -> None:
        """Raises EngineError: a draft model that never drafted; llama.cpp goes on without one it cannot use."""
        could = setup.draft is not None and setup.draft.kind == "model" and any(run.num_tokens > 2 for run in runs)
        if could and not any(step.proposed for run in runs for step in run.steps):
            raise EngineError(
                f"{setup.name}: llama.cpp drafted nothing: {server.last_error_line or 'it does not say why'}"
            )
