"""What vLLM's server is asked and answers."""

from typing import TYPE_CHECKING

from profiles.engines.serving.completion import CountedRounds, last_events, read_completion
from profiles.engines.serving.server_kind import ServerKind, completions_body
from profiles.engines.vllm.flags import args_for, objection
from profiles.records.evidence import RoundCount

if TYPE_CHECKING:
    from profiles.engines.serving.http_load import Answer

RECORD_ARGS = ("--per-request-spec-decode-metrics", "detailed", "--enable-per-request-metrics")
FIRST_RECORDS = "0.32.0"  # in no release from 0.10.2 to 0.24.0


def _counted_in(answer: "Answer") -> CountedRounds | None:
    records = [event.get("speculative_decoding") for event in last_events(answer, "metrics")]
    record = next(filter(None, records), None)
    if record is None:
        return None
    pairs = zip(record["per_step_drafted"], record["per_step_accepted"], strict=True)
    return [(RoundCount(*pair), 1) for pair in pairs]


SERVER = ServerKind(
    body_of=completions_body,
    read=lambda answer, *_: read_completion(answer, _counted_in),
    log_probs_of=lambda count: {"logprobs": count, "return_tokens_as_token_ids": True},
    objection=objection,
    args_for=args_for,
    record_args=lambda release: () if release.is_before(FIRST_RECORDS) else RECORD_ARGS,
)
