"""A look-up mixed into a vLLM server's drafter: a request whose text has a match verifies what followed there.

Any other request verifies the drafter's tokens, which are drafted in every step, because its state must keep up. For
`--scheduler-cls`, and for `--worker-cls` because Model Runner V2 keeps drafts on the device, where a scheduler's
tokens must be written. `--additional-config '{"draftpick_lookup": [MAX, MIN, K]}'`: matches of MAX down to MIN tokens,
K tokens of the drafter; the look-up has up to `num_speculative_tokens`. With asynchronous scheduling the next length is
fixed before the tokens are known, so it must be off.

The interfaces are not declared stable: run on 0.32, read in 0.33 (`flags.TRACED`).
"""

from collections import defaultdict
from importlib.metadata import version
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler

from profiles.acceptance.ngram_index import NgramIndex
from profiles.engines.vllm.flags import LOOKUP_KEY, TRACED, is_between
from profiles.records.errors import require

if current_platform.device_type == "cpu":
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class LookupScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Raises InputError, which ends the server's start: what this class needs is missing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_supported = is_between(version("vllm"), TRACED)
        require(is_supported, f"vLLM {version('vllm')}: a look-up can be mixed in from {TRACED[0]} to {TRACED[1]}")
        require(LOOKUP_KEY in self.vllm_config.additional_config, f"--additional-config has no {LOOKUP_KEY}")
        require(not self.scheduler_config.async_scheduling, "a look-up mixed in needs --no-async-scheduling")
        is_v2 = self.vllm_config.use_v2_model_runner
        worker = f"{__name__}.{LookupWorker.__name__}"
        require(not is_v2 or self.parallel_config.worker_cls == worker, f"Model Runner V2 needs --worker-cls {worker}")
        max_match, min_match, length = self.vllm_config.additional_config[LOOKUP_KEY]
        has_schedule = bool(self.vllm_config.speculative_config.num_speculative_tokens_per_batch_size)
        require(has_schedule, "a schedule in --speculative-config is needed")
        self.dynamic_sd_lookup = [length] * (1 + self.scheduler_config.max_num_seqs)
        self._indexes: dict[str, NgramIndex] = defaultdict(lambda: NgramIndex(max_match, min_match))
        self._is_v2 = is_v2

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        for name in output.finished_req_ids:
            self._indexes.pop(name, None)
        # V2 hands over -1 for each token unless a grammar is to be checked; there is none to check
        output.has_structured_output_requests |= self._is_v2
        return output

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            tokens = self._indexes[name].look_up(request.all_token_ids, self.num_spec_tokens)
            if tokens:
                request.spec_token_ids = self.structured_output_manager.validate_tokens(request, list(tokens))


class LookupWorker(Worker):  # type: ignore[misc]
    """Writes the scheduler's tokens to where Model Runner V2 reads drafts; nothing on V1."""

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self.model_runner, "req_states"):
            states = self.model_runner.req_states
            for name, tokens in scheduler_output.scheduled_spec_decode_tokens.items():
                row = states.draft_tokens[states.req_id_to_index[name]]
                row[: len(tokens)] = row.new_tensor(tokens)
        return super().execute_model(scheduler_output, *args, **kwargs)
