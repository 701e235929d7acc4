"""Text as a bundle may hold it: without paths, secrets and what a terminal would obey.

A model named by a path gets the path's last part behind a mark, so that nobody takes it for a hub id; its digest is its
identity. Cleaning twice changes nothing.
"""

import json
import re
from typing import Any

from profiles.builtin import IMPORTED, IMPORTED_MARKS
from profiles.engines.serving.redaction import redacted, without_paths
from profiles.records.errors import InputError, require
from profiles.records.text import map_text, printable

MOST_CHARACTERS, MOST_KEY_CHARACTERS = 65_536, 200
MOST_PASSES = 4  # what is left of one path may begin another; text that goes on so was made to
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
# a name as a whole: what is looked up first, marks of bundles before, and whether the rest is a path
NAME = re.compile(rf"(?P<ngram>(?:ngram:[\w=,]*\+)?)(?P<marks>(?:{'|'.join(IMPORTED_MARKS)})*)(?P<rest>.*)", re.DOTALL)
WHOLE = re.compile(r"(?:file:)?(?:~|\.{1,2}|[A-Za-z]:)?[/\\]")


def clean(value: Any, key: str = "") -> Any:
    """A JSON value with every text in it cleaned; under a key that ends with `name`, a path is one as a whole.

    Raises InputError: a text is longer than allowed.
    """
    if isinstance(value, str) and key == "engine_options":
        return clean_options(value)
    if isinstance(value, str):
        return printable(value) if key == "domain" else clean_text(value, is_name=key.endswith("name") or key in NAMES)
    if isinstance(value, list):
        return [clean(item, key) if isinstance(item, str | list | dict) else item for item in value]
    if isinstance(value, dict):
        for name in value:
            if len(name) > MOST_KEY_CHARACTERS or printable(name) != name:
                raise InputError(f"the key {name[:60]!r} is longer than {MOST_KEY_CHARACTERS} or cannot be shown")
        return {name: clean(item, name) for name, item in value.items()}
    return value


def clean_options(text: str) -> str:
    """A machine's engine options as an engine of today records them; those without paths and secrets stay as they are.

    Raises InputError: the text is longer than allowed.
    """
    require(len(text) <= MOST_CHARACTERS, f"engine_options has {len(text)} characters: {MOST_CHARACTERS} are allowed")
    try:
        options = json.loads(text)
    except ValueError:
        return printable(without_paths(redacted(text)))
    cleaned = map_text(options, lambda text: without_paths(redacted(text)))
    return printable(text if cleaned == options else json.dumps(cleaned, sort_keys=True))


def clean_text(text: str, *, is_name: bool = False) -> str:
    """One text, cleaned; raises InputError when it is longer than allowed."""
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"the text {text[:30]!r}... has {len(text)} characters: {MOST_CHARACTERS} are allowed")
    text = redacted(printable(text))
    if is_name:
        text = _marked(text)
    for _ in range(MOST_PASSES):
        shorter = PATH.sub(_last_part, text)
        if shorter == text:
            return text
        text = shorter
    return re.sub(r"[/\\]", "_", text)


def _marked(name: str) -> str:
    """A name that is a path, or has a mark, as its last part behind one mark; others as they are."""
    match = NAME.fullmatch(name)
    assert match is not None  # it takes any text
    rest = match["rest"]
    is_path = WHOLE.match(rest) is not None
    if is_path:
        rest = re.split(r"[/\\]", rest.rstrip("/\\ "))[-1] or "unnamed"
    return f"{match['ngram']}{IMPORTED if is_path or match['marks'] else ''}{rest}"


def _last_part(match: re.Match[str]) -> str:
    """What is left of a path; a slash alone, or before one or two letters, is no path."""
    folders, last = match["folders"].rstrip("/\\"), match["last"]
    if not folders and len(last) < 3 and match["root"].startswith(("/", "\\")):
        return match[0]
    return last or re.split(r"[/\\]", folders)[-1]
