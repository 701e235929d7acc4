"""Text as a bundle may hold it: without paths, secrets and what a terminal would obey.

A model named by a path gets the path's last part behind a mark, so that nobody takes it for a hub id; its digest is its
identity. Cleaning twice changes nothing.
"""

import json
import re
from typing import Any

from profiles.builtin import IMPORTED, IMPORTED_MARKS
from profiles.engines.serving.redaction import redacted, without_paths
from profiles.records.errors import require
from profiles.records.text import map_text, printable

MOST_CHARACTERS, MOST_KEY_CHARACTERS = 65_536, 200
MOST_PASSES = 4
NAMES = ("component", "draft")  # keys of names that do not end with it
# A path in a sentence: a root that no word touches, folders (which may hold spaces, but then no
# equals sign: `/models/a k=4 reaches 9 tok/s` is a path and words), a last part (which may not).
PATH = re.compile(
    r"""(?<![\w.~:/\\-])(?:file:)?
    (?P<root>(?:~|\.{1,2}|[A-Za-z]:)?[/\\]+)
    (?P<folders>(?:(?:[^/\\\s:;"'<>|*?,()]+|[^/\\\s:;"'<>|*?,()=](?:[^/\\:;"'<>|*?,()=]*[^/\\\s:;"'<>|*?,()=])?)[/\\]+)*)
    (?P<last>[^/\\\s:;,"'<>|*?()]*)""",
    re.VERBOSE,
)
# a path as a whole name, behind what is looked up first or the method of a head
NAME = re.compile(r"(?P<head>(?:[^/\\]*?[+:])??)(?:file:)?(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?!/)(?P<path>.*)", re.DOTALL)
MARKS = re.compile(rf"(?:{'|'.join(IMPORTED_MARKS)})+")


def clean(value: Any, key: str = "") -> Any:
    """A JSON value with every text in it cleaned; under a key that ends with `name`, a path is one as a whole.

    Raises InputError: a text is longer than allowed.
    """
    if isinstance(value, str):
        require(len(value) <= MOST_CHARACTERS, f"{key} has {len(value)} characters: {MOST_CHARACTERS} are allowed")
        if key in ("domain", "engine_options"):
            return printable(value)
        return clean_text(value, is_name=key.endswith("name") or key in NAMES)
    if isinstance(value, list):
        return [clean(item, key) if isinstance(item, str | list | dict) else item for item in value]
    if isinstance(value, dict):
        for name in value:
            good = len(name) <= MOST_KEY_CHARACTERS and printable(name) == name
            require(good, f"the key {name[:60]!r} is longer than {MOST_KEY_CHARACTERS} or cannot be shown")
        return {name: clean(item, name) for name, item in value.items()}
    return value


def clean_text(text: str, *, is_name: bool = False) -> str:
    """One text without secrets and paths; a name that is a path, or has a mark, is its last part behind one mark."""
    text = redacted(printable(text))
    if is_name and (match := NAME.fullmatch(text)):
        last = re.split(r"[/\\]", match["path"].rstrip("/\\ "))[-1]
        text = f"{match['head']}{IMPORTED}{last or 'unnamed'}"
    text = MARKS.sub(IMPORTED, text) if is_name else text
    for _ in range(MOST_PASSES):  # what is left of one path may begin another
        text = PATH.sub(_last_part, text)
    return text


def require_no_path(options: str | None) -> None:
    """Raises InputError: engine options, part of a machine's digest, with a path or secret, as 0.5 stored them."""
    try:
        raw = json.loads(options or "null")
    except ValueError:
        raw = options
    require(map_text(raw, lambda text: without_paths(redacted(text))) == raw, "a path or secret is in engine_options")


def _last_part(match: re.Match[str]) -> str:
    """What is left of a path; a slash alone, or before one or two letters, is no path."""
    folders, last = match["folders"].rstrip("/\\"), match["last"]
    if not folders and len(last) < 3 and match["root"].startswith(("/", "\\")):
        return match[0]
    return last or re.split(r"[/\\]", folders)[-1]
