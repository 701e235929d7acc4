"""A scheduler of vLLM's that can record what a drafter proposes at every position, and verify none of it.

Loaded by `worker.py` from its file, as vLLM's `scheduler_cls`. The interface is not declared stable: `flags.TRACED`
names the versions in which it was run or read, and the worker takes vLLM's own scheduler in any other. With pipeline
stages or asynchronous scheduling proposals arrive before the outputs that they follow: both must be off.
"""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class TraceScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """vLLM's scheduler while `proposals` is None; else plain decoding beside which the drafter proposes.

    `proposals`: by request, by the number of output tokens before it, the tokens proposed to follow.
    """

    proposals: dict[str, dict[int, list[int]]] | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        if self.proposals is not None and self.use_v2_model_runner:
            # Model Runner V2 hands over -1 for each token unless a grammar is to be checked; there is none to check
            output.has_structured_output_requests = True
        return output

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        if self.proposals is None:
            super().update_draft_token_ids(draft_token_ids)
            return
        for name, tokens in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(name)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            self.proposals.setdefault(name, {})[request.num_output_tokens] = [int(token) for token in tokens]
            request.spec_token_ids = []  # nothing is verified in the next step
