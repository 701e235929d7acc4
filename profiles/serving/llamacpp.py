"""`LlamaCppEngine`: the engine protocol on llama.cpp's server, one process for every setup and number of rows.

Drafting cannot be changed while a server runs, so a setup is a server; a few are kept. Rounds are read from the stream
of each request, times are the server's own. Knows nothing of stores or searches.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from profiles.environment import fingerprint
from profiles.errors import EngineError, InputError
from profiles.models import Described
from profiles.properties import Properties
from profiles.serving import llama_answers, llama_rounds, ngram_simple
from profiles.serving.fleet import Fleet
from profiles.serving.llama_answers import Generated, body_of
from profiles.serving.llama_flags import KEEPS_HISTORY, words_of
from profiles.serving.llama_program import Program, Weights, weights_of
from profiles.serving.load import drive
from profiles.serving.process import RunningServer, Server
from profiles.terms import (
    PLAIN,
    Acceptance,
    AcceptanceTrace,
    Draft,
    Environment,
    Model,
    Prompt,
    Sample,
    Setup,
    StepTimes,
    TargetTrace,
    Workload,
)

NAME = "llamacpp"
START_TIMEOUT_S = 600.0
SPARE_TOKENS = 80  # a row's cache beside its context: llama.cpp drafts less where it nears the end
WARM_UP_TOKENS = 16
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
EXACT_DRAFT = ("-ctkd", "f32", "-ctvd", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How every server is started. `more`: arguments added as they are (`-ngl 99`); `most_alive` servers are kept."""

    threads: int
    log_folder: Path
    more: tuple[str, ...] = ()
    most_alive: int = 4
    device: str = "cpu"


