"""Splits a prompt file into rows: JSON lines, one JSON document or plain text, recognised by content."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from profiles.records.errors import PromptError
from profiles.records.text import shortened

ENDINGS = (".jsonl", ".json", ".txt")
_SEPARATOR = "---"
_MAX_BYTES = 1 << 30
_ROW_LISTS = ("data", "rows", "prompts", "examples")  # keys under which a single object may hold its rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: `position` within the file (`line 3`), and its JSON value or the reason why there is none."""

    position: str
    value: object = None
    problem: str | None = None


def read_rows(file: BinaryIO, where: str, ending: str | None) -> Iterator[Row]:
    """The rows of a prompt file.

    A file that is a JSON document or begins with a line of JSON holds JSON. Anything else is plain text: one prompt, or
    several between lines of `---`. The name's `ending`, None for standard input, decides where the content does not.
    Raises PromptError: a too large file or one that is not UTF-8, or an unknown ending of one that is not JSON.
    """
    text = _decode(file, where)
    start = text.strip()
    document, first = (_parse(part, "").value for part in (start, start.partition("\n")[0]))
    if isinstance(document, list | dict):
        return _document_rows(document)
    is_json = isinstance(first, list | dict) or (start.startswith("{") and ending != ".txt")
    if is_json or ending in (".jsonl", ".json"):
        # `splitlines` would also cut inside JSON strings
        lines = enumerate(text.split("\n"), start=1)
        return (_parse(line, f"line {number}") for number, line in lines if line.strip())
    if ending not in (None, ".txt") and start:
        raise PromptError(f"{where}: no JSON, and the ending {ending!r} is unknown; allowed are {', '.join(ENDINGS)}")
    return _texts(text)


def _decode(file: BinaryIO, where: str) -> str:
    raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise PromptError(f"{where}: more than {_MAX_BYTES >> 20} MiB; use a part of it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = f"line {raw.count(10, 0, error.start) + 1}: byte {raw[error.start]:#04x}"
        raise PromptError(f"{where} {position} is not UTF-8 text; unpack it, or save it as UTF-8") from error


def _document_rows(document: list[object] | dict[str, object]) -> Iterator[Row]:
    """The rows of one JSON document; an array of messages is one row."""
    rows: Any = document
    if isinstance(document, dict):
        rows = next((document[key] for key in _ROW_LISTS if isinstance(document.get(key), list)), None)
        if rows is None:
            return iter([Row(position="line 1", value=document)])
    if rows and all(isinstance(row, dict) and "role" in row for row in rows):
        rows = [rows]
    return (Row(position=f"row {number}", value=row) for number, row in enumerate(rows, start=1))


def _texts(text: str) -> Iterator[Row]:
    texts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == _SEPARATOR:
            texts.append([])
        else:
            texts[-1].append(line)
    prompts = ("\n".join(lines).strip() for lines in texts)
    numbered = enumerate(prompts, start=1)
    return (Row(position=f"text {number}", value={"prompt": prompt}) for number, prompt in numbered if prompt)


def _parse(text: str, position: str) -> Row:
    try:
        return Row(position=position, value=json.loads(text))
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, thousands of brackets
        reason = str(error).partition("\n")[0][:100]
        return Row(position=position, problem=f"not JSON ({reason}): {short(text)}")


def short(value: object) -> str:
    """The value on one line, 60 characters at most."""
    return shortened(repr(value))
