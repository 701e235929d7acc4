"""Splits a prompt file into rows: JSON lines, a JSON array or plain text, recognised by content and streamed."""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

from profiles.records.errors import PromptError

ENDINGS = (".jsonl", ".json", ".txt")
_SEPARATOR = "---"
_CHUNK = 1 << 20  # bytes
_MAX_ROW = 1 << 24  # characters
_MAX_TOTAL = 1 << 30  # characters of one file
_ROW_LISTS = ("data", "rows", "prompts", "examples")  # keys under which a single object may hold its rows
_BETWEEN = (" ", "\t", "\r", "\n", ",")
_BAD_BYTES = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: `position` within the file (`line 3`), and its JSON value or the reason why there is none."""

    position: str
    value: object = None
    problem: str | None = None


def read_rows(file: BinaryIO, where: str, ending: str | None) -> Iterator[Row]:
    """The rows of a prompt file.

    A file that begins with a JSON value holds JSON: one value per line, or one array. Anything else is plain text: one
    prompt, or several between lines of `---`.

    Args:
        where: How error messages begin.
        ending: The file name's ending, None for standard input. It decides where the content does not.

    Raises:
        PromptError: A binary file, text that is not UTF-8, an unknown ending of a file that is not JSON, or a file or
            row that is too large.
    """
    chunks = _decode(file, where)
    head = next(chunks)
    while not head.strip() and (chunk := next(chunks, "")):
        head += chunk
    is_json = _begins_with_json(head) or ending in (".jsonl", ".json")
    if not is_json and head.lstrip().startswith("{") and ending != ".txt":
        is_json = True  # JSON lines of which the first is broken
    if is_json:
        return _json_rows(head, chunks, where)
    if ending not in (None, ".txt"):
        raise PromptError(f"{where}: no JSON, and the ending {ending!r} is unknown; allowed are {', '.join(ENDINGS)}")
    return _texts("".join([head, *chunks]), where)


def _decode(file: BinaryIO, where: str) -> Iterator[str]:
    """The text in chunks, at least one; bytes that are not UTF-8 become lone surrogates."""
    raw, total = file.read(_CHUNK), 0
    is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in raw[:4096] and not is_utf16:
        raise PromptError(f"{where}: a binary file; text is needed")
    encoding, errors = ("utf-16", "replace") if is_utf16 else ("utf-8-sig", "surrogateescape")
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    while raw:
        text = decoder.decode(raw)
        total += len(text)
        if total > _MAX_TOTAL:
            raise PromptError(f"{where}: more than {_MAX_TOTAL >> 20} Mi characters; use a part of it")
        yield text
        raw = file.read(_CHUNK)
    yield decoder.decode(b"", final=True)


def _begins_with_json(text: str) -> bool:
    """Whether the text begins with an object or array, as far as its first chunk tells."""
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return len(text) >= _CHUNK // 4 and error.pos > len(text) // 2  # the chunk ends within a long value
    except (ValueError, RecursionError):
        return False
    return True


def _json_rows(head: str, chunks: Iterator[str], where: str) -> Iterator[Row]:
    first_line, newline, more = head.lstrip().partition("\n")
    if newline and more.strip() and _parse(first_line, "").problem is None:
        return _lines(chain([head], chunks), where)
    if head.lstrip().startswith("["):
        return _array(chain([head], chunks), where)
    text = "".join([head, *chunks])
    document = _parse(text, "line 1").value
    if not isinstance(document, dict):
        return _lines(iter([text]), where)
    rows = next((document[key] for key in _ROW_LISTS if isinstance(document.get(key), list)), None)
    if rows is None:
        return iter([Row(position="line 1", value=document)])
    return (Row(position=f"row {number}", value=row) for number, row in enumerate(rows, start=1))


def _lines(chunks: Iterator[str], where: str) -> Iterator[Row]:
    """One JSON value per line."""
    rest, number = "", 0
    for chunk in chain(chunks, ["\n"]):
        *lines, rest = (rest + chunk).split("\n")  # splitlines would also cut inside JSON strings
        for line in lines:
            number += 1
            if line.strip():
                yield _parse(line, f"line {number}")
        if len(rest) > _MAX_ROW:
            raise PromptError(f"{where} line {number + 1}: more than {_MAX_ROW >> 20} Mi characters")


def _array(chunks: Iterator[str], where: str) -> Iterator[Row]:
    """The elements of one JSON array; an array of messages is one row."""
    decoder, buffer, number = json.JSONDecoder(), next(chunks), 0
    start = buffer.index("[") + 1
    messages: list[object] = []
    while True:
        while buffer[start : start + 1] in _BETWEEN:
            start += 1
        if buffer[start : start + 1] == "]":
            if (buffer[start + 1 :] + next(chunks, "")).strip():
                yield Row(position=f"row {number + 1}", problem="text behind the array is not read")
            break
        try:
            value, end = decoder.raw_decode(buffer, start)
        except (ValueError, RecursionError) as error:
            chunk = next(chunks, "") if isinstance(error, json.JSONDecodeError) else ""
            if not chunk:
                problem = f"not JSON from here on ({_first_line(error)}): {short(buffer[start : start + 80])}"
                yield Row(position=f"row {number + 1}", problem=problem)
                break
            if len(buffer) - start > _MAX_ROW:
                raise PromptError(f"{where} row {number + 1}: more than {_MAX_ROW >> 20} Mi characters") from error
            buffer, start = buffer[start:] + chunk, 0
            continue
        number, start = number + 1, end
        if isinstance(value, dict) and "role" in value and len(messages) == number - 1:
            messages.append(value)
        else:
            yield Row(position=f"row {number}", value=value)
    if messages:
        yield Row(position="row 1", value=messages)


def _texts(text: str, where: str) -> Iterator[Row]:
    if bad := _BAD_BYTES.search(text):
        number = text.count("\n", 0, bad.start()) + 1
        raise PromptError(f"{where} line {number}: {_bad_byte(bad)}; save it as UTF-8")
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == _SEPARATOR:
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    texts = ["\n".join(lines).strip() for lines in paragraphs]
    return (
        Row(position=f"text {number}", value={"prompt": each}) for number, each in enumerate(texts, start=1) if each
    )


def _parse(text: str, position: str) -> Row:
    if bad := _BAD_BYTES.search(text):
        return Row(position=position, problem=f"{_bad_byte(bad)}; save it as UTF-8")
    try:
        return Row(position=position, value=json.loads(text))
    except json.JSONDecodeError as error:
        return Row(position=position, problem=f"not JSON ({error.msg} at column {error.colno}): {short(text)}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return Row(position=position, problem=f"JSON that cannot be read ({_first_line(error)}): {short(text)}")


def _bad_byte(match: re.Match[str]) -> str:
    return f"byte {ord(match[0]) - 0xDC00:#04x} is not UTF-8"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:100]


def short(value: object) -> str:
    """The value on one line, 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
