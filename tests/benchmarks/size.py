"""How large the code is, and whether retired names are left: `python -m tests.benchmarks.size`.

Product is tune.py, tuner, store and profiles without the training scripts, templates included. The last line is one
JSON document.
"""

import ast
import json
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import ROOT

METAPHORS = ["book", "shelf", "dossier", "rehearsal", "house", "room", "floor", "pilot", "ledger", "luck", "law"]
METAPHORS += ["keeper", "parting", "staircase", "occasion"]
IDENTIFIERS = ["one", "found", "own", "asked", "known", "kept", "told", "said", "place", "words"]
SMALL_FILE_LINES = 40


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout that git knows and that match."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def product_files() -> list[Path]:
    """What is installed: modules and templates, without the training scripts."""
    files = tracked("tune.py", "tuner/*.py", "store/*.py", "profiles/*.py", "tuner/*.jinja")
    return [path for path in files if "training" not in path.parts]


def num_lines(files: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in files)


def functions(files: list[Path]) -> Iterator[tuple[int, str]]:
    """(Lines, place) of every function."""
    for path in files:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    size = (node.end_lineno or node.lineno) - node.lineno + 1
                    yield size, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def identifiers(files: list[Path]) -> Iterator[str]:
    """Every name that the code defines or uses, imported libraries' attributes included."""
    for path in files:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                        yield name
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        yield name


def main() -> None:
    product, tests = product_files(), tracked("tests/*.py")
    sizes = sorted(functions(product), reverse=True)
    text = "\n".join(path.read_text() for path in [*product, *tracked("README.md", "docs/*.md")])
    metaphors = {word: len(re.findall(rf"\b{word}s?\b", text, re.IGNORECASE)) for word in METAPHORS}
    names = Counter(name.strip("_").lower() for name in identifiers(product))
    small = [path for path in product if 0 < len(path.read_text().splitlines()) < SMALL_FILE_LINES]
    figures = {
        "product_lines": num_lines(product),
        "test_lines": num_lines(tests),
        "product_files": len(product),
        "files_under_40_lines": len(small),
        "median_function_lines": statistics.median(size for size, _ in sizes),
        "longest_function_lines": sizes[0][0],
        "longest_function": sizes[0][1],
        "metaphors": {word: count for word, count in metaphors.items() if count},
        "retired_identifiers": {name: names[name] for name in IDENTIFIERS if names[name]},
    }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
