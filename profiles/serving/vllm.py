"""`VllmEngine`: the engine protocol over vLLM, a worker process for each of its engines.

A plain engine, one for every draft model, one for all n-gram drafts, and one for each model that is scored; the
speculation length and the n-gram window change within an engine. Whole rounds are timed, in vLLM's own scheduler.
"""

import json
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from packaging.version import Version

from profiles import acceptance, memory, sources
from profiles.environment import fingerprint
from profiles.errors import BadNumbersError, EngineError, InputError, ModelError
from profiles.properties import Properties
from profiles.serving.fleet import Fleet
from profiles.serving.vllm_child import Child, python_of
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
    digest_of,
)

NAME = "vllm"
LAST_WRONG_ON_CPU = Version("0.33.0")  # the last CPU build whose kernel was read, and is as the one seen to be wrong
CONTEXT_STEP = 128  # contexts are rounded up to this, so that one engine serves several
CYCLES, ROUNDS = 4, 3  # so many visits to every draft and length, of so many full rounds each
FEWEST_ROUNDS = 7
PATTERN = 97  # token ids of a text that repeats
WIDEST_GAP = 100.0  # stands for a second choice that top-k or top-p left out
SURE = 4.0  # standard errors


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM is run: by `python`, else $DRAFTPICK_VLLM_PYTHON, else this one.

    `max_batch_size` requests in flight and `max_length` drafted tokens are what engines are started for; `max_alive`
    of them are kept at a time. `timeout_s`: the longest that one answer may take. `log_folder`: by default a temporary
    one, which is kept.
    """

    python: str | None = None
    max_batch_size: int = 8
    max_length: int = 8
    max_alive: int = 4
    timeout_s: float = 1800.0
    log_folder: Path | None = None
    worker: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What an engine is started for: the model served, and how it speculates.

    `length` is the most drafted tokens a round, exactly so many where the version cannot change it. `is_processed`: its
    log-probabilities are those after temperature, top-k and top-p.
    """

    served: str
    method: str | None = None
    draft: str | None = None
    length: int = 0
    is_processed: bool = False


class VllmEngine:
    """A target and its drafts in vLLM; fits `protocol.Engine`. A context manager: `close` ends its processes.

    Raises InputError: the Python has no vLLM.
    """

    def __init__(self, target: Model, drafts: Sequence[Draft], options: VllmOptions | None = None) -> None:
        self._target, self._drafts = target, tuple(drafts)
        self._options = options or VllmOptions()
        self._python = python_of(self._options.python, os.environ)
        self._logs = self._options.log_folder or Path(tempfile.mkdtemp(prefix="draftpick-vllm-"))
        self._num_tokens = 0  # of a sequence, that the engines alive have room for
        self._in_place = True
        self._environment: Environment | None = None
        self._fleet: Fleet[Kind, Child] = Fleet(self._start, self._options.max_alive)
        with self._child() as child:
            version, self._torch = child.facts.get("vllm"), str(child.facts.get("torch"))
        if version is None:
            raise InputError(
                f"python {self._python!r} has no vLLM; name one that has it, in $DRAFTPICK_VLLM_PYTHON for instance"
            )
        self._version = str(version)

    @property
    def properties(self) -> Properties:
        return Properties(
            name=NAME,
            times="rounds",
            past_end=True,
            pads=False,
            num_drafts="rounds that proposed",
            draft_kinds=("model", "ngram", "native"),
            traced_kinds=("model", "ngram"),
            length_change="in place" if self._in_place else "restart",
            sampled_objection=self._sampled_objection(),
            origin=f"{NAME} {self._version} {self._target.dtype}",
        )

    @property
    def environment(self) -> Environment:
        """As the plain engine, which is started for it, says."""
        if self._environment is None:
            child = self._engine(Kind(served=self._target.name), CONTEXT_STEP)
            options = {"eager": self._on_cpu, "max_num_seqs": self._options.max_batch_size, "prefix_caching": False}
            self._environment = replace(
                fingerprint("cpu" if self._on_cpu else "cuda"),
                threads=int(child.facts["threads"]),
                torch=self._torch,
                engine=NAME,
                engine_version=self._version,
                engine_options=json.dumps(options, sort_keys=True, separators=(",", ":")),
            )
        return self._environment

    @property
    def target(self) -> Model:
        return self._target

    @property
    def drafts(self) -> tuple[Draft, ...]:
        return self._drafts

    @property
    def num_starts(self) -> int:
        """Engines started so far."""
        return self._fleet.num_starts

    @property
    def pids(self) -> tuple[int, ...]:
        """All processes of its engines that live now."""
        return tuple(pid for child in self._fleet.members for pid in child.pids)

    def trace_target(self, workload: Workload, prompt: Prompt) -> TargetTrace:
        """One plain run with log-probabilities; sampled ones come from an engine that tells them as drawn from."""
        self._check(workload, (prompt,), PLAIN)
        is_sampled = workload.temperature > 0.0
        child = self._engine(Kind(served=self._target.name, is_processed=is_sampled), workload.context_length)
        [run] = self._run(child, [prompt.token_ids], 1, _sampling(workload) | {"logprobs": 2})
        probs = [math.exp(own) for own, _, _ in run["logprobs"]]
        scale = workload.temperature if is_sampled else 1.0
        gaps = [min(WIDEST_GAP, max(0.0, scale * (first - second))) for _, first, second in run["logprobs"]]
        if not all(map(math.isfinite, (*probs, *gaps))):
            raise BadNumbersError(f"target {self._target.name}: its log-probabilities are not finite; check its dtype")
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
            return acceptance.trace_lookup(draft, prompt, trace, max_length)
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
            keep_probs=tuple(float(rank == 1) for _, rank, _ in scores),
            confidences=tuple(confidences),
        )

    def run_together(
        self,
        workload: Workload,
        prompts: tuple[Prompt, ...],
        setups: tuple[Setup, ...],
        occasion: str,  # noqa: ARG002 -- a key of stored evidence
    ) -> tuple[Sample, ...]:
        """Timed runs of the queue, setup after setup, each on an engine that has run it before."""
        for setup in setups:
            self._check(workload, prompts, setup)
        samples: list[Sample] = []
        for setup in setups:
            runs = self._timed(workload, prompts, setup)
            samples += [_sample(setup, prompt, run) for prompt, run in zip(prompts, runs, strict=True)]
        return tuple(samples)

    def time_steps(self, workload: Workload, context_length: int, max_length: int) -> dict[str, StepTimes]:
        """Plain rounds, and rounds of every traced draft at every length, visited in turn."""
        times = {self._target.run_digest: {1: list[float]()}}
        units = [(PLAIN, self._target.run_digest)]
        for draft in self._drafts:
            if draft.kind in self.properties.traced_kinds:
                times[draft.digest] = {}
                units += [(Setup(draft=draft, length=length), draft.digest) for length in range(1, max_length + 1)]
        shuffled = random.Random(0)
        for _ in range(CYCLES):
            for setup, part in shuffled.sample(units, len(units)):
                for width, seconds in self._rounds(workload, context_length, setup).items():
                    times[part].setdefault(width, []).extend(seconds)
        return {
            part: StepTimes(
                part_digest=part,
                batch_size=workload.batch_size,
                context_length=context_length,
                samples_s={width: tuple(seconds) for width, seconds in own.items() if seconds},
            )
            for part, own in times.items()
        }
