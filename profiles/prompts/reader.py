"""Reads prompt sets and turns them into the token ids a target reads.

Chat JSONL, JSON or plain text, from files, standard input or the sets that ship. Knows no model: a tokenizer is
whatever encodes text and applies a chat template, so this module loads no torch.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2

from profiles.builtin import ALL_PROMPTS, BUILTIN, BUILTIN_FOLDER
from profiles.records.core import Prompt
from profiles.records.errors import PromptError

Messages = tuple[tuple[str, str], ...]

PROMPTS_FOLDER = BUILTIN_FOLDER / "prompts"
_STDIN = "-"
_SEPARATOR = "---"
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# A prompt reads like random tokens when hardly any of its first tokens is a repeat; short prompts are not judged. Text
# repeats more than twice as much, whatever the vocabulary. A small vocabulary hides random tokens: decoded and read
# again they fall into short pieces that repeat.
_JUDGED_FROM, _JUDGED_UP_TO, _LEAST_REPEATS = 96, 256, 0.06


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def __call__(self, text: str) -> Mapping[str, Any]: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a prompt file asks: (role, content) messages for the chat template, or raw text that no template touches."""

    messages: Messages | str
    domain: str


def read(source: str, *, domain: str | None = None) -> list[Request]:
    """The requests of `source`; `domain` labels them all, else the row's field does, else the file's stem.

    `source` is a path, `builtin:NAME` (`builtin:all` for every built-in set) or `-` (standard input), UTF-8:

    * `.jsonl`, one object a line, or `.json`, an array of such objects. The first field present counts: `messages`
      (role, content), `conversations` (ShareGPT: from, value), `turns` (Spec-Bench: the first is taken), `prompt` (a
      user message), `text` (raw). Assistant messages at the end are dropped: they are what the target shall write.
      The domain is in `domain` or `category`.
    * `.txt`: the whole file is one user message; lines that are just `---` separate several.
    * `-`: read as `.jsonl` when its first character that is not blank is `{`, else as `.txt`; its stem is `stdin`.

    Raises: PromptError: the source cannot be read or a row cannot be used; names file, line and value.
    """
    if domain is not None:
        domain = domain.strip()
        if not domain:
            raise PromptError("domain '': a name is needed")
    if source == _STDIN:
        return _read_stdin(domain)
    paths = _builtin_paths(source) if source.startswith(BUILTIN) else [Path(source)]
    return [request for path in paths for request in _read_file(path, domain)]


def tokenize(requests: Sequence[Request], tokenizer: Tokenizer, most_tokens: int) -> tuple[list[Prompt], list[str]]:
    """The prompts as the target reads them, without repeats, and what the user should be warned of.

    Messages go through the chat template, the assistant's turn opened; without a template their contents are joined
    by blank lines. Of a longer prompt the last `most_tokens` tokens are kept: the question and the template's end.

    Raises: PromptError: no requests, no room, a prompt that the template refuses or that has no token.
    """
    if not requests:
        raise PromptError("no prompts: at least 1 is needed")
    if most_tokens < 1:
        raise PromptError(f"room for {most_tokens} prompt tokens: at least 1 is needed; raise the context length")
    unique: dict[str, Prompt] = {}
    num_cut = num_random = 0
    for number, request in enumerate(requests, start=1):
        token_ids = _token_ids(request, tokenizer, f"prompt {number} (domain {request.domain!r})")
        num_cut += len(token_ids) > most_tokens
        num_random += _looks_random(tokenizer(_text(request))["input_ids"])
        prompt = Prompt(domain=request.domain, token_ids=tuple(token_ids[-most_tokens:]))
        unique.setdefault(prompt.digest, prompt)
    warnings = []
    if num_cut:
        warnings.append(f"{num_cut} of {len(requests)} prompts were cut to their last {most_tokens} tokens")
    if num_repeats := len(requests) - len(unique):
        warnings.append(f"{num_repeats} of {len(requests)} prompts repeat another one and were dropped")
    if num_random:
        warnings.append(
            f"{num_random} of {len(requests)} prompts read like random tokens, of which hardly any comes twice: what "
            "drafts reach on them says nothing about text"
        )
    return list(unique.values()), warnings


