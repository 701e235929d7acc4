"""`VllmEngine`: the engine protocol over vLLM, a worker process for each of its engines.

A plain engine, one for every draft model, one for all n-gram drafts, and one for each model that is scored; the
speculation length and the n-gram window change within an engine. Whole rounds are timed, in vLLM's own scheduler.
"""

import contextlib
import json
import math
import operator
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiles.acceptance import ngram
from profiles.engines.base import EngineCapabilities
from profiles.engines.runs import Run
from profiles.engines.serving.base import NUM_TEXTS, ServedEngine, StepSamples, check_means, texts_of
from profiles.engines.serving.process import ServerPool
from profiles.engines.serving.redaction import keyed_variables
from profiles.engines.vllm import config
from profiles.engines.vllm.client import WorkerClient, find_python
from profiles.engines.vllm.flags import TRACED, is_between, is_traceable, method_of
from profiles.engines.vllm.responses import SERVER
from profiles.engines.vllm.timing import Visit, in_texts, in_turn, rounds_request, visits
from profiles.models import loader, sources
from profiles.records.core import LOOKUP_LENGTH, PLAIN, Draft, DraftKind, Environment, Model, Prompt, Setup, Workload
from profiles.records.errors import BadNumbersError, EngineError, InputError
from profiles.records.evidence import (
    Acceptance,
    AcceptanceTrace,
    LookupTrace,
    RoundCount,
    StepShape,
    StepTimes,
    TargetTrace,
    sparse_lengths,
)

NAME = "vllm"
# CPU builds up to the last whose sampling kernel was read; 0.32.0 was seen to be wrong; one without a number is checked
WRONG_ON_CPU = ("0", "0.33.0")
MAX_GAP = 100.0  # stands for a second choice that top-k or top-p left out


