"""Turns requests into the token ids that a target reads. Loads no torch: the tokenizer is given."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from profiles.prompts.reader import Request, summarize_problems
from profiles.records.core import Prompt
from profiles.records.errors import PromptError

# Templates that print the date get this macro in place of the clock: a prompt is the same tomorrow.
_DATE_PARTS = {
    "%Y": "2025", "%y": "25", "%m": "01", "%d": "01", "%e": "1", "%B": "January", "%b": "Jan", "%A": "Wednesday",
    "%a": "Wed", "%j": "001", "%H": "12", "%I": "12", "%p": "PM", "%M": "00", "%S": "00", "%Z": "UTC", "%z": "+0000",
    "%F": "2025-01-01", "%T": "12:00:00",
}  # fmt: skip
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace({part!r}, {text!r})" for part, text in _DATE_PARTS.items())
    + " }}{% endmacro %}\n"
)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def __call__(self, text: str) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Requests as whole token sequences, by request; and what the user should be warned of."""

    domains: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    warnings: tuple[str, ...]

    def cut(self, max_tokens: int) -> tuple[list[Prompt], list[str]]:
        """Prompts of at most `max_tokens` tokens, without repeats, and all warnings; long ones lose their middle.

        Half is from the head, where the system prompt and what follows the start token are, half from the tail with
        the question, as in LongBench (Bai et al. 2023). Raises PromptError.
        """
        if max_tokens < 1:
            raise PromptError(f"{max_tokens} prompt tokens allowed: at least 1 is needed; raise the context length")
        unique: dict[str, Prompt] = {}
        head = max_tokens // 2
        for domain, token_ids in zip(self.domains, self.token_ids, strict=True):
            shortened = token_ids if len(token_ids) <= max_tokens else token_ids[:head] + token_ids[head - max_tokens :]
            prompt = Prompt(domain=domain, token_ids=shortened)
            unique.setdefault(prompt.digest, prompt)
        warnings, total = list(self.warnings), len(self.domains)
        if num_cut := sum(len(token_ids) > max_tokens for token_ids in self.token_ids):
            warnings.append(f"{num_cut} of {total} prompts were cut in their middle, to {max_tokens} tokens")
        if num_repeats := total - len(unique):
            warnings.append(f"{num_repeats} of {total} prompts repeat another one and were dropped")
        return list(unique.values()), warnings


def tokenize(
    requests: Sequence[Request], tokenizer: Tokenizer, max_tokens: int, *, vocab_size: int | None = None
) -> tuple[list[Prompt], list[str]]:
    """`encode` and `Encoded.cut` at once."""
    return encode(requests, tokenizer, vocab_size=vocab_size).cut(max_tokens)


def encode(requests: Sequence[Request], tokenizer: Tokenizer, *, vocab_size: int | None = None) -> Encoded:
    """The requests as the target reads them.

    Messages go through the chat template with the assistant's turn opened; without a template their texts are joined by
    blank lines. Dates in templates are fixed, so that a prompt is the same tomorrow. Prompts that the template refuses
    or of which it leaves out the text are skipped and named in the warnings. `vocab_size`: rows of the target's
    embedding; a prompt with a token beyond is skipped. Raises PromptError: no requests, or most of them cannot be used.
    """
    if not requests:
        raise PromptError("no prompts: at least 1 is needed")
    warnings = list(getattr(requests, "skipped", ()))
    domains, encoded, problems = [], [], []
    for number, request in enumerate(requests, start=1):
        try:
            token_ids = _token_ids(request, tokenizer)
            if vocab_size is not None and max(token_ids) >= vocab_size:
                raise PromptError(f"token {max(token_ids)} is beyond the {vocab_size} rows of the model's embedding")
        except PromptError as error:
            problems.append(f"prompt {number} (domain {request.domain!r}): {error}")
            continue
        domains.append(request.domain)
        encoded.append(tuple(token_ids))
    if problems:
        warnings.append(summarize_problems("", problems, len(encoded), "prompts"))
    return Encoded(domains=tuple(domains), token_ids=tuple(encoded), warnings=tuple(warnings))


def _token_ids(request: Request, tokenizer: Tokenizer) -> list[int]:
    """Raises PromptError without the prompt's name."""
    if isinstance(request.messages, str) or not tokenizer.chat_template:
        token_ids = list(tokenizer(request.text)["input_ids"])
    else:
        extras = request.extras or ({},) * len(request.messages)
        conversation = [
            {"role": role, "content": content, **extra}
            for (role, content), extra in zip(request.messages, extras, strict=True)
        ]
        text = _apply(tokenizer, conversation, request, tokenize=False)
        if not _holds(text, request):  # the template may read contents as lists of parts
            parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in conversation]
            with contextlib.suppress(PromptError):
                rendered = _apply(tokenizer, parts, request, tokenize=False)
                conversation, text = (parts, rendered) if _holds(rendered, request) else (conversation, text)
        if not _holds(text, request):
            raise PromptError("the chat template leaves out the text of its last message")
        token_ids = list(_apply(tokenizer, conversation, request, tokenize=True))
    if not token_ids:
        raise PromptError("no token is left of it; a prompt needs at least 1")
    return token_ids


def _apply(tokenizer: Tokenizer, conversation: list[dict[str, Any]], request: Request, *, tokenize: bool) -> Any:
    options: dict[str, Any] = {"tools": list(request.tools)} if request.tools else {}
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by use
        template = template.get("tool_use" if request.tools else "default", template.get("default"))
    if isinstance(template, str) and "strftime_now" in template:
        options["chat_template"] = _FIXED_DATE + template
    try:
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False, tokenize=tokenize, **options
        )
    except Exception as error:  # a template is a program that came with the model
        roles = ", ".join(message["role"] for message in conversation)
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise PromptError(f"the chat template refuses the roles {roles}: {detail}") from error


def _holds(rendered: str, request: Request) -> bool:
    """Whether the text of the last message is in the template's output, white space and JSON quoting aside."""
    wanted = request.messages[-1][1]
    forms = (wanted, json.dumps(wanted)[1:-1], json.dumps(wanted, ensure_ascii=False)[1:-1])
    squeezed = "".join(rendered.split())
    return any("".join(form.split()) in squeezed for form in forms)