def user_text(request: Request) -> str:
    """What the user wrote last, as serving code has it at hand: no template, no system prompt, no earlier turns."""
    if isinstance(request.messages, str):
        return request.messages
    return next((content for role, content in reversed(request.messages) if role == "user"), _text(request))


def _looks_random(token_ids: Sequence[int]) -> bool:
    judged = token_ids[:_JUDGED_UP_TO]
    return len(judged) >= _JUDGED_FROM and 1.0 - len(set(judged)) / len(judged) < _LEAST_REPEATS


def _text(request: Request) -> str:
    """What is asked without a template, whose own tokens come again in every message."""
    if isinstance(request.messages, str):
        return request.messages
    return "\n\n".join(content for _, content in request.messages)


def _token_ids(request: Request, tokenizer: Tokenizer, where: str) -> list[int]:
    messages = request.messages
    if isinstance(messages, str) or not tokenizer.chat_template:
        token_ids = list(tokenizer(_text(request))["input_ids"])
    else:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            token_ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        except (jinja2.TemplateError, ValueError, TypeError, LookupError) as error:
            roles = ", ".join(role for role, _ in messages)
            detail = " ".join(str(error).split())
            raise PromptError(f"{where}: the chat template refuses the roles {roles}: {detail}") from error
    if not token_ids:
        raise PromptError(f"{where}: no token is left of it; a prompt needs at least 1")
    return token_ids


def _builtin_paths(source: str) -> list[Path]:
    known = {path.stem: path for path in sorted(PROMPTS_FOLDER.glob("*.jsonl"))}
    name = source.removeprefix(BUILTIN)
    if source == ALL_PROMPTS and known:
        return list(known.values())
    if name not in known:
        allowed = (
            ", ".join([*(BUILTIN + stem for stem in known), ALL_PROMPTS]) if known else "none, no set is installed"
        )
        raise PromptError(f"prompts {source!r}: no built-in set of that name; allowed are {allowed}")
    return [known[name]]


def _read_file(path: Path, domain: str | None) -> list[Request]:
    """Checks in the order a user would: is it there, of a known kind, text, and does it hold a prompt."""
    where = f"prompts {str(path)!r}"
    if path.is_dir():
        raise PromptError(f"{where}: a directory; allowed are files ending in {', '.join(_READERS)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PromptError(
            f"{where}: {error.strerror or error}; allowed are readable files, {BUILTIN}NAME and -"
        ) from error
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{where}: ending {path.suffix!r} is not known; allowed are {', '.join(_READERS)}")
    rows = reader(_decode(raw, where), where)
    return _requests(rows, where, domain, path.stem)


def _read_stdin(domain: str | None) -> list[Request]:
    where = "prompts from standard input"
    if sys.stdin is None:
        raise PromptError(f"{where}: it is closed; pipe a file into it or name one")
    text = _decode(sys.stdin.buffer.read(), where)
    reader = _json_lines if text.lstrip().startswith("{") else _texts
    return _requests(reader(text, where), where, domain, "stdin")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PromptError(
            f"{where} line {line}: byte {raw[error.start]:#04x} is not UTF-8; save it as UTF-8"
        ) from error


def _requests(rows: Iterator[tuple[str, object]], where: str, domain: str | None, stem: str) -> list[Request]:
    requests = [_request(row, place, domain or stem, domain is None) for place, row in rows]
    if not requests:
        raise PromptError(f"{where}: it holds no prompts; at least 1 is needed")
    return requests


