"""A scheduler of vLLM's that can record what a drafter proposes at every position, or mix a look-up into a drafter.

Loaded by `worker.py` from its file, as vLLM's `scheduler_cls`. The interface is not declared stable: `flags.TRACED`
names the versions in which it was run or read, and the worker takes vLLM's own scheduler in any other. With pipeline
stages or asynchronous scheduling proposals arrive before the outputs that they follow: both must be off.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class TraceScheduler(Scheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """vLLM's scheduler while both are None.

    `proposals`: by request, by the number of output tokens before it, the tokens that the drafter proposes beside plain
    decoding. `look_up`: the tokens that a request's text (both given) verifies instead of the drafter's, if any.
    """

    proposals: dict[str, dict[int, list[int]]] | None = None
    look_up: Callable[[str, Sequence[int]], list[int]] | None = None

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        if self.proposals is not None and self.use_v2_model_runner:
            # Model Runner V2 hands over -1 for each token unless a grammar is to be checked; there is none to check
            output.has_structured_output_requests = True
        return output

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        if self.proposals is None:
            super().update_draft_token_ids(draft_token_ids)
        for name, tokens in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(name)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            if self.proposals is not None:
                self.proposals.setdefault(name, {})[request.num_output_tokens] = [int(token) for token in tokens]
                request.spec_token_ids = []  # nothing is verified in the next step
            elif self.look_up is not None:
                request.spec_token_ids = self.look_up(name, request.all_token_ids) or request.spec_token_ids
