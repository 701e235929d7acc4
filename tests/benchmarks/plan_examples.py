"""Ten plans that a user would ask for, with why each is plausible: `python -m tests.benchmarks.plan_examples --write`.

They stand in data/plan_examples.json. Writes docs/plan-examples.md; without `--write` to standard output. The last line
is one JSON document.
"""

import io
import json
import sys
from typing import Any

import jinja2
from rich.console import Console

from profiles.records.errors import DraftpickError
from tests import ROOT
from tests.benchmarks.common import DATA, finish
from tuner.cli.plan import lines, table
from tuner.plan.plan import PlanQuery, make_plan

EXAMPLES = json.loads((DATA / "plan_examples.json").read_text(encoding="utf-8"))
IN_FULL = (1, 8)


def command(query: PlanQuery) -> str:
    """The command line of a query."""
    options = {"--target": query.target, "--hardware": query.hardware, "--engine": query.engine, "--dtype": query.dtype}
    options |= {"--context": None if query.context == 1024 else query.context}
    parts = [f"{name} {value}" for name, value in options.items() if value is not None]
    parts += [f"--draft {draft}" for draft in query.drafts]
    parts += [f"--batch-size {batch}" for batch in query.batch_sizes if list(query.batch_sizes) != [1]]
    return " ".join(["draftpick plan", *parts])


def printed(document: dict[str, Any]) -> str:
    """What the command prints."""
    console = Console(file=io.StringIO(), width=100, highlight=False)
    for line in lines(document):
        console.print(line, markup=False, soft_wrap=True)
    console.print(table(document))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def page(queries: list[PlanQuery], documents: list[dict[str, Any]]) -> str:
    """The page: a row for every plan and batch, why each is plausible, and two outputs in full."""
    for document in documents:
        for choice in document["choices"]:
            rows = [row for row in document["setups"] if row["batch_size"] == choice["batch_size"]]
            choice["best"] = max(rows, key=lambda row: row["speedup"])
    template = jinja2.Template(
        (DATA / "plan-examples.md.jinja").read_text(encoding="utf-8"), keep_trailing_newline=True
    )
    full = [(number, command(queries[number - 1]), printed(documents[number - 1])) for number in IN_FULL]
    return template.render(documents=documents, reasons=[row["why"] for row in EXAMPLES], full=full)


def main() -> None:
    queries = [PlanQuery(**row["query"]) for row in EXAMPLES]
    documents = [make_plan(query) for query in queries]
    text = page(queries, documents)
    if "--write" in sys.argv:
        (ROOT / "docs" / "plan-examples.md").write_text(text, encoding="utf-8")
    else:
        print(text)
    try:
        make_plan(PlanQuery(target="Qwen/Qwen3-32B", drafts=["mtp"], hardware="RTX4090", engine="vllm"))
    except DraftpickError as error:
        print(error)
    for document in documents:
        for choice in document["choices"]:
            del choice["best"]
    finish({"choices": [document["choices"] for document in documents]})


if __name__ == "__main__":
    main()
