"""What is emitted for every engine and version, and whether the engine itself takes it.

    python -m tests.lanes.install            # once: the engines' own parsers and classes, three minutes, 2.3 GB
    python -m tests.benchmarks.accepted

A fixed set of deployments on tiny random models: a look-up, a draft model, the same with sampling, a composite (with
what goes out instead), a schedule by batch, plain decoding. A lane that is not installed is shown as not checked, never
as accepted.
"""

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from profiles.records.core import Draft, Model
from tests.benchmarks.common import finish
from tests.lanes.cases import cases, draft_at, model_at
from tests.lanes.places import LANES, Lane, ask
from tests.lanes.transformers_lane import drafts_as_asked, rounds_of
from tests.support.tiny import write_gguf, write_model
from tuner.export import Deployment, Export, Form, emit

CLASSES = {
    "vllm": "its parser, EngineArgs and SpeculativeConfig",
    "sglang": "its parser, ServerArgs and SpeculativeAlgorithm",
    "llamacpp": "its parser (common_params_parse)",
}
TABLES: tuple[tuple[Form, str, str], ...] = (
    ("sglang", "0.5.3", "key table: sglang/srt/server_args.py of the released 0.5.3"),
    ("trtllm", "1.2.1", "key table: tensorrt_llm/llmapi/llm_args.py, 1.2 series"),
    ("trtllm", "1.3.0rc27", "key table: reference page of 1.3.0rc27"),
    ("trtllm", "1.4.0rc1", "key table: reference page of 1.4.0rc1"),
)
NEW_TOKENS = 30
Row = dict[str, Any]


def models(folder: Path) -> tuple[tuple[Model, Draft], tuple[Model, Draft]]:
    """A tiny target and draft as directories, and the same as GGUF files that llama.cpp reads."""
    paths = [
        write_model(folder / name, num_layers=layers, seed=layers, eos_token_id=None)
        for name, layers in (("target", 3), ("draft", 1))
    ]
    changes: dict[str, object] = {"tokenizer__ggml__pre": "gpt-2", "tokenizer__ggml__token_type": None}
    files = [write_gguf(path.with_suffix(".gguf"), path, **changes) for path in paths]
    return (model_at(paths[0]), draft_at(paths[1])), (model_at(files[0]), draft_at(files[1]))


def row(form: str, version: str, case: str, export: Export, **more: object) -> Row:
    """`accepted`: True or False as the engine said, None where it was not asked."""
    base = {"engine": form, "version": version, "case": case, "emitted": export.text, "label": export.label}
    return {**base, "note": export.note, "accepted": None, "by": "nothing emitted", **more}


def of_lane(lane: Lane, found: Mapping[str, Deployment], target: Model) -> Iterator[Row]:
    form: Form = lane.form  # type: ignore[assignment]
    exports = {name: emit(case, form, lane.version) for name, case in found.items()}
    if not lane.is_whole:
        for name, export in exports.items():
            said = f"not checked: no lane (python -m tests.lanes.install {lane.form})" if export.text else None
            yield row(form, lane.version, name, export, **({"by": said} if said else {}))
        return
    lines = {name: shlex.split(export.text) for name, export in exports.items() if export.text}
    verdicts = dict(zip(lines, ask(lane, Path(target.name), list(lines.values())), strict=True))
    for name, export in exports.items():
        judged: Row = {}
        if (verdict := verdicts.get(name)) is not None:
            judged = {"accepted": verdict.accepted, "by": CLASSES[form] if verdict.accepted else verdict.said}
        yield row(form, lane.version, name, export, **judged)


def of_transformers(found: Mapping[str, Deployment]) -> Iterator[Row]:
    version = metadata.version("transformers")
    for name, case in found.items():
        export = emit(case, "transformers")
        if export.setup is None or export.setup.draft is None:
            yield row("transformers", version, name, export)
            continue
        rounds = rounds_of(export.text, NEW_TOKENS)
        looks_up = export.setup.draft.looks_up
        taken = drafts_as_asked(rounds, export.setup.length, NEW_TOKENS, looks_up=looks_up)
        drafted = sorted({drafted for drafted, _ in rounds}, reverse=True)
        by = f"generate: {len(rounds)} rounds counted, k={export.setup.length}, drafted {drafted}"
        yield row("transformers", version, name, export, accepted=taken, by=by)


def all_rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        (target, draft), (packed, packed_draft) = models(Path(folder))
        found = cases(target, draft)
        yield from of_transformers(found)
        for lane in LANES:
            if lane.form == "llamacpp":
                yield from of_lane(lane, cases(packed, packed_draft), packed)
            else:
                yield from of_lane(lane, found, target)
        for form, version, source in TABLES:
            for name, case in found.items():
                export = emit(case, form, version)
                yield row(form, version, name, export, **({"by": source} if export.text else {}))


def shown(one: Row) -> str:
    said = {True: "yes", False: "NO", None: "-"}[one["accepted"]]
    text = " ".join(one["emitted"].split())
    if one["engine"] in ("transformers", "trtllm"):
        text = f"({len(one['emitted'].splitlines())} lines)" if text else ""
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{one['engine']:12} {one['version']:10} {one['case']:20} {short:60} {said:4} {one['by']}"


def main() -> None:
    """A row per engine, version and case, then JSON."""
    print(f"{'engine':12} {'version':10} {'case':20} {'emitted':60} {'took':4} by")
    rows = []
    for one in all_rows():
        rows.append(one)
        print(shown(one), flush=True)
    rejected = sum(one["accepted"] is False for one in rows)
    accepted = sum(one["accepted"] is True for one in rows)
    finish({"benchmark": "accepted", "rows": rows, "accepted": accepted, "rejected": rejected})


if __name__ == "__main__":
    main()