def _json_lines(text: str, where: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut inside JSON strings
        if line.strip():
            yield f"{where} line {number}", _parse(line, f"{where} line {number}")


def _json_rows(text: str, where: str) -> Iterator[tuple[str, object]]:
    if not text.strip():
        return
    rows = _parse(text, where)
    if not isinstance(rows, list):
        raise PromptError(f"{where}: {_short(rows)} is not an array of objects; one object a line is .jsonl")
    yield from ((f"{where} row {number}", row) for number, row in enumerate(rows, start=1))


def _texts(text: str, where: str) -> Iterator[tuple[str, object]]:
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == _SEPARATOR:
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    texts = ["\n".join(lines).strip() for lines in paragraphs]
    yield from ((f"{where} text {number}", {"prompt": found}) for number, found in enumerate(texts, start=1) if found)


_READERS: dict[str, Callable[[str, str], Iterator[tuple[str, object]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_rows,
    ".txt": _texts,
}


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise PromptError(f"{where}: not JSON ({error.msg} at {place}): {_short(text)}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise PromptError(f"{where}: JSON that cannot be read ({error}): {_short(text)}") from error


def _request(row: object, where: str, domain: str, own_domain: bool) -> Request:
    """One row as a request; `own_domain` lets the row's own field name the domain."""
    if not isinstance(row, dict):
        raise PromptError(f"{where}: {_short(row)} is not an object with one of the fields {', '.join(_FIELDS)}")
    field = next((name for name in _FIELDS if row.get(name) is not None), None)
    if field is None:
        have = ", ".join(map(_short, row)) or "none"
        raise PromptError(f"{where}: fields {have}; one of {', '.join(_FIELDS)} is needed")
    messages = _FIELDS[field](row[field], f"{where}: field {field!r}")
    if not (messages if isinstance(messages, str) else messages[-1][1]).strip():
        raise PromptError(f"{where}: field {field!r} holds an empty prompt; text is needed")
    named = next((name for name in ("domain", "category") if own_domain and row.get(name) is not None), None)
    if named is not None:
        domain = _string(row[named], f"{where}: field {named!r}").strip()
        if not domain:
            raise PromptError(f"{where}: field {named!r} is empty; a name is needed")
    return Request(messages=messages, domain=domain)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where}: {_short(value)} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise PromptError(f"{where}: {_short(value)} is not valid Unicode at character {error.start}") from error
    return value


def _user_message(value: object, where: str) -> Messages:
    return (("user", _string(value, where)),)


def _first_turn(value: object, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise PromptError(f"{where}: {_short(value)} is not a list of one text or more")
    return _user_message(value[0], where)


def _conversation(value: object, where: str, role_key: str, text_key: str) -> Messages:
    """The (role, content) pairs of a list of objects, up to what the assistant shall write next."""
    if not isinstance(value, list):
        raise PromptError(f"{where}: {_short(value)} is not a list of objects with {role_key!r} and {text_key!r}")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise PromptError(f"{where} message {number}: {_short(message)} has no {role_key!r} and {text_key!r}")
        place = f"{where} message {number}"
        messages.append((_string(message[role_key], place), _string(message[text_key], place)))
    while messages and messages[-1][0] in ("assistant", "gpt"):
        messages.pop()
    if not messages:
        raise PromptError(f"{where}: nothing is asked in it; at least 1 user message is needed")
    return tuple(messages)


def _chat(value: object, where: str) -> Messages:
    return _conversation(value, where, "role", "content")


def _sharegpt(value: object, where: str) -> Messages:
    messages = _conversation(value, where, "from", "value")
    for role, _ in messages:
        if role not in _SHAREGPT_ROLES:
            raise PromptError(f"{where}: sender {_short(role)}; allowed are {', '.join(_SHAREGPT_ROLES)}")
    return tuple((_SHAREGPT_ROLES[role], content) for role, content in messages)


_FIELDS: dict[str, Callable[[object, str], Messages | str]] = {
    "messages": _chat,
    "conversations": _sharegpt,
    "turns": _first_turn,
    "prompt": _user_message,
    "text": _string,
}


def _short(value: object) -> str:
    """The value's spelling on one line, 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
