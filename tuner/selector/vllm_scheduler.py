"""vLLM's scheduler with the speculation length of every step, and request, chosen by a policy.

    export DRAFTPICK_POLICY=policy.json
    eval "exec vllm serve MODEL $(draftpick lookup --target MODEL --format vllm --adaptive)"

The policy file is re-read when it is replaced. A request names its domain in `vllm_xargs`
(`{"draftpick_domain": "code"}`); without one the selector finds out. Environment variables: `DRAFTPICK_METRICS`,
HOST:PORT of Prometheus gauges (127.0.0.1:9431; empty: none), on vLLM's own endpoint instead where
PROMETHEUS_MULTIPROC_DIR is set before the start. `DRAFTPICK_STEPS`: a file for a JSON line per step.
`DRAFTPICK_PER_REQUEST=1`: lengths by request within a batch, which leave vLLM's CUDA graphs of one length.

The scheduler's interface is not declared stable: this module alone uses it, in the versions `flags.STEERED`. The step
that verifies a decision's drafts is the one after that which made them: a decision is for the next step.
"""

import json
import os
import time
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import Gauge, start_http_server
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from profiles.engines.base import RequestInfo
from profiles.engines.rules import model_path
from profiles.engines.vllm.flags import is_loaded, speculative_config, steering_objection
from profiles.records.errors import InputError
from tuner.policy.policy import Policy
from tuner.selector.policy_file import PolicyFile
from tuner.selector.step_controller import Step, StepController

POLICY, METRICS, STEPS, PER_REQUEST = (f"DRAFTPICK_{name}" for name in ("POLICY", "METRICS", "STEPS", "PER_REQUEST"))
METRICS_ADDRESS = "127.0.0.1:9431"
DOMAIN = "draftpick_domain"  # of a request, in `vllm_xargs`
GAUGE_STEPS = 16  # steps between two updates of the gauges
logger = init_logger("vllm.draftpick")


class DraftpickScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """For `--scheduler-cls`; where scheduling is asynchronous an `AsyncDraftpickScheduler` is made.

    Raises InputError, which ends the server's start: no policy, no schedule, a draft that the policy does not know, a
    vLLM that is not known.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("vllm_config") or args[0]
        is_async = cls is DraftpickScheduler and config.scheduler_config.async_scheduling
        return super().__new__(AsyncDraftpickScheduler if is_async else cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (reason := steering_objection(version("vllm"))) is not None:
            raise InputError(f"--scheduler-cls: {reason}; leave it out")
        if self.dynamic_sd_lookup is None:
            raise InputError("--scheduler-cls: `lookup --adaptive` prints the --speculative-config that it needs")
        self._controller = self.make_controller()
        self._reporter = Reporter(self._controller, str(self.parallel_config.data_parallel_rank))
        self._steps: dict[int, tuple[Step, float]] = {}  # by id of vLLM's SchedulerOutput; with seconds spent here
        self._started_s = self._cut_s = 0.0  # of the step that is scheduled

    def make_controller(self) -> StepController:
        """By the environment variables. Raises InputError."""
        path = os.environ.get(POLICY)
        if path is None:
            raise InputError(f"{POLICY} is not set: it names the policy file")
        drafts_of = partial(loaded_drafts, config=self.vllm_config)
        policy_file = PolicyFile(path, drafts_of=drafts_of, max_length=self.num_spec_tokens)
        return StepController(policy_file, per_request=os.environ.get(PER_REQUEST) == "1")

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._started_s = time.perf_counter()
        for request in self.running:
            plan = self._controller.plans.get(request.request_id)
            if plan is not None and len(request.spec_token_ids) > plan.length:
                request.spec_token_ids = request.spec_token_ids[: plan.length]  # a new list: AsyncScheduler shares one
        self._cut_s = time.perf_counter() - self._started_s
        return super().schedule(*args, **kwargs)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Called by `schedule` when it is known which requests take part."""
        began = time.perf_counter()
        controller, scheduled = self._controller, scheduler_output.num_scheduled_tokens
        controller.forget(scheduler_output.finished_req_ids)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        decoding = {
            name: num_drafted
            for name, count in scheduled.items()
            if count == 1 + (num_drafted := len(drafts.get(name, ())))
        }
        prefilling = scheduled.keys() - decoding.keys()
        for name in prefilling:  # also a request that was preempted: what it drafted is gone
            controller.plans.pop(name, None)
        step = controller.verify(decoding, started_s=self._started_s, prefills=bool(prefilling))
        requests = [  # that have read all their text after this step
            request
            for name, count in scheduled.items()
            if (request := self.requests[name]).num_computed_tokens + count
            >= request.num_tokens + request.num_output_placeholders
        ]
        scheduler_output.num_spec_tokens_to_schedule = controller.decide(step, [_info(request) for request in requests])
        self._steps[id(scheduler_output)] = step, self._cut_s + time.perf_counter() - began
        super()._update_after_schedule(scheduler_output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        began = time.perf_counter()
        step, python_s = self._steps.pop(id(scheduler_output))
        emitted = model_runner_output.sampled_token_ids  # vLLM cuts these lists where a request ends
        index = model_runner_output.req_id_to_index
        live = [name for name in step.rows if name in index and name in self.requests] if emitted else []
        counts = {name: len(emitted[index[name]]) for name in live if not self.requests[name].is_finished()}
        python_s += time.perf_counter() - began
        result = super().update_from_output(scheduler_output, model_runner_output)
        ended_s = time.perf_counter()
        self._controller.report(step, counts, ended_s, idle=not self.has_unfinished_requests())
        self._reporter.add(step, counts, ended_s, python_s + time.perf_counter() - ended_s)
        return result

    def shutdown(self) -> None:
        self._reporter.close()
        super().shutdown()


class AsyncDraftpickScheduler(DraftpickScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same where a step is scheduled before the last one's tokens are there."""


def loaded_drafts(policy: Policy, config: Any) -> list[str]:
    """Names of the policy's drafts that a server of this config of vLLM's runs. Raises InputError: none is."""
    server, model = config.speculative_config, config.model_config.model
    drafts = () if policy.prior is None else policy.prior.drafts
    names = [draft.name for draft in drafts if is_loaded(draft, server)]
    if not names:
        others = ", ".join(json.dumps(speculative_config(draft, 1)) for draft in drafts) or "none"
        raise InputError(f"the server drafts with {server.method} {server.model}; the policy has figures of {others}")
    if policy.environment.engine != "vllm":
        logger.warning("the policy was measured on %s: its times are not this server's", policy.environment.engine)
    if model_path(policy.target) != model:
        logger.warning("the policy is of the target %s, the server runs %s", policy.target.name, model)
    return names


def _info(request: Any) -> RequestInfo:
    sampling = request.sampling_params
    domain = (getattr(sampling, "extra_args", None) or {}).get(DOMAIN)
    return RequestInfo(
        id=request.request_id,
        domain=domain if isinstance(domain, str) else None,
        context_length=request.num_tokens,  # clients seldom say how many will come
        temperature=getattr(sampling, "temperature", None) or 0.0,
    )


class Reporter:
    """What a server's selector does, as Prometheus gauges and as a JSON line per step."""

    def __init__(self, controller: StepController, engine: str) -> None:
        self._controller = controller
        self._gauges = {name: gauge.labels(engine) for name, gauge in _gauges().items()}
        path = os.environ.get(STEPS)
        self._file = None if path is None else Path(path).open("ab", buffering=0)  # noqa: SIM115 -- until `close`
        self._num_steps = 0

    def add(self, step: Step, num_emitted: Mapping[str, int], ended_s: float, python_s: float) -> None:
        rows = [(plan.length, proposed, num_emitted.get(name, 0)) for name, (plan, proposed) in step.rows.items()]
        if self._file is not None:
            line = {"ended_s": ended_s, "rows": rows, "python_us": round(1e6 * python_s, 1)}
            try:
                self._file.write(json.dumps(line).encode() + b"\n")
            except OSError as error:  # serving goes on
                logger.warning("%s: no further steps are written (%s)", STEPS, error)
                self.close()
        self._num_steps += 1
        if rows and self._num_steps % GAUGE_STEPS == 1:
            stats = self._controller.stats
            values = {
                "k": sum(length for length, _, _ in rows) / len(rows),
                "expected_acceptance": stats.expected_acceptance,
                "seen_acceptance": stats.seen_acceptance,
                "gain": stats.gain,
                "refused_reports": stats.num_refused,
                "stale_policy": self._controller.is_stale,
                "python_seconds": python_s,
            }
            for name, value in values.items():
                self._gauges[name].set(value)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@cache
def _gauges() -> dict[str, Gauge]:
    """Once per process; on vLLM's endpoint where several processes share it, else on an address of their own."""
    texts = {
        "k": "Drafted tokens per request that the latest step verified.",
        "expected_acceptance": "Accepted share of drafted tokens, as expected when they were chosen.",
        "seen_acceptance": "Accepted share of drafted tokens, as seen.",
        "gain": "Tokens per second over plain decoding since the start, as expected.",
        "refused_reports": "Reports of rounds that were impossible.",
        "stale_policy": "1: the newest policy file was not taken, the one before it holds.",
        "python_seconds": "Python time of choosing and reporting in the latest step.",
    }
    made = {
        name: Gauge(f"draftpick_{name}", text, ["engine"], multiprocess_mode="livemostrecent")
        for name, text in texts.items()
    }
    address = os.environ.get(METRICS, METRICS_ADDRESS)
    if address and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        host, _, port = address.rpartition(":")
        try:
            start_http_server(int(port), host or "127.0.0.1")
        except (OSError, ValueError) as error:
            logger.warning("%s=%s: no metrics (%s)", METRICS, address, error)
    return made
