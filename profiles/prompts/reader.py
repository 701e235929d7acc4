"""Reads prompt sets (files, standard input, built-in sets) into requests. Loads no torch."""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from profiles.builtin import ALL_PROMPTS, BUILTIN, BUILTIN_FOLDER
from profiles.prompts.rows import Row, read_rows, short
from profiles.records.errors import PromptError
from profiles.records.text import printable

Messages = tuple[tuple[str, str], ...]

PROMPTS_FOLDER = BUILTIN_FOLDER / "prompts"
_STDIN = "-"
_MAX_DOMAIN = 100  # characters
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one row asks for."""

    messages: Messages | str  # (role, text) pairs for the chat template, or raw text that no template touches
    domain: str
    extras: tuple[Mapping[str, Any], ...] = ()  # each message's further fields, such as `tool_calls`; () without any
    tools: tuple[Any, ...] = ()  # tool schemas for the template

    @property
    def text(self) -> str:
        """All texts, without a template."""
        if isinstance(self.messages, str):
            return self.messages
        return "\n\n".join(content for _, content in self.messages)


class Requests(list[Request]):
    """The requests of a prompt set, and one line for each source of which rows were skipped."""

    def __init__(self, requests: Iterable[Request] = (), skipped: Sequence[str] = ()) -> None:
        super().__init__(requests)
        self.skipped = list(skipped)


def read(source: str, *, domain: str | None = None) -> Requests:
    """The requests of a path, `builtin:NAME` (`builtin:all` for every built-in set) or `-` (standard input).

    The format is recognised by content: JSON lines, a JSON array, or plain text (one user message, or several between
    lines of `---`), in UTF-8. The first field present in a row counts: `messages` (OpenAI chat, with `tools`),
    `conversations` (ShareGPT), `turns` (Spec-Bench; the first is used), `prompt` (a user message), `text` (raw), or
    `body` (a line of an OpenAI batch file). A list of messages and a string are rows too. Assistant messages at the
    end are dropped: the target shall write them. Rows that cannot be used are skipped and named in
    `Requests.skipped`. `domain` labels all requests; without it the row's `domain` or `category`, else the file's stem.

    Raises PromptError: the source cannot be read, holds no prompt, or most of its rows cannot be used.
    """
    if domain is not None:
        domain = _clean_domain(domain)
        if not domain:
            raise PromptError("domain '': a name is needed")
    if source == _STDIN:
        if sys.stdin is None:
            raise PromptError("prompts from standard input: it is closed; pipe a file into it or name one")
        return _read_file(sys.stdin.buffer, "prompts from standard input", domain, Path("stdin"))
    paths = _builtin_paths(source) if source.startswith(BUILTIN) else [Path(source)]
    return _join(_read_path(path, domain) for path in paths)


def read_all(sources: Sequence[str], *, domain: str | None = None) -> Requests:
    """The requests of several sources, see `read`."""
    return _join(read(source, domain=domain) for source in sources)


def sample(requests: Sequence[Request], num_prompts: int, seed: int) -> Requests:
    """`num_prompts` of the requests in their order, as evenly over the domains as they allow, drawn with `seed`.

    Raises PromptError: fewer than one is asked for.
    """
    if num_prompts < 1:
        raise PromptError(f"num-prompts {num_prompts}: at least 1 is needed")
    by_domain: dict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        by_domain[request.domain].append(index)
    for name, indices in by_domain.items():
        random.Random(f"{seed}/{name}").shuffle(indices)
    ranked = sorted((rank, index) for indices in by_domain.values() for rank, index in enumerate(indices))
    chosen = sorted(index for _, index in ranked[:num_prompts])
    return Requests((requests[index] for index in chosen), getattr(requests, "skipped", ()))


def user_text(request: Request) -> str:
    """What the user wrote last, as serving code has it at hand: no template, no system prompt, no earlier turns."""
    if isinstance(request.messages, str):
        return request.messages
    return next((content for role, content in reversed(request.messages) if role == "user"), request.text)


def _join(parts: Iterable[Requests]) -> Requests:
    joined = Requests()
    for part in parts:
        joined += part
        joined.skipped += part.skipped
    return joined


def _builtin_paths(source: str) -> list[Path]:
    paths = {path.stem: path for path in sorted(PROMPTS_FOLDER.glob("*.jsonl"))}
    if source == ALL_PROMPTS and paths:
        return list(paths.values())
    name = source.removeprefix(BUILTIN)
    if name not in paths:
        names = [*(BUILTIN + stem for stem in paths), ALL_PROMPTS] if paths else ["none, no set is installed"]
        raise PromptError(f"prompts {source!r}: no built-in set of that name; allowed are {', '.join(names)}")
    return [paths[name]]


def _read_path(path: Path, domain: str | None) -> Requests:
    where = f"prompts {str(path)!r}"
    if path.is_dir():
        raise PromptError(f"{where}: a directory; name a file")
    try:
        with path.open("rb") as file:
            return _read_file(file, where, domain, path)
    except OSError as error:
        reason = error.strerror or error
        raise PromptError(f"{where}: {reason}; allowed are readable files, {BUILTIN}NAME and -") from error


def _read_file(file: BinaryIO, where: str, domain: str | None, path: Path) -> Requests:
    ending = None if path == Path("stdin") else path.suffix.lower()
    requests, problems = Requests(), []
    for row in read_rows(file, where, ending):
        try:
            requests.append(_request(row, domain, path.stem))
        except PromptError as problem:
            problems.append(f"{row.position}: {problem}")
    if not requests and not problems:
        raise PromptError(f"{where}: it holds no prompts; at least 1 is needed")
    if problems:
        requests.skipped.append(summarize_problems(f"{where}: ", problems, len(requests), "rows"))
    return requests


def summarize_problems(prefix: str, problems: Sequence[str], num_good: int, noun: str) -> str:
    """One line of how many were skipped, with the first three reasons. Raises PromptError when most are bad."""
    reasons = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    count = f"{prefix}{len(problems)} of {len(problems) + num_good} {noun} cannot be used"
    if len(problems) > num_good:
        raise PromptError(f"{count}: {reasons}")
    return f"{count} and were skipped: {reasons}"


def _request(row: Row, domain: str | None, default_domain: str) -> Request:
    if row.problem is not None:
        raise PromptError(row.problem)
    value = row.value
    if isinstance(value, str):
        value = {"prompt": value}
    elif isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise PromptError(f"{short(value)} is not an object with one of the fields {', '.join(_FIELDS)}")
    if isinstance(value.get("body"), dict):  # a line of an OpenAI batch file
        body = value["body"]
        value = {"prompt": body.get("input"), **body}  # `input` in a batch of the Responses API
    field = next((name for name in _FIELDS if value.get(name) is not None), None)
    if field is None:
        raise PromptError(f"fields {', '.join(map(short, value)) or 'none'}; one of {', '.join(_FIELDS)} is needed")
    try:
        messages, extras = _FIELDS[field](value[field])
    except PromptError as problem:
        raise PromptError(f"field {field!r}: {problem}") from problem
    if not (messages if isinstance(messages, str) else messages[-1][1]).strip() and not (extras and extras[-1]):
        raise PromptError(f"field {field!r}: an empty prompt")
    tools = value.get("tools")
    return Request(
        messages=messages,
        domain=domain or _row_domain(value) or default_domain,
        extras=extras if any(extras) else (),
        tools=tuple(tools) if isinstance(tools, list) else (),
    )


def _row_domain(row: Mapping[str, Any]) -> str:
    """The row's label, empty where it has none that can be one."""
    labels = (row.get(name) for name in ("domain", "category"))
    return next((_clean_domain(str(label)) for label in labels if isinstance(label, str | int | float)), "")


