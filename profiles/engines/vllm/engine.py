"""`VllmEngine`: the engine protocol over vLLM, a worker process for each of its engines.

A plain engine, one for every draft model, one for all n-gram drafts, and one for each model that is scored; the
speculation length and the n-gram window change within an engine. Whole rounds are timed, in vLLM's own scheduler.
"""

import json
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from profiles.acceptance import ngram
from profiles.engines.base import SERVED_KINDS, EngineCapabilities
from profiles.engines.lossless import check_queues
from profiles.engines.serving.base import Served
from profiles.engines.serving.pool import ServerPool
from profiles.engines.serving.sampling_check import check_means, texts_of
from profiles.engines.serving.server_kind import VLLM
from profiles.engines.vllm.client import Child, python_of
from profiles.engines.vllm.config import (
    CONTEXT_STEP,
    Kind,
    VllmOptions,
    kind_of,
    num_positions,
    sampling_of,
    start_arguments,
)
from profiles.engines.vllm.device import VllmDevice
from profiles.engines.vllm.timing import Visit, in_turn, question, sample_of, visits
from profiles.models import loader, sources
from profiles.records.core import PLAIN, Draft, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import BadNumbersError, InputError
from profiles.records.evidence import Acceptance, AcceptanceTrace, Sample, StepTimes, TargetTrace

NAME = "vllm"
LAST_WRONG_ON_CPU = Version("0.33.0")  # the last CPU build whose kernel was read, and is as the one seen to be wrong
WIDEST_GAP = 100.0  # stands for a second choice that top-k or top-p left out


