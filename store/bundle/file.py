"""The file a bundle is: a line with its checksum, then compressed JSON lines, read so that no stranger's file can harm.

The checksum covers every byte behind it and is compared before anything is unpacked; sizes, nesting, numbers and text
are bounded on the way. What the rows mean it must not know.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from profiles.records.errors import InputError
from profiles.records.files import open_file, write_atomically

FORMAT = "draftpick-bundle"
VERSION = 1  # 1: the first form
MOST_PACKED_BYTES, MOST_BYTES, MOST_LINE_BYTES = 2**28, 2**29, 2**23
MOST_ROWS, MOST_NESTED, MOST_DIGITS = 1_000_000, 32, 18
FIRST_LINE = re.compile(rb"draftpick-bundle ([1-9][0-9]{0,3}) ([0-9a-f]{64})\n")
LONGEST_FIRST_LINE = 100
BRACKETS = re.compile(rb'[\[{\]}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
PIECE_BYTES = 65_536


def write(path: Path, header: Mapping[str, Any], lines: Iterable[bytes]) -> None:
    """Writes header and lines as one file; the same content gives the same bytes. Raises InputError."""
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", compresslevel=6, mtime=0) as body:
        body.write(line_of(header) + b"\n")
        for line in lines:
            body.write(line + b"\n")
    content = packed.getvalue()
    if len(content) > MOST_PACKED_BYTES:
        raise InputError(f"{path} would have {len(content)} bytes: {MOST_PACKED_BYTES} are allowed; pack fewer targets")
    first = f"{FORMAT} {VERSION} {hashlib.sha256(content).hexdigest()}\n"
    replace(path, first.encode() + content)


def replace(path: Path, data: bytes) -> None:
    """Replaces a file in one step. Raises InputError."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def line_of(value: Any) -> bytes:
    """The one spelling of a JSON value in a bundle."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Reading:
    """An open bundle whose checksum was right: `sha256`, `header`, and the lines behind it, once.

    Raises InputError: not a bundle, a newer one, damaged, or beyond a limit.
    """

    def __init__(self, file: BinaryIO) -> None:
        first = file.readline(LONGEST_FIRST_LINE)
        found = FIRST_LINE.fullmatch(first)
        if found is None:
            raise InputError("it does not begin like a bundle: not one, or damaged")
        version = int(found[1])
        if version > VERSION:
            raise InputError(f"bundle version {version} is newer than version {VERSION}, which is read here: upgrade")
        self.packed_bytes = os.fstat(file.fileno()).st_size
        if self.packed_bytes > MOST_PACKED_BYTES:
            raise InputError(f"it has {self.packed_bytes} bytes: {MOST_PACKED_BYTES} are allowed")
        self.sha256 = found[2].decode()
        self.unpacked_bytes = 0
        self._file = file
        self._check_sum(len(first))
        self._lines = self._unpacked_lines()
        header = strictly_parsed(next(self._lines, b""))
        if not isinstance(header, dict):
            raise InputError("its first line is not an object")
        self.header: dict[str, Any] = header

    def rows(self) -> Iterator[Any]:
        """The JSON value of every line behind the header."""
        for number, line in enumerate(self._lines, start=1):
            if number > MOST_ROWS:
                raise InputError(f"it has more than the {MOST_ROWS} rows that are allowed")
            yield strictly_parsed(line)

    def _check_sum(self, start: int) -> None:
        digest = hashlib.sha256()
        while piece := self._file.read(PIECE_BYTES):
            digest.update(piece)
        if digest.hexdigest() != self.sha256:
            raise InputError(
                f"its content has the SHA-256 {digest.hexdigest()[:12]}..., not {self.sha256[:12]}...: damaged"
            )
        self._file.seek(start)

    def _unpacked(self) -> Iterator[bytes]:
        """Pieces of the one compressed member, each of a bounded size whatever it claims to hold."""
        unpacking = zlib.decompressobj(wbits=31)
        while packed := self._file.read(PIECE_BYTES):
            while packed and not unpacking.eof:
                piece = unpacking.decompress(packed, PIECE_BYTES)
                self.unpacked_bytes += len(piece)
                if self.unpacked_bytes > MOST_BYTES:
                    raise InputError(f"it unpacks to more than the {MOST_BYTES} bytes that are allowed")
                yield piece
                packed = unpacking.unconsumed_tail
            if unpacking.eof and (unpacking.unused_data or packed):
                raise InputError("something lies behind its end")
        while not unpacking.eof:
            piece = unpacking.decompress(unpacking.unconsumed_tail, PIECE_BYTES)
            if not piece:
                raise InputError("it ends too early")
            yield piece

    def _unpacked_lines(self) -> Iterator[bytes]:
        held: list[bytes] = []  # the pieces of a line whose end is not there yet
        size = 0
        try:
            for piece in self._unpacked():
                *ends, rest = piece.split(b"\n")
                for end in ends:
                    yield b"".join((*held, end))
                    held, size = [], 0
                held.append(rest)
                size += len(rest)
                if size > MOST_LINE_BYTES:
                    raise InputError(f"it has a line of more than the {MOST_LINE_BYTES} bytes that are allowed")
        except zlib.error as error:
            raise InputError(f"it cannot be unpacked: {error}") from error
        if size:
            raise InputError("its last line does not end")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Reading]:
    """Opens a bundle and checks its sum; every InputError on the way names the file."""
    try:
        with open_file(path) as file:
            yield Reading(file)
    except OSError as error:
        raise InputError(f"bundle {path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"bundle {path}: {error}") from error


def strictly_parsed(text: bytes) -> Any:
    """The value of a JSON text, nothing in it unusual: no key twice, no NaN, no huge number, text or nesting.

    Raises InputError.
    """
    if _nesting(text) > MOST_NESTED:
        raise InputError(f"it nests values deeper than the {MOST_NESTED} levels that are allowed")
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_constant=_refuse_number,
            parse_float=_float,
            parse_int=_int,
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not JSON: {str(error).splitlines()[0]}") from error


def _nesting(text: bytes) -> int:
    """How deep brackets open outside of strings, in time proportional to the length."""
    depth = deepest = 0
    for found in BRACKETS.finditer(text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise InputError(f"an object has the key {twice[:60]!r} twice")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise InputError(f"the number {text[:30]} is not allowed")


def _float(text: str) -> float:
    value = float(text)
    return value if abs(value) < 1e300 else _refuse_number(text)


def _int(text: str) -> int:
    return int(text) if len(text.lstrip("-")) <= MOST_DIGITS else _refuse_number(text)
