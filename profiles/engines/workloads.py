"""From what a user names to an engine and its workloads: everything that is refused is refused here, before any run.

Loads target and drafts, checks that they fit each other, the device and the asked contexts, and reads the prompts.
Knows nothing of what will be measured.
"""

import itertools
from collections.abc import Sequence

from profiles.engines.bench import Bench, Question
from profiles.models import loader
from profiles.prompts.reader import Request, read_all
from profiles.prompts.tokens import encode
from profiles.records.core import Prompt, Workload
from profiles.records.errors import InputError, ModelError

CONTEXT_STEP = 64  # a context that follows from the prompts is rounded up to a multiple of this


def workloads(
    bench: Bench, question: Question, sources: Sequence[str], domain: str | None = None
) -> tuple[list[tuple[Workload, tuple[Prompt, ...]]], list[str]]:
    """As `workloads_of`, from prompt sources; `domain` labels all prompts. Raises PromptError for a bad source."""
    return workloads_of(bench, question, read_all(sources, domain=domain))


def workloads_of(
    bench: Bench, question: Question, requests: Sequence[Request]
) -> tuple[list[tuple[Workload, tuple[Prompt, ...]]], list[str]]:
    """Every batch size and context as a workload with its prompts, and warnings.

    Prompts are cut to what the context leaves beside the new tokens; a context they do not fill shrinks to what they
    do, so that no row claims a length that was never run. Raises ModelError when a model has no room for
    a context and the longest speculation length, PromptError for prompts that cannot be used, InputError for a way to
    sample that the engine does wrongly with drafts.
    """
    target, longest = bench.loaded[0], max(question.lengths)
    room = min(loaded.max_positions for loaded in bench.loaded) - longest
    encoded = encode(requests, target.tokenizer)
    loads: dict[int, tuple[Prompt, ...]] = {}
    warnings: list[str] = []
    for context in question.contexts or (None,):
        _check_room(bench, question, context)
        most_tokens = (context or room) - question.max_new_tokens
        tokenized, notes = encoded.cut(most_tokens)
        warnings += notes
        needed = max(len(prompt.token_ids) for prompt in tokenized) + question.max_new_tokens
        fitting = min(room, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)
        if context is not None and context > fitting:
            warnings.append(f"context {context}: these prompts fill only {fitting} tokens, which is what is measured")
        loads[min(context or fitting, fitting)] = tuple(tokenized)
    ends = target.end_token_ids
    anchors = itertools.product(question.batch_sizes, loads.items())
    found = [(question.workload(context, ends, size), tokenized) for size, (context, tokenized) in anchors]
    objection = bench.engine.capabilities.objection(found[0][0], drafting=bool(bench.engine.drafts))
    if objection is not None:
        raise InputError(objection)
    return found, list(dict.fromkeys(warnings))


def _check_room(bench: Bench, question: Question, context: int | None) -> None:
    """Refuses a context, or where none is asked the output length, that some model has no positions for."""
    try:
        for loaded in bench.loaded:
            asked = context or question.max_new_tokens + 1
            loader.check_context(loaded, context_length=asked, max_length=max(question.lengths))
    except ModelError as error:
        if context is not None:
            raise
        raise ModelError(f"max-new-tokens {question.max_new_tokens} and a prompt: {error}") from error
