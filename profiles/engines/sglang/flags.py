"""Speculative flags of SGLang's server, and what its server is asked and answers.

Flags are those of `sglang/srt/server_args.py` in the released 0.5.3, 0.5.5, 0.5.10 and 0.5.23; the lane in
`tests/lanes` runs the last one's own parser on them.
"""

from typing import TYPE_CHECKING

from profiles.engines import rules
from profiles.engines.serving.completion import CountedRounds, last_events, read_completion, rounds_in_histogram
from profiles.engines.serving.server_kind import ServerKind, completions_body
from profiles.records.core import Setup

if TYPE_CHECKING:
    from profiles.engines.serving.http_load import Answer


def args_for(setup: Setup) -> list[str]:
    """The arguments of a setup: one chain of drafted tokens; the number of draft tokens counts the chain's root."""
    assert setup.draft is not None
    model = setup.draft.model
    verified = _flag("--speculative-num-draft-tokens", setup.length + 1)
    if model is None:
        breadths = (_flag(f"--speculative-ngram-{end}-bfs-breadth", 1) for end in ("min", "max"))
        pairs = [_flag("--speculative-algorithm", "NGRAM"), verified, *breadths]
        return [word for pair in pairs for word in pair]
    pairs = [
        _flag("--speculative-algorithm", "STANDALONE"),
        _flag("--speculative-draft-model-path", rules.model_path(model)),
        *([_flag("--speculative-draft-model-revision", model.revision)] if model.revision is not None else []),
        _flag("--speculative-num-steps", setup.length),
        _flag("--speculative-eagle-topk", 1),
        verified,
    ]
    return [word for pair in pairs for word in pair]


def _flag(name: str, value: object) -> list[str]:
    """One word where the value would be read as the next flag."""
    text = str(value)
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


def _counted_in(answer: "Answer") -> CountedRounds | None:
    records = [event.get("spec_tokens_details") for event in last_events(answer, "sglext")]
    record = next((record for record in records if record), None)
    if record is None:
        return None
    return rounds_in_histogram(
        record["spec_correct_drafts_histogram"], record["spec_num_proposed_drafts"], record["spec_verify_ct"]
    )


SERVER = ServerKind(
    body_of=lambda workload, prompt: completions_body(
        workload, prompt, return_spec_tokens_details=True, no_stop_trim=True
    ),
    read=lambda answer, *_: read_completion(answer, _counted_in),
    objection=rules.objection,
    args_for=lambda setup, _: args_for(setup),
)
