"""One vLLM engine in this process: run by the lane's Python as `python -m tests.support.vllm_driver`.

JSON lines on stdin: the engine's options, then queues of prompts, each answered on stdout with its tokens and seconds.
With `async_scheduling`, which the CPU build switches off, two batches are in flight as on GPUs. With `cycles` the
product's scheduler gives every request another length in every step, without a policy.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from profiles.engines.base import RequestInfo, RoundDecision
from profiles.engines.vllm import lookup_scheduler
from profiles.records.core import Draft, Setup
from tuner.selector.selector import SelectorStats
from tuner.selector.step_controller import Plan, Step, StepController
from tuner.selector.vllm_scheduler import DraftpickScheduler

CYCLE = (1, 6, 0, 3, 2)
SETUP = Setup(draft=Draft(kind="ngram", max_match=4, min_match=2), length=max(CYCLE))


class CycleController(StepController):
    """No selector: the lengths of `CYCLE`, each request at another place in it."""

    def __init__(self) -> None:
        self.plans = {}
        self._lengths = itertools.cycle(CYCLE)

    @property
    def is_stale(self) -> bool:
        return False

    @property
    def stats(self) -> SelectorStats:
        return SelectorStats(0, 0, 0.0, 0.0, 1.0, 1.0)

    def decide(self, _: Step, requests: Sequence[RequestInfo]) -> int:
        decision = RoundDecision(SETUP, True, 1, 1, "mixed", 0.0)
        lengths = [next(self._lengths) for _ in requests]
        self.plans |= {str(info.id): Plan(decision, length) for info, length in zip(requests, lengths, strict=True)}
        return max(lengths, default=0)

    def forget(self, names: Any) -> None:
        for name in names:
            self.plans.pop(name, None)

    def report(self, *args: Any, **kwargs: Any) -> None: ...


class LookupScheduler(lookup_scheduler.LookupScheduler):
    """Writes a line for every row that decoded: request, tokens proposed, tokens emitted."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        index, emitted = model_runner_output.req_id_to_index, model_runner_output.sampled_token_ids
        drafts = scheduler_output.scheduled_spec_decode_tokens
        with open(os.environ["DRAFTPICK_STEPS"], "a", encoding="utf-8") as file:
            for name in index:
                if self.requests[name].num_output_tokens:
                    line = [name, len(drafts.get(name, ())), len(emitted[index[name]])]
                    file.write(json.dumps(line) + "\n")
        return super().update_from_output(scheduler_output, model_runner_output)


def keep_asynchronous() -> None:
    """Undoes that the CPU build schedules synchronously, whatever it is told."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)


def decode(engine: Any, prompts: Sequence[Sequence[int]], batch_size: int, max_tokens: int) -> list[list[int]]:
    """The tokens of each prompt, `batch_size` in flight."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    waiting = iter(enumerate(prompts))
    tokens: dict[int, list[int]] = {}
    num_running = 0
    while len(tokens) < len(prompts):
        while num_running < batch_size and (item := next(waiting, None)) is not None:
            engine.add_request(str(item[0]), {"prompt_token_ids": list(item[1])}, params)
            num_running += 1
        for output in engine.step():
            if output.finished:
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
                num_running -= 1
    return [tokens[number] for number in range(len(prompts))]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints on stdout is no answer
    options = json.loads(sys.stdin.readline())
    if options.pop("cycles", False):
        DraftpickScheduler.make_controller = lambda _: CycleController()
    if options["async_scheduling"]:
        keep_asynchronous()
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**options))
    for line in sys.stdin:
        began_s = time.perf_counter()
        tokens = decode(engine, **json.loads(line))
        seconds, scheduler = time.perf_counter() - began_s, engine.engine_core.engine_core.scheduler
        answer = {"tokens": tokens, "seconds": seconds, "scheduler": type(scheduler).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # the usual exit takes vLLM seconds


if __name__ == "__main__":
    main()