def _clean_domain(text: str) -> str:
    """One line without characters that cannot be shown: domains end up in files, pages and terminals."""
    return " ".join(printable(text).split())[:_MAX_DOMAIN]


def _text(value: object) -> str:
    """A text, or the texts of a list of OpenAI content parts."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        value = "\n".join(map(_part_text, value))
    if not isinstance(value, str):
        raise PromptError(f"{short(value)} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise PromptError(f"{short(value)} is not valid Unicode at character {error.start}") from error
    return value


def _part_text(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if part.get("type", "text") not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise PromptError(f"a content part of type {short(part.get('type'))} is not text")
    return text


Parsed = tuple[Messages | str, tuple[Mapping[str, Any], ...]]


def _chat(value: object) -> Parsed:
    """Messages of OpenAI (role, content) or ShareGPT (from, value), up to what the assistant shall write next."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise PromptError(f"{short(value)} is not a list of messages")
    conversation = [(number, message, _role(message, number)) for number, message in enumerate(value, start=1)]
    while conversation and conversation[-1][2] == "assistant":
        conversation.pop()
    if not conversation:
        raise PromptError("nothing is asked in it; at least 1 user message is needed")
    messages, extras = [], []
    for number, message, role in conversation:
        content = message.get("content", message.get("value"))
        extra = {name: field for name, field in message.items() if name not in ("role", "content") and field}
        if "role" not in message:  # ShareGPT's other fields are no business of the template
            extra = {}
        if content is None and extra.get("tool_calls"):
            content = ""
        try:
            messages.append((role, _text(content)))
        except PromptError as problem:
            raise PromptError(f"message {number}: {problem}") from problem
        if isinstance(extra.get("tool_calls"), list):
            extra["tool_calls"] = [_with_parsed_arguments(call) for call in extra["tool_calls"]]
        extras.append(extra)
    return tuple(messages), tuple(extras)


def _role(message: Mapping[str, Any], number: int) -> str:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise PromptError(f"message {number}: {short(message)} has no 'role' or 'from'")
    if "role" in message:
        return role
    if role not in _SHAREGPT_ROLES:
        raise PromptError(f"message {number}: sender {short(role)}; allowed are {', '.join(_SHAREGPT_ROLES)}")
    return _SHAREGPT_ROLES[role]


def _with_parsed_arguments(call: object) -> object:
    """A tool call with its arguments as an object, as templates expect them: OpenAI sends them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}  # type: ignore[dict-item]


def _prompt(value: object) -> Parsed:
    """A user message, or a list of messages."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        return _chat(value)
    return (("user", _text(value)),), ()


def _first_turn(value: object) -> Parsed:
    if not isinstance(value, list) or not value:
        raise PromptError(f"{short(value)} is not a list of one text or more")
    return (("user", _text(value[0])),), ()


_FIELDS: dict[str, Callable[[object], Parsed]] = {
    "messages": _chat,
    "conversations": _chat,
    "turns": _first_turn,
    "prompt": _prompt,
    "text": lambda value: (_text(value), ()),
}
