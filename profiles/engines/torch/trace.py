"""Acceptance of a draft over a target trace: one teacher-forced pass of a model, or one look-up per position.

Within a round a draft has only ever seen accepted tokens, which are the trace's own; so one pass answers for every
speculation length (`formulas.expected_rounds`). Knows nothing of time.
"""

import torch
from transformers import PreTrainedModel

from profiles.engines.torch.sampling import sampling_probs
from profiles.records.core import Draft, Prompt, Workload
from profiles.records.errors import BadNumbersError
from profiles.records.evidence import AcceptanceTrace, TargetTrace


def trace_model(
    model: PreTrainedModel, draft: Draft, workload: Workload, prompt: Prompt, trace: TargetTrace
) -> AcceptanceTrace:
    """One forward of the draft over prompt and trace.

    Greedy: a token is kept when the draft's first choice is the trace's. Sampling: with probability
    `min(1, draft_probs / target_probs)` of the emitted token, both laws filtered alike. Raises BadNumbersError when
    the draft's logits are not finite.
    """
    emitted = list(trace.token_ids)
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt.token_ids, *emitted[:-1]]], device=model.device)
        logits = model(tokens, use_cache=False, logits_to_keep=len(emitted)).logits[0, -len(emitted) :]
        if not bool(torch.isfinite(logits).all()):
            raise BadNumbersError(f"draft {draft.name}: its logits are not finite; check its weights or its dtype")
        confidences = torch.softmax(logits.float(), -1).max(-1).values.tolist()
        index = torch.tensor(emitted, device=logits.device)
        if workload.temperature == 0.0:
            keep = (logits.argmax(-1) == index).float().tolist()
        else:
            draft_probs = sampling_probs(logits, workload).gather(-1, index[:, None])[:, 0].double().cpu()
            target_probs = torch.tensor(trace.target_probs, dtype=torch.float64)
            keep = (draft_probs / target_probs).clamp(0.0, 1.0).tolist()
    return AcceptanceTrace(
        prompt_digest=prompt.digest,
        draft_digest=draft.digest,
        accept_probs=tuple(keep),
        confidences=tuple(confidences),
    )
