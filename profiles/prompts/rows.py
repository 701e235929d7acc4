"""Splits a prompt file into rows: JSON lines, a JSON array or plain text, recognised by content."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from profiles.records.errors import PromptError
from profiles.records.text import shortened

ENDINGS = (".jsonl", ".json", ".txt")
_SEPARATOR = "---"
_MAX_BYTES = 1 << 30
_ROW_LISTS = ("data", "rows", "prompts", "examples")  # keys under which a single object may hold its rows
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")  # gzip, zip, zstd, bzip2, xz
_CONTROLS = bytes({*range(9), *range(14, 32)} - {27})  # random bytes hold 10 % of them
_BETWEEN = (" ", "\t", "\r", "\n", ",")
_BAD_BYTES = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: `position` within the file (`line 3`), and its JSON value or the reason why there is none."""

    position: str
    value: object = None
    problem: str | None = None


def read_rows(file: BinaryIO, where: str, ending: str | None) -> Iterator[Row]:
    """The rows of a prompt file.

    A file that begins with a JSON value holds JSON: one value per line, or one array. Anything else is plain text: one
    prompt, or several between lines of `---`. The name's `ending`, None for standard input, decides where the content
    does not. Raises PromptError: a binary, too large or not UTF-8 file, or an unknown ending of one that is not JSON.
    """
    text = _decode(file, where)
    is_json = _begins_with_json(text.lstrip()) or ending in (".jsonl", ".json")
    if is_json or (text.lstrip().startswith("{") and ending != ".txt"):  # JSON lines of which the first is broken
        return _json_rows(text)
    if ending not in (None, ".txt") and text.strip():
        raise PromptError(f"{where}: no JSON, and the ending {ending!r} is unknown; allowed are {', '.join(ENDINGS)}")
    return _texts(text, where)


def _decode(file: BinaryIO, where: str) -> str:
    """The file's text; bytes that are not UTF-8 become lone surrogates."""
    raw = file.read(4096)
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "")
    if raw.startswith(_COMPRESSED):
        raise PromptError(f"{where}: a compressed file; unpack it first")
    if not encoding and 20 * (len(raw) - len(raw.translate(None, _CONTROLS))) > len(raw):
        raise PromptError(f"{where}: a binary file; text is needed")
    raw += file.read(_MAX_BYTES)
    if len(raw) > _MAX_BYTES:
        raise PromptError(f"{where}: more than {_MAX_BYTES >> 20} MiB; use a part of it")
    return raw.decode(encoding, "replace") if encoding else raw.decode("utf-8-sig", "surrogateescape")


def _begins_with_json(text: str) -> bool:
    """Whether the text begins with an object or array."""
    try:
        return text.startswith(("{", "[")) and bool(_DECODER.raw_decode(text))
    except (ValueError, RecursionError):
        return False


def _json_rows(text: str) -> Iterator[Row]:
    first_line, _, more = text.lstrip().partition("\n")
    if more.strip() and _parse(first_line, "").problem is None:
        return _lines(text)
    if first_line.startswith("["):
        return _array(text)
    document = _parse(text, "line 1").value
    if not isinstance(document, dict):
        return _lines(text)
    rows = next((document[key] for key in _ROW_LISTS if isinstance(document.get(key), list)), None)
    if rows is None:
        return iter([Row(position="line 1", value=document)])
    return (Row(position=f"row {number}", value=row) for number, row in enumerate(rows, start=1))


def _lines(text: str) -> Iterator[Row]:
    """One JSON value per line; `splitlines` would also cut inside JSON strings."""
    return (_parse(line, f"line {number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _array(text: str) -> Iterator[Row]:
    """The elements of one JSON array as far as they can be read; an array of messages is one row."""
    start, number = text.index("[") + 1, 1
    messages: list[object] = []
    while True:
        while text[start : start + 1] in _BETWEEN:
            start += 1
        if text.startswith("]", start):
            if text[start + 1 :].strip():
                yield Row(position=f"row {number}", problem="text behind the array is not read")
            break
        try:
            value, start = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            problem = f"not JSON from here on ({_first_line(error)}): {short(text[start : start + 80])}"
            yield Row(position=f"row {number}", problem=problem)
            break
        if isinstance(value, dict) and "role" in value and len(messages) == number - 1:
            messages.append(value)
        else:
            yield Row(position=f"row {number}", value=value)
        number += 1
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
    return shortened(repr(value))