class LlamaServer:
    """A server and what was already run on it, as a fleet keeps it."""

    def __init__(self, server: Server | RunningServer) -> None:
        self.server = server
        self.is_warm = False

    @property
    def alive(self) -> bool:
        return self.server.alive

    @property
    def url(self) -> str:
        return self.server.url

    def stop(self) -> None:
        """Ends it; safe to call again."""
        self.server.stop()

    def ask(self, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[Generated]:
        """The answers, in order. Raises EngineError, with the server's last words where it died."""
        with self.server.watched():
            answers = drive(self.url, llama_answers.PATH, bodies, concurrency)
            return [llama_answers.read(answer, self.url) for answer in answers]

    def tokens_of(self, body: dict[str, Any], run: Generated) -> list[int]:
        """Tokens of a run, asked again where parts of characters were not streamed."""
        found = run.token_ids
        if found is None:
            with self.server.watched():
                found = llama_answers.tokens_again(self.url, body)
        return found


class LlamaCppEngine:
    """A target and its drafts as GGUF files under llama.cpp; fits `protocol.Engine`. A context manager.

    Raises InputError: a draft that llama.cpp does not have; ModelError: a model that is not to be had as GGUF.
    """

    def __init__(self, target: Described, drafts: tuple[Draft, ...], program: Program, options: Options) -> None:
        self._target, self._drafts, self._program, self._options = target, drafts, program, options
        for draft in drafts:
            self._check_kind(draft)
        self._file = weights_of(target.record)
        self._weights = {draft.digest: weights_of(draft.model) if draft.model else None for draft in drafts}
        self._fleet: Fleet[tuple[str, ...], LlamaServer] = Fleet(self._start, options.most_alive)
        told = {"more": [*self._exact, *options.more], "weights": self._file.float_type}
        self._environment = replace(
            fingerprint(options.device),
            engine=NAME,
            engine_version=program.version,
            threads=options.threads,
            engine_options=json.dumps(told, sort_keys=True, separators=(",", ":")),
        )

    @property
    def properties(self) -> Properties:
        return Properties(
            name=NAME,
            times="rounds",
            past_end=False,
            pads=False,
            num_drafts="rounds that proposed",
            draft_kinds=("model", "ngram", "native"),
            traced_kinds=("model", "ngram"),
            length_change="restart",
            keeps_history=KEEPS_HISTORY,
            origin=f"{NAME} {self._program.version} {self._file.float_type}",
        )

    @property
    def environment(self) -> Environment:
        return self._environment

    @property
    def target(self) -> Model:
        return self._target.record

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return self._drafts

    @property
    def num_starts(self) -> int:
        """Servers started so far."""
        return self._fleet.num_starts

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run; a token that is half of a character has probability and gap 0, for it is not told."""
        alone = replace(workload, batch_size=1)
        self._check(alone, (prompt,), PLAIN)
        server = self._server(PLAIN, alone)
        body = body_of(alone, prompt.token_ids, n_probs=2)
        [run] = server.ask([body], 1)
        token_ids = server.tokens_of(body, run)
        probs, gaps = llama_answers.probs_of(run)
        if workload.temperature > 0.0:
            [filtered] = server.ask([body | {"n_probs": 1, "post_sampling_probs": True}], 1)
            probs, _ = llama_answers.probs_of(filtered)
        self._check_end(workload, run, token_ids)
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
            return ngram_simple.trace_lookup(draft, prompt, trace, max_length)
        if weights is None or draft.kind != "model":
            raise InputError(f"draft {draft.name}: llama.cpp does not tell what it would draft; it is run instead")
        if self._program.running is not None:
            raise InputError(f"draft {draft.name}: a server that is running already does not tell what it would draft")
        alone = replace(workload, batch_size=1, temperature=0.0)
        server = self._fleet.ask(self._command(weights.path, alone, ()))
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
            keep_probs=tuple(map(float, keeps)),
            confidences=tuple(llama_answers.probs_of(run)[0][0] for run in runs),
        )

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Whole rounds of the target alone and of every traced draft, one server after another, shortest drafts first.

        Drafts are accepted by made-up rates where the build can, so that every round drafts in full; all look-ups cost
        the same and are timed once.
        """
        self._check_positions(context_length, max_length)
        plan = llama_rounds.plan_of(self.target, self._drafts, max_length, self._program.has_synthetic)
        shape = llama_rounds.Shape(
            batch_size=workload.batch_size,
            context_length=context_length,
            most_tokens=min(workload.context_length + SPARE_TOKENS, self._target.max_positions),
        )
        return llama_rounds.time_plan(plan, shape, lambda asked: self._rounds(asked, shape, workload))

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        occasion: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """Timed runs, one setup after another; a server whose drafts remember earlier requests is started anew."""
        for setup in setups:
            self._check(workload, prompts, setup)
        return tuple(sample for setup in setups for sample in self._run(workload, prompts, setup))

    def close(self) -> None:
        """Stops all servers; safe to call again."""
        self._fleet.close()

    def __enter__(self) -> "LlamaCppEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[Sample]:
        method = setup.draft.method if setup.draft is not None else None
        if method is not None and method.split(",")[0] in KEEPS_HISTORY:
            self._fleet.stop(self._key(setup, workload))
        server = self._server(setup, workload)
        self._warm_up(server, workload)
        bodies = [body_of(workload, prompt.token_ids) for prompt in prompts]
        runs = server.ask(bodies, workload.batch_size)
        outputs = [server.tokens_of(*pair) for pair in zip(bodies, runs, strict=True)]
        for run, token_ids in zip(runs, outputs, strict=True):
            self._check_end(workload, run, token_ids)
        self._check_drafted(setup, runs)
        return [
            llama_answers.sample_of(setup, prompt, number, runs, outputs[number])
            for number, prompt in enumerate(prompts)
        ]

    def _rounds(self, asked: llama_rounds.Timed, shape: llama_rounds.Shape, workload: Workload) -> list[float]:
        """Seconds of full rounds of one kind, of a batch that was there before."""
        server = self._server(asked.setup, workload, asked.words)
        bodies = [llama_rounds.body_of(asked, shape)] * shape.batch_size
        if not server.is_warm:
            server.ask(bodies, shape.batch_size)
            server.is_warm = True
        return llama_rounds.full_rounds(server.ask(bodies, shape.batch_size), asked.width)

    def _warm_up(self, server: LlamaServer, workload: Workload) -> None:
        """The first requests of a server pay for its buffers: as many as it has rows are thrown away."""
        if not server.is_warm:
            short = replace(workload, max_new_tokens=min(WARM_UP_TOKENS, workload.max_new_tokens), end_token_ids=())
            room = workload.context_length - short.max_new_tokens
            body = body_of(short, llama_rounds.pattern(2, min(room, WARM_UP_TOKENS)))
            server.ask([body] * workload.batch_size, workload.batch_size)
            server.is_warm = True

    def _server(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> LlamaServer:
        return self._fleet.ask(self._key(setup, workload, more))

    def _key(self, setup: Setup, workload: Workload, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The command of a setup's server, which is also its key in the fleet; the URL of one that was running."""
        running = self._program.running
        if running is not None:
            if setup != running.serves or more:
                raise InputError(f"{setup.name}: the server at {running.url} serves {running.serves.name} alone")
            if workload.batch_size > running.num_rows:
                raise InputError(
                    f"batch size {workload.batch_size}: the server at {running.url} has {running.num_rows} slots"
                )
            return (running.url,)
        if setup.draft is None:
            return self._command(self._file.path, workload, more)
        weights = self._weights.get(setup.draft.digest)
        words = words_of(setup, self._program.spelling, None if weights is None else str(weights.path))
        if weights is not None:
            words += ["-td", str(self._options.threads), "-tbd", str(self._options.threads)]
            words += EXACT_DRAFT if self._exact else ()
        return self._command(self._file.path, workload, [*words, *more])

    def _command(self, path: Path, workload: Workload, words: Sequence[str]) -> tuple[str, ...]:
        row = min(workload.context_length + SPARE_TOKENS, self._target.max_positions)
        options = {
            "-m": str(path),
            "--host": "{host}",
            "--port": "{port}",
            "-c": str(row * workload.batch_size),
            "-np": str(workload.batch_size),
            "-t": str(self._options.threads),
            "-tb": str(self._options.threads),
        }
        own = [word for pair in options.items() for word in pair]
        return (*self._program.command, *own, *self._exact, "--metrics", *words, *self._options.more)

    @property
    def _exact(self) -> tuple[str, ...]:
        """In float32, where tokens are held against the torch engine's, caches are float32 too."""
        return EXACT if self._file.float_type == "float32" else ()

    def _start(self, command: tuple[str, ...]) -> LlamaServer:
        server: Server | RunningServer
        if self._program.running is not None:
            server = RunningServer(self._program.running.url)
        else:
            server = Server(command, self._options.log_folder / f"llama-server-{self._fleet.num_starts}.log")
        server.wait_ready(START_TIMEOUT_S)
        return LlamaServer(server)

    def _weights_of(self, draft: Draft) -> Weights | None:
        if draft.digest not in self._weights:
            known = ", ".join(known.name for known in self._drafts) or "none"
            raise InputError(f"draft {draft.name} is not loaded; loaded are {known}")
        return self._weights[draft.digest]

    def _check_kind(self, draft: Draft) -> None:
        """Raises InputError: a draft that llama.cpp does not have."""
        if draft.kind == "ngram":
            ngram_simple.check(draft)
        words_of(Setup(draft=draft, length=1), self._program.spelling, "")

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        draft = setup.draft
        if draft is not None:
            self._weights_of(draft)
            if draft.kind == "ngram" and setup.length < ngram_simple.check(draft):
                raise InputError(
                    f"{setup.name}: llama.cpp drops look-ups shorter than the match, {draft.min_match} tokens here"
                )
        if setup.stop_below is not None:
            raise InputError(f"{setup.name}: llama.cpp has no such stop")
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if longest + workload.max_new_tokens > workload.context_length:
            raise InputError(
                f"a prompt of {longest} tokens with {workload.max_new_tokens} new ones: allowed are "
                f"{workload.context_length} together, the workload's context"
            )
        self._check_positions(workload.context_length, setup.length)

    def _check_positions(self, context_length: int, length: int) -> None:
        most = self._target.max_positions
        if context_length + length > most:
            raise InputError(
                f"context {context_length} with speculation length {length}: model {self.target.name!r} has {most} "
                f"positions; allowed are contexts up to {most - length} with that length"
            )

    def _check_end(self, workload: Workload, run: Generated, token_ids: Sequence[int]) -> None:
        """Raises EngineError: llama.cpp takes other tokens for an end than the workload does."""
        ends = set(workload.end_token_ids)
        if ends.intersection(token_ids[:-1]):
            raise EngineError(f"llama.cpp went on after an end token of {sorted(ends)}: the GGUF file has other ones")
        if run.stopped_at_end and token_ids[-1] not in ends:
            raise EngineError(f"llama.cpp ended at token {token_ids[-1]}: the workload's end tokens are {sorted(ends)}")

    def _check_drafted(self, setup: Setup, runs: Sequence[Generated]) -> None:
        """Raises EngineError: a draft model that never drafted; llama.cpp goes on without one it cannot use."""
        could = setup.draft is not None and setup.draft.kind == "model" and any(run.num_tokens > 2 for run in runs)
        if could and not any(step.proposed for run in runs for step in run.steps):
            raise EngineError(f"{setup.name}: llama.cpp drafted nothing, as it does with a draft that it cannot use")