class VllmEngine(Served[Kind, Child]):
    """A target and its drafts in vLLM; fits `protocol.Engine`. A context manager: `close` ends its processes.

    Raises InputError: the Python has no vLLM.
    """

    def __init__(self, target: Model, drafts: Sequence[Draft], options: VllmOptions | None = None) -> None:
        self._options = options or VllmOptions()
        super().__init__(target, drafts, ServerPool(self._start, self._options.max_alive))
        self._python = python_of(self._options.python, os.environ)
        self._logs = self._options.log_folder or Path(tempfile.mkdtemp(prefix="draftpick-vllm-"))
        self._num_tokens = 0  # of a sequence, which the engines alive have room for
        self._in_place = True
        self._environment: Environment | None = None
        self._trusted: set[tuple[str, str]] = set()  # (draft, law of sampling)
        with self._child() as child:
            version, self._torch = child.facts.get("vllm"), str(child.facts.get("torch"))
            if version is None:
                raise InputError(
                    f"python {self._python!r} has no vLLM; name one that has it, in $DRAFTPICK_VLLM_PYTHON for instance"
                )
            self._version = str(version)
            self._device = VllmDevice.told(child.ask("about", self._options.timeout_s))

    @property
    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            name=NAME,
            times="rounds",
            past_end=VLLM.past_end,
            batching="continuous",
            num_drafts="rounds that proposed",
            draft_kinds=SERVED_KINDS,
            traced_kinds=("model", "ngram"),
            length_change="in place" if self._in_place else "restart",
            sampled_objection=self._sampled_objection(),
            origin=f"{NAME} {self._version} {self.target.dtype}",
        )

    @property
    def environment(self) -> Environment:
        """As the plain engine, which is started for it, says."""
        if self._environment is None:
            child = self._engine(Kind(served=self.target.name), self._options.context_length)
            options = {
                "eager": self._device.on_cpu,
                "max_num_seqs": self._options.max_batch_size,
                "prefix_caching": False,
            }
            self._environment = replace(
                self._device.fingerprint(),
                threads=int(child.facts["threads"]),
                torch=self._torch,
                engine=NAME,
                engine_version=self._version,
                engine_options=json.dumps(options, sort_keys=True, separators=(",", ":")),
            )
        return self._environment

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with log-probabilities; sampled ones come from an engine that tells them as drawn from."""
        self._check(workload, (prompt,), PLAIN)
        is_sampled = workload.temperature > 0.0
        child = self._engine(Kind(served=self.target.name, is_processed=is_sampled), workload.context_length)
        [run] = self._run(child, [prompt.token_ids], 1, sampling_of(workload) | {"logprobs": 2})
        probs = [math.exp(own) for own, _, _ in run["logprobs"]]
        scale = workload.temperature if is_sampled else 1.0
        gaps = [min(WIDEST_GAP, max(0.0, scale * (first - second))) for _, first, second in run["logprobs"]]
        if not all(map(math.isfinite, (*probs, *gaps))):
            raise BadNumbersError(f"target {self.target.name}: its log-probabilities are not finite; check its dtype")
        return TargetTrace(
            prompt_digest=prompt.digest,
            token_ids=tuple(run["token_ids"]),
            target_probs=tuple(probs),
            logit_gaps=tuple(gaps),
            ended=run["ended"],
        )

    def trace_draft(
        self, workload: Workload, prompt: Prompt, trace: TargetTrace, draft: Draft, max_length: int
    ) -> Acceptance:
        """One prefill of the draft over the trace, or a look-up at every position: vLLM drafts greedily either way."""
        self._known(draft)
        if draft.kind == "ngram":
            return ngram.trace_lookup(draft, prompt, trace, max_length)
        if draft.kind != "model" or draft.model is None:
            raise InputError(f"draft {draft.name}: vLLM tells the acceptance of draft models and n-gram look-up alone")
        child = self._engine(Kind(served=draft.model.name), workload.context_length)
        scores = self._scores(child, prompt, trace.token_ids)
        confidences = [math.exp(best) for _, _, best in scores]
        if not all(map(math.isfinite, confidences)):
            raise BadNumbersError(f"draft {draft.name}: its log-probabilities are not finite; check its dtype")
        return AcceptanceTrace(
            prompt_digest=prompt.digest,
            draft_digest=draft.digest,
            accept_probs=tuple(float(rank == 1) for _, rank, _ in scores),
            confidences=tuple(confidences),
        )

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        purpose: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """Timed runs of the queue, setup after setup, each on an engine that has run it before."""
        for setup in setups:
            self._check(workload, prompts, setup)
        for setup in setups:
            self._warm_up(workload, prompts, setup)
            self._trust(workload, prompts, setup)
        runs, disturbed = self._quietest(lambda: [self._decode(workload, prompts, setup) for setup in setups])
        outputs = [(setup, [run["token_ids"] for run in own]) for setup, own in zip(setups, runs, strict=True)]
        check_queues(self.target, workload, prompts, outputs, self.trace_target)
        return tuple(
            sample_of(setup, prompt, run, disturbed)
            for setup, own in zip(setups, runs, strict=True)
            for prompt, run in zip(prompts, own, strict=True)
        )

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Whole rounds: of plain decoding, and of every traced draft at every length."""
        asked = visits(self.target, self.capabilities.timed(self.drafts), max_length)
        at_context = replace(workload, context_length=context_length)

        def visit_all() -> dict[str, dict[int, list[float]]]:
            times: dict[str, dict[int, list[float]]] = {}
            for visit in in_turn(self.target, asked):
                seconds = self._rounds(at_context, visit)
                times.setdefault(visit.part, {}).setdefault(1 + visit.drafted, []).extend(seconds)
            return times

        for visit in asked:
            if visit.setup.length <= 1:
                self._rounds(at_context, visit)  # engines are started, and warm, before anything counts
        times, disturbed = self._quietest(visit_all)
        return {
            part: StepTimes(
                component_digest=part,
                batch_size=workload.batch_size,
                context_length=context_length,
                samples_s={width: tuple(seconds) for width, seconds in own.items() if seconds},
                disturbed=disturbed,
            )
            for part, own in times.items()
        }

    def check_sampling(self, workload: Workload, prompts: tuple[Prompt, ...], setup: Setup) -> None:
        """Compares what a draft makes of sampling with plain sampling, over some texts of these prompts.

        Raises EngineError when the target's mean log-probabilities of the two disagree beyond chance.
        """
        drafted, plain = (self._log_probs(workload, prompts, one) for one in (setup, PLAIN))
        check_means(f"{NAME} {self._version} with {setup.name}", drafted, plain)

    def counters(self, setup: Setup, workload: Workload) -> dict[str, list[int]]:
        """vLLM's own counts of a setup's engine since its start, as its /metrics tells them; positions each."""
        return dict(self._drafting(workload, setup).ask("counters", self._options.timeout_s)["counters"])

    @property
    def _watched(self) -> tuple[str, ...]:
        return self._device.watched

    def _sampled_objection(self) -> str | None:
        try:
            version = Version(Version(self._version).public)
        except InvalidVersion:
            return None  # a build of one's own: what it samples is compared before it is measured, as any other's
        if not self._device.on_cpu or version > LAST_WRONG_ON_CPU:
            return None
        return f"{NAME} {self._version} draws from another distribution when it drafts on the CPU; 0 is allowed"

    def _child(self) -> Child:
        path = self._logs / f"vllm-{self._fleet.num_starts}.log"
        return Child(self._python, path, **({} if self._options.worker is None else {"worker": self._options.worker}))

    def _engine(self, kind: Kind, context_length: int) -> Child:
        """The engine for this, with room for such contexts and a round past their end."""
        needed = max(context_length, self._options.context_length) + 2 * (self._options.max_length + 1)
        if needed > self._num_tokens:
            self.close()
            self._num_tokens = -(-needed // CONTEXT_STEP) * CONTEXT_STEP
        return self._fleet.ask(kind)

    def _start(self, kind: Kind) -> Child:
        arguments = start_arguments(
            kind, self.target.dtype, self._num_tokens, self._options, on_cpu=self._device.on_cpu
        )
        child = self._child()
        child.facts |= child.ask("start", self._options.timeout_s, **arguments)
        child.facts["num_tokens"] = arguments["options"]["max_model_len"]
        return child

    def _drafting(self, workload: Workload, setup: Setup) -> Child:
        """The engine for a setup, set to it; where its version cannot change the length, one for this length."""
        length = self._options.max_length if self._in_place else setup.length
        child = self._engine(kind_of(setup, self.target, length), workload.context_length)
        draft = setup.draft
        if draft is None:
            return child
        if self._in_place and not child.facts["in_place"]:
            self._in_place = False
            return self._drafting(workload, setup)
        length_asked = setup.length if self._in_place else None
        window = [draft.min_match, draft.max_match] if draft.kind == "ngram" else None
        child.ask("use", self._options.timeout_s, length=length_asked, window=window)
        return child

    def _warm_up(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """The first run of a setup on an engine pays for lazy set-up: one is thrown away."""
        child = self._drafting(workload, setup)
        if (setup.digest, workload.batch_size) not in child.warm:
            self._decode(workload, prompts[: workload.batch_size], setup)
            child.warm.add((setup.digest, workload.batch_size))

    def _trust(self, workload: Workload, prompts: tuple[Prompt, ...], setup: Setup) -> None:
        """Sampling with a draft is believed once it was compared, for each draft and law."""
        if setup.draft is None or workload.temperature == 0.0:
            return
        law = setup.draft.digest, workload.sampling_digest
        if law not in self._trusted:
            self.check_sampling(workload, prompts, setup)
            self._trusted.add(law)

    def _decode(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[dict[str, Any]]:
        """The queue decoded with a setup: a record of the worker's for each prompt."""
        queue = [prompt.token_ids for prompt in prompts]
        return self._run(self._drafting(workload, setup), queue, workload.batch_size, sampling_of(workload))

    def _run(
        self, child: Child, queue: Sequence[Sequence[int]], concurrency: int, sampling: dict[str, Any]
    ) -> list[dict[str, Any]]:
        asked = {"prompts": queue, "concurrency": concurrency, "sampling": sampling}
        return list(child.ask("run", self._options.timeout_s, **asked)["runs"])

    def _scores(self, child: Child, prompt: Prompt, emitted: Sequence[int]) -> list[tuple[float, int, float]]:
        """Of every emitted token its log-probability and rank, and the largest log-probability at its place.

        The last is not read, only drawn for, because a text may fill the context: unless it is the likeliest its
        log-probability is not known, and NaN.
        """
        asked = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1, "logprobs": 2}
        [run] = self._run(child, [[*prompt.token_ids, *emitted[:-1]]], 1, asked)
        scores = [(own, rank, best) for own, rank, best in run["prompt_logprobs"][len(prompt.token_ids) - 1 :]]
        best = run["logprobs"][0][1]
        is_best = run["token_ids"] == [emitted[-1]]
        return [*scores, (best if is_best else math.nan, 1 if is_best else 2, best)]

    def _log_probs(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[float]:
        """The target's mean log-probability of what the setup emits, by text, each with its own seed.

        NaN for a text of one token.
        """
        law, child = sampling_of(workload), self._drafting(workload, setup)
        texts: list[tuple[Prompt, list[int]]] = []
        for prompt, seed in texts_of(workload, prompts):
            [run] = self._run(child, [prompt.token_ids], 1, law | {"seed": seed})
            texts.append((prompt, run["token_ids"]))
        plain = self._drafting(workload, PLAIN)
        scores = [self._scores(plain, prompt, emitted) for prompt, emitted in texts]
        return [statistics.fmean([own for own, _, _ in one[:-1]] or [math.nan]) for one in scores]

    def _rounds(self, workload: Workload, visit: Visit) -> list[float]:
        """Seconds of a visit's rounds."""
        child = self._drafting(workload, visit.setup)
        asked = question(visit, workload, child.facts["num_tokens"])
        child.ask("use", self._options.timeout_s, window=asked.pop("window"))
        return list(child.ask("rounds", self._options.timeout_s, **asked)["seconds"])

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """Raises InputError and ModelError for what this engine cannot be asked."""
        if setup.draft is not None:
            self._known(setup.draft)
        if setup.stop_below is not None:
            raise InputError(f"{setup.name}: {NAME} drafts a fixed number of tokens; leave stop_below out")
        for what, asked, most in (
            ("batch size", workload.batch_size, self._options.max_batch_size),
            ("speculation length", setup.length, self._options.max_length),
        ):
            if asked > most:
                raise InputError(f"{what} {asked}: this engine was started for up to {most}")
        if (objection := self.capabilities.objection(workload, drafting=setup.draft is not None)) is not None:
            raise InputError(objection)
        loader.check_prompts(workload, prompts)
        for model in (self.target, None if setup.draft is None else setup.draft.model):
            if model is not None:
                loader.check_positions(
                    model.name,
                    num_positions(sources.find(model.name)),
                    context_length=workload.context_length,
                    max_length=setup.length,
                )
