"""From prompts to workloads: batch sizes, contexts and the prompts of each, checked before any run."""

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
    do, so that no row claims a length that was never run. Raises: ModelError: a model has too few positions for a
    context and the longest speculation length. PromptError: no prompt can be used. InputError: the engine samples
    wrongly with drafts.
    """
    target = bench.loaded[0]
    max_context = min(loaded.max_positions for loaded in bench.loaded) - max(question.lengths)
    encoded = encode(requests, target.tokenizer, vocab_size=target.num_tokens)
    prompts_by_context: dict[int, tuple[Prompt, ...]] = {}
    warnings: list[str] = []
    for context in question.contexts or (None,):
        _check_context(bench, question, context)
        prompts, notes = encoded.cut((context or max_context) - question.max_new_tokens)
        warnings += notes
        needed = max(len(prompt.token_ids) for prompt in prompts) + question.max_new_tokens
        filled = min(max_context, -(-needed // CONTEXT_STEP) * CONTEXT_STEP)
        if context is not None and context > filled:
            warnings.append(f"context {context}: these prompts fill only {filled} tokens, which is what is measured")
        prompts_by_context[min(context or filled, filled)] = tuple(prompts)
    loads = [
        (question.workload(context, target.end_token_ids, batch_size), prompts)
        for batch_size, (context, prompts) in itertools.product(question.batch_sizes, prompts_by_context.items())
    ]
    objection = bench.engine.capabilities.objection(loads[0][0], drafting=bool(bench.engine.drafts))
    if objection is not None:
        raise InputError(objection)
    return loads, list(dict.fromkeys(warnings))


def _check_context(bench: Bench, question: Question, context: int | None) -> None:
    """Refuses a context, or where there is none the output length, that some model has no positions for."""
    try:
        for loaded in bench.loaded:
            context_length = context or question.max_new_tokens + 1
            loader.check_context(loaded, context_length=context_length, max_length=max(question.lengths))
    except ModelError as error:
        if context is not None:
            raise
        raise ModelError(f"max-new-tokens {question.max_new_tokens} and a prompt: {error}") from error