class VllmEngine(ServedEngine[config.EngineKey, WorkerClient]):
    """A target and its drafts in vLLM; fits `Engine`. A context manager: `close` ends its processes.

    Raises InputError: the Python has no vLLM.
    """

    def __init__(self, target: Model, drafts: Sequence[Draft], options: config.VllmOptions | None = None) -> None:
        self._options = options or config.VllmOptions()
        super().__init__(target, drafts, ServerPool(self._start, self._options.max_alive))
        self._python = find_python(self._options.python)
        self._logs = self._options.log_folder or Path(tempfile.mkdtemp(prefix="draftpick-vllm-"))
        self._num_tokens = 0  # that a sequence may have in the running engines
        self._fixed: set[str] = set()  # digests of drafts whose length needs an engine of its own
        self._caches: dict[str, dict[str, Any]] = {}  # facts of the first start with each draft
        self._traced: dict[str, dict[str, Prompt]] = {}  # by sampling: the prompts whose target was traced
        # by setup and sampling, then by prompt
        self._recorded: dict[tuple[str, str], dict[str, Mapping[str, Any] | None]] = {}
        # digests of drafts whose 16-bit texts were compared with plain decoding's
        self._checked_texts: set[str] = set()
        self._compared: set[str] = set()  # digests of drafts whose trace was compared with real rounds
        self._environment: Environment | None = None
        with self._worker() as worker:
            version, self._torch = worker.facts.get("vllm"), str(worker.facts.get("torch"))
            if version is None:
                raise InputError(
                    f"python {self._python!r} has no vLLM; name one that has it, for instance in $DRAFTPICK_VLLM_PYTHON"
                )
            self._version = str(version)
            self._about = worker.call("about", self._options.timeout_s)
        self._label, self._on_cpu = f"{NAME} {version}", self._about["kind"] == config.CPU
        self._watched_gpus = () if self._on_cpu else (self._about.get("uuid") or "cuda:0",)
        self._records = is_between(self._version, TRACED)
        if not self._records:
            traced = " to ".join(TRACED)
            self.notes += (f"{self._label}: proposals are recorded in {traced}; heads are run at every length here",)
        if not self._on_cpu:
            self._pool.max_alive = 1

    @property
    def capabilities(self) -> EngineCapabilities:
        # without recording heads are run at every length, and on GPUs look-ups: what they match there is not known
        kinds: tuple[DraftKind, ...] = ("model", "ngram") if self._on_cpu else ("model",)
        variant = [] if self._on_cpu else [str(self._about["kind"])]
        if runner := os.environ.get("VLLM_USE_V2_MODEL_RUNNER"):
            variant.append(f"v2={runner}")
        is_wrong = self._on_cpu and is_between(self._version, WRONG_ON_CPU)
        objection = f"{self._label} draws from another distribution when it drafts on the CPU; 0 is allowed"
        return EngineCapabilities(
            name=NAME,
            past_end=SERVER.past_end,
            traced_kinds=("model", "ngram", "native", "composite") if self._records else kinds,
            untraced=frozenset(draft.digest for draft in self.drafts if not is_traceable(draft)),
            sampling_objection=objection if is_wrong else None,
            origin=" ".join([NAME, self._version, *variant, self.target.dtype]),
        )

    @property
    def environment(self) -> Environment:
        """As reported by the plain engine, which is started for it."""
        if self._environment is None:
            worker = self._engine(config.EngineKey(model=self.target.name), self._options.context_length)
            options: dict[str, object] = {
                "eager": self._on_cpu,
                "max_num_seqs": self._options.max_batch_size,
                "prefix_caching": False,
            }
            if not self._on_cpu:
                options |= {"async_scheduling": False, "runner": worker.facts["runner"]}
            if self._options.given:
                options["given"] = dict(self._options.given)
            if variables := keyed_variables(os.environ):
                options["environment"] = variables
            self._environment = replace(
                config.environment_of(self._about, self._watched_gpus),
                threads=int(worker.facts["threads"]),
                torch=self._torch,
                engine=NAME,
                engine_version=self._version,
                engine_options=json.dumps(options, sort_keys=True, separators=(",", ":")),
            )
        return self._environment

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with log-probabilities; sampled runs use an engine that reports them as drawn from."""
        self._check(workload, (prompt,), PLAIN)
        is_sampled = workload.temperature > 0.0
        worker = self._engine(
            config.EngineKey(model=self.target.name, is_processed=is_sampled), workload.context_length
        )
        [run] = self._run(worker, [prompt.token_ids], 1, config.sampling_of(workload) | {"logprobs": 2})
        probs = [math.exp(log_prob) for log_prob, _, _ in run["logprobs"]]
        scale = workload.temperature if is_sampled else 1.0
        gaps = [min(MAX_GAP, max(0.0, scale * (first - second))) for _, first, second in run["logprobs"]]
        _check_finite(f"target {self.target.name}", (*probs, *gaps))
        self._traced.setdefault(workload.sampling_digest, {})[prompt.digest] = prompt
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
        """What the draft proposes at every position of the target's text; vLLM drafts greedily.

        By a plain run beside which it drafts. In versions without `TraceScheduler`: by one prefill of a draft model
        over the trace, or by look-ups in it.
        """
        if draft not in self._components(self.drafts):
            self._check_draft(draft)
        if self._records:
            return self._record(workload, prompt, trace, Setup(draft=draft, length=self._longest(draft, max_length)))
        if draft.kind == "ngram":
            return ngram.trace_lookup(draft, prompt, trace, max_length)
        if draft.kind != "model" or draft.model is None:
            raise InputError(f"draft {draft.name}: vLLM reports the acceptance of draft models and look-ups only")
        worker = self._engine(config.EngineKey(model=draft.model.name), workload.context_length)
        scores = self._scores(worker, prompt, trace.token_ids)
        confidences = tuple(math.exp(best) for _, _, best in scores)
        _check_finite(f"draft {draft.name}", confidences)
        return AcceptanceTrace(
            prompt_digest=prompt.digest,
            draft_digest=draft.digest,
            accept_probs=tuple(float(rank == 1) for _, rank, _ in scores),
            confidences=confidences,
        )

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Whole rounds: of plain decoding, and of every traced component whose engine starts.

        On a CPU at `sparse_lengths`; on a GPU at every length, as times rise in steps at the sizes of captured graphs.
        """
        at_context = replace(workload, context_length=context_length)
        all_visits = [Visit(component=self.target.run_digest, setup=PLAIN, num_drafted=0)]
        self._rounds(at_context, all_visits)
        for draft in self._components(self.capabilities.timed(self.drafts)):
            longest = self._longest(draft, max_length)
            draft_visits = visits(draft, sparse_lengths(longest) if self._on_cpu else range(1, longest + 1))
            with contextlib.suppress(EngineError):  # starts and warms up the engine
                self._rounds(at_context, [visit for visit in draft_visits if visit.setup.length <= 1])
                all_visits += draft_visits

        def visit_all() -> StepSamples:
            times: dict[str, dict[int, list[float]]] = {}
            for group in in_turn(all_visits, self._key, alone=not self._on_cpu):
                for visit, seconds in self._rounds(at_context, group):
                    times.setdefault(visit.component, {}).setdefault(1 + visit.num_drafted, []).extend(seconds)
            return times

        return self._timed(workload, context_length, visit_all)

    def counters(self, setup: Setup, workload: Workload) -> dict[str, list[int]]:
        """vLLM's own counts of a setup's engine since its start, as in its /metrics; a list by position each."""
        return dict(self._drafting(workload, setup).call("counters", self._options.timeout_s)["counters"])

    @property
    def memory(self) -> dict[str, dict[str, Any]]:
        """By draft: KV-cache tokens, the most requests of the longest context at a time, and preemptions so far."""
        names = "kv_tokens", "concurrency", "preemptions"
        return {draft: {name: facts.get(name) for name in names} for draft, facts in self._caches.items()}

    def _longest_round(self, setup: Setup) -> int:
        is_composite = setup.draft is not None and setup.draft.kind == "composite"
        return max(LOOKUP_LENGTH, setup.length) if is_composite else setup.length

    def _proposes_all(self, setup: Setup) -> bool:
        draft = setup.draft
        if draft is None or draft.kind == "composite":
            return False
        return method_of(draft) not in ("ngram", "suffix") and setup.stop_below is None

    def _worker(self) -> WorkerClient:
        path = self._logs / f"vllm-{self._pool.num_starts}.log"
        worker = self._options.worker
        return WorkerClient(self._python, path, **({} if worker is None else {"worker": worker}))

    def _engine(self, key: config.EngineKey, context_length: int) -> WorkerClient:
        """The engine for a key, which takes such contexts and a round past their end."""
        needed = max(context_length, self._options.context_length) + 2 * (self._options.max_length + 1)
        if needed > self._num_tokens:
            self.close()
            self._num_tokens = -(-needed // config.CONTEXT_STEP) * config.CONTEXT_STEP
        return self._pool.get(key)

    def _start(self, key: config.EngineKey) -> WorkerClient:
        arguments = config.start_arguments(key, self.target.dtype, self._num_tokens, self._options, on_cpu=self._on_cpu)
        worker = self._worker()
        worker.facts |= worker.call("start", self._options.timeout_s, **arguments, traces=self._records)
        worker.facts["num_tokens"] = arguments["options"]["max_model_len"]
        name = "plain" if key.draft is None else "look-ups" if key.draft == config.LOOK_UP else key.draft.name
        self._caches.setdefault(name if key.model == self.target.name else key.model, worker.facts)
        return worker

    def _key(self, setup: Setup) -> config.EngineKey:
        """The engine that runs a setup, as far as is known: one for this length where it cannot be changed."""
        if setup.draft is None:
            return config.EngineKey(model=self.target.name)
        draft = setup.draft.components[-1]  # the scheduler mixes the look-up of a composite in
        length = setup.length if setup.draft.digest in self._fixed else self._options.max_length
        return config.EngineKey(
            model=self.target.name, draft=config.LOOK_UP if draft.kind == "ngram" else draft, length=length
        )

    def _drafting(self, workload: Workload, setup: Setup) -> WorkerClient:
        """The engine for a setup, set to it."""
        worker = self._engine(self._key(setup), workload.context_length)
        draft = setup.draft
        if draft is None:
            return worker
        in_place = worker.facts["in_place"]
        if not in_place and draft.digest not in self._fixed:
            self._fixed.add(draft.digest)
            return self._drafting(workload, setup)
        lookup = [draft.max_match, draft.min_match, self._longest_round(setup)]
        if draft.kind == "composite" and (worker.facts["runner"] != 1 or not in_place or not self._records):
            raise EngineError(
                f"{self._label} takes tokens from {draft.name} on Model Runner V1 of {' to '.join(TRACED)}"
            )
        worker.call(
            "use",
            self._options.timeout_s,
            length=setup.length if in_place else None,
            window=[draft.min_match, draft.max_match] if draft.kind == "ngram" else None,
            lookup=lookup if draft.kind == "composite" else None,
        )
        return worker

    @staticmethod
    def _components(drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        return tuple(dict.fromkeys(component for draft in drafts for component in draft.components))

    def _longest(self, draft: Draft, max_length: int) -> int:
        """How far a component is traced and timed: the look-up of a composite has a length of its own."""
        mixed = (other.components[0] for other in self.drafts if other.kind == "composite")
        return max(LOOKUP_LENGTH, max_length) if draft in mixed else max_length

    def _record(self, workload: Workload, prompt: Prompt, trace: TargetTrace, setup: Setup) -> LookupTrace:
        """The proposals of a setup at every position, and the accepted ones; the first is compared with real rounds.

        Raises EngineError: float32 greedy decoding emitted another text than the trace's, or real rounds differ.
        """
        assert setup.draft is not None
        run = self._recorded_run(workload, prompt, setup)
        emitted = tuple(run["token_ids"])
        if emitted != trace.token_ids and workload.temperature == 0.0 and self.target.dtype == "float32":
            raise EngineError(f"{self._label} with {setup.name} diverges from plain decoding while it verifies nothing")
        proposals = {start: tokens[: setup.length] for start, tokens in run["proposals"]}
        if any(min(tokens, default=0) < 0 for tokens in proposals.values()):  # placeholders of Model Runner V2
            raise EngineError(f"{self._label} with {setup.name} does not tell which tokens it proposed: no trace")
        acceptance = ngram.acceptance_of(
            setup.draft, prompt, emitted, proposals, size=len(trace.token_ids), max_length=setup.length
        )
        if setup.draft.digest not in self._compared and setup.length > 1 and workload.temperature == 0.0:
            shorter = replace(setup, length=setup.length // 2)
            [real] = self._run(self._drafting(workload, shorter), [prompt.token_ids], 1, config.sampling_of(workload))
            check_rounds(acceptance, shorter, emitted, real)
            self._compared.add(setup.draft.digest)
        return acceptance

    def _recorded_run(self, workload: Workload, prompt: Prompt, setup: Setup) -> Mapping[str, Any]:
        """The recorded run of a prompt; one that is still to run brings others along, whose targets were traced."""
        runs = self._recorded.setdefault((setup.digest, workload.sampling_digest), {})
        if runs.get(prompt.digest) is None:
            traced = self._traced.get(workload.sampling_digest, {})
            others = [other for digest, other in traced.items() if digest not in runs and digest != prompt.digest]
            queue = [prompt, *others[: self._options.max_batch_size - 1]]
            texts, worker = [other.token_ids for other in queue], self._drafting(workload, setup)
            records = self._run(worker, texts, len(texts), config.sampling_of(workload), command="trace")
            runs |= {other.digest: record for other, record in zip(queue, records, strict=True)}
        run = runs[prompt.digest]
        assert run is not None
        runs[prompt.digest] = None  # each is asked for once
        return run

    def _prepare(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """The first run of a setup on an engine pays for lazy initialisation and is dropped."""
        worker = self._drafting(workload, setup)
        if (setup.digest, workload.batch_size) not in worker.warm:
            self._decode(workload, prompts[: workload.batch_size], setup)
            worker.warm.add((setup.digest, workload.batch_size))
        self._check_sampling_once(workload, prompts, setup)
        if workload.temperature == 0.0 and self.target.dtype != "float32" and len(prompts) > 1:
            self._check_texts_once(workload, prompts[:NUM_TEXTS], setup)

    def _check_texts_once(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        """In 16 bits greedy texts may differ by kernel and batch, but not in how likely they are to the target.

        Raises EngineError: they do, with the shares of texts that diverge from plain decoding's, the draft's and those
        of plain decoding in a batch.
        """
        if setup.draft is None or setup.draft.digest in self._checked_texts:
            return
        decodings = (PLAIN, 1), (setup, 1), (PLAIN, min(len(prompts), self._options.max_batch_size))
        plain, drafted, batched = (
            [list(run.token_ids) for run in self._decode(replace(workload, batch_size=size), prompts, decoded)]
            for decoded, size in decodings
        )
        shares = [statistics.fmean(map(operator.ne, plain, texts)) for texts in (drafted, batched)]
        worker = self._drafting(workload, PLAIN)
        means = [
            [self._mean_score(worker, *text) for text in zip(prompts, texts, strict=True)] for texts in (drafted, plain)
        ]
        diverged = f"{shares[0]:.0%} of texts diverge, {shares[1]:.0%} of plain ones in a batch"
        check_means(f"{self._label} with {setup.name} in {self.target.dtype} ({diverged})", *means)
        self._checked_texts.add(setup.draft.digest)

    def _mean_score(self, worker: WorkerClient, prompt: Prompt, emitted: Sequence[int]) -> float:
        """The mean log-probability of a text without its last token, which is not read; NaN for one token."""
        scores = self._scores(worker, prompt, emitted)
        return statistics.fmean([score for score, _, _ in scores[:-1]] or [math.nan])

    def _decode(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[Run]:
        queue = [prompt.token_ids for prompt in prompts]
        records = self._run(self._drafting(workload, setup), queue, workload.batch_size, config.sampling_of(workload))
        return [
            Run(
                token_ids=record["token_ids"],
                ttft_s=record["first_s"] - record["started_s"],
                decode_s=record["last_s"] - record["first_s"],
                rounds=Counter(RoundCount(*pair) for pair in record["rounds"]),
                shapes=Counter(StepShape(width) for width in record["widths"]),
                refills=record["refills"],
                threads=record.get("threads"),
            )
            for record in records
        ]

    def _run(
        self,
        worker: WorkerClient,
        queue: Sequence[Sequence[int]],
        concurrency: int,
        sampling: dict[str, Any],
        *,
        command: str = "run",
    ) -> list[dict[str, Any]]:
        arguments = {"prompts": queue, "concurrency": concurrency, "sampling": sampling}
        answer = worker.call(command, self._options.timeout_s, **arguments)
        worker.facts["preemptions"] = answer.get("preemptions", 0)
        return list(answer["runs"])

    def _scores(self, worker: WorkerClient, prompt: Prompt, emitted: Sequence[int]) -> list[tuple[float, int, float]]:
        """Of every emitted token its log-probability and rank, and the largest log-probability at its position.

        The last token is not read but drawn, because a text may fill the context: where it is not the likeliest its
        log-probability is not known, and NaN.
        """
        sampling = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1, "logprobs": 2}
        [run] = self._run(worker, [[*prompt.token_ids, *emitted[:-1]]], 1, sampling)
        scores = [(score, rank, best) for score, rank, best in run["prompt_logprobs"][len(prompt.token_ids) - 1 :]]
        best = run["logprobs"][0][1]
        is_best = run["token_ids"] == [emitted[-1]]
        return [*scores, (best if is_best else math.nan, 1 if is_best else 2, best)]

    def _mean_log_probs(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[float]:
        """NaN for a text of one token."""
        sampling, worker = config.sampling_of(workload), self._drafting(workload, setup)
        texts: list[tuple[Prompt, list[int]]] = []
        for prompt, seed in texts_of(workload, prompts):
            [run] = self._run(worker, [prompt.token_ids], 1, sampling | {"seed": seed})
            texts.append((prompt, run["token_ids"]))
        plain = self._drafting(workload, PLAIN)
        return [self._mean_score(plain, prompt, emitted) for prompt, emitted in texts]

    def _rounds(self, workload: Workload, group: Sequence[Visit]) -> list[tuple[Visit, list[float]]]:
        """Seconds of the rounds of visits to one engine."""
        timed: list[tuple[Visit, list[float]]] = []
        for text in in_texts(group, workload.context_length):
            worker = self._drafting(workload, text[0].setup)
            is_speculative = worker.facts["in_place"] and text[0].setup.draft is not None
            request = rounds_request(text, workload, worker.facts["num_tokens"], in_place=is_speculative)
            answer = worker.call("rounds", self._options.timeout_s, **request)["seconds"]
            timed += zip(text, answer, strict=True)
        return timed

    def _check(self, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> None:
        self._check_draft(setup.draft)
        if setup.stop_below is not None:
            raise InputError(f"{setup.name}: {NAME} drafts a fixed number of tokens; leave stop_below out")
        for what, value, most in (
            ("batch size", workload.batch_size, self._options.max_batch_size),
            ("speculation length", setup.length, self._options.max_length),
        ):
            if value > most:
                raise InputError(f"{what} {value}: this engine was started for up to {most}")
        if (objection := self.capabilities.objection(workload, drafting=setup.draft is not None)) is not None:
            raise InputError(objection)
        loader.check_prompts(workload, prompts)
        for model in (self.target, None if setup.draft is None else setup.draft.model):
            if model is not None:
                loader.check_positions(
                    model.name,
                    config.num_positions(sources.find(model.name)),
                    context_length=workload.context_length,
                    max_length=setup.length,
                )


def check_rounds(acceptance: LookupTrace, setup: Setup, emitted: Sequence[int], real: Mapping[str, Any]) -> None:
    """Compares the rounds of a real run at a shorter length with those that a trace tells, as far as the texts agree.

    Raises EngineError: a round proposed or accepted another number of tokens.
    """
    pairs = zip(emitted, real["token_ids"], strict=False)
    agreed = next((index for index, (first, second) in enumerate(pairs) if first != second), len(emitted))
    start = 1
    for counts in real["rounds"]:
        if start + setup.length >= agreed:  # the engine counts what it accepts past the end
            return
        traced = [min(setup.length, column[start]) for column in (acceptance.proposed, acceptance.accepted)]
        if list(counts) != traced:
            raise EngineError(
                f"{setup.name}: after {start} tokens it proposed and accepted {list(counts)}, its trace at "
                f"{acceptance.max_length} says {traced}; --engine server measures it at every length"
            )
        start += traced[1] + 1


def _check_finite(name: str, values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise BadNumbersError(f"{name}: its log-probabilities are not finite; check its dtype")
