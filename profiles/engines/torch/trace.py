"""Acceptance of a draft model over a target trace: one teacher-forced pass.

Within a round a draft has only ever seen accepted tokens, which are the trace's own; so one pass answers for every
speculation length (see `profiles.acceptance.expected_rounds`).
"""

import torch
from transformers import PreTrainedModel

from profiles.engines.torch.sampling import sampling_probs
from profiles.records.core import Draft, Prompt, Workload
from profiles.records.errors import BadNumbersError
from profiles.records.evidence import AcceptanceTrace, TargetTrace

CHUNK = 64  # tokens whose distributions over the vocabulary are in memory at once


def trace_model(
    model: PreTrainedModel, draft: Draft, workload: Workload, prompt: Prompt, trace: TargetTrace
) -> AcceptanceTrace:
    """One forward of the draft over prompt and trace.

    accept_prob of the emitted token: greedy 1 where it is the draft's first choice, else 0; sampling
    `min(1, draft_prob / target_prob)`, both distributions filtered alike. Raises BadNumbersError when the draft's
    logits are not finite.
    """
    emitted = list(trace.token_ids)
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt.token_ids, *emitted[:-1]]], device=model.device)
        logits = model(tokens, use_cache=False, logits_to_keep=len(emitted)).logits[0, -len(emitted) :]  # (N, V)
        if not bool(torch.isfinite(logits).all()):
            raise BadNumbersError(f"draft {draft.name}: its logits are not finite; check its weights or its dtype")
        chunks = torch.split(logits, CHUNK)
        confidences = [prob for chunk in chunks for prob in torch.softmax(chunk.float(), -1).max(-1).values.tolist()]
        index = torch.tensor(emitted, device=logits.device)
        if workload.temperature == 0.0:
            accept_probs = (logits.argmax(-1) == index).float().tolist()
        else:
            draft_probs = torch.cat(
                [
                    sampling_probs(chunk, workload).gather(-1, tokens[:, None])[:, 0].double().cpu()
                    for chunk, tokens in zip(chunks, torch.split(index, CHUNK), strict=True)
                ]
            )
            target_probs = torch.tensor(trace.target_probs, dtype=torch.float64)
            accept_probs = (draft_probs / target_probs).clamp(0.0, 1.0).tolist()
    return AcceptanceTrace(
        prompt_digest=prompt.digest,
        draft_digest=draft.digest,
        accept_probs=tuple(accept_probs),
        confidences=tuple(confidences),
    )
