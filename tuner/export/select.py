"""Which setup an engine is told: the chosen one where the engine can express it, else the best forecast one it can.

Every engine brings its own objections; how they are worded and what is skipped for them is decided here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiles.builtin import BUILTIN, BUILTIN_FOLDER, IMPORTED_MARKS, replace_mark
from profiles.engines.llamacpp.gguf_cache import gguf_place
from profiles.records.core import PLAIN, Model, Setup
from profiles.records.text import printable
from tuner.export.types import Deployment, Export
from tuner.policy.policy import Choice

NATIVE_FORMS = ("llamacpp", "vllm")  # engines whose own ways of drafting can be spelled
TRANSFERRED = "a transferred forecast, not measured"
Objection = Callable[[Setup], str | None]  # why an engine cannot be told a setup, or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The engine an export is for: as `--format` names it, as people do, its version, and how that was found."""

    form: str
    title: str
    version: str
    note: str | None = None

    @property
    def name(self) -> str:
        return f"{self.title} {self.version}"


def pick(deployment: Deployment, engine: Engine, objection: Objection) -> tuple[Setup | None, list[str]]:
    """The setup to tell the engine, or None; with what a person should know about it."""
    choice, notes = deployment.choice, [] if engine.note is None else [engine.note]
    if choice.setup.draft is None:
        return None, [f"nothing to set for {engine.title}: plain decoding is the choice. {choice.reason}"]
    skipped = []
    for setup in dict.fromkeys((choice.setup, *(one.setup for one in choice.alternatives))):
        reason = objection(setup)
        if reason is not None:
            skipped.append(f"{setup.name} is left out: {reason}")
        elif setup == choice.setup:
            return setup, notes
        else:
            instead = (
                f"{setup.name} is emitted instead: the best forecast setup {engine.name} takes, not proven by runs"
            )
            return setup, [*notes, *skipped, instead]
    return None, [*notes, f"nothing to set for {engine.title}", *skipped]


def one_length(deployment: Deployment, setup: Setup, limit: str, *, alike: bool = False) -> str:
    """What to say for an engine that keeps one length: the batches it was decided for, and the `limit` that keeps them.

    A batch is decided by the smallest measured one that is at least as large. `alike`: the length is for all of them.
    """
    before, own, after = _around(deployment, setup, alike=alike)
    last = own[-1].batch_size
    span = f"{before[-1].batch_size + 1} to {last}, smaller ones otherwise" if before else f"up to {last}"
    beyond = f"{after[0].setup.name} was decided" if after else "nothing was measured"
    return f"k={setup.length} is for batches {span}; from {last + 1} on {beyond}: keep {limit} at or under {last}"


def claimed(deployment: Deployment, setup: Setup, *, alike: bool = False) -> dict[int, Setup]:
    """What an engine that keeps one length claims: the batches that `one_length` names."""
    return {row.batch_size: setup for row in _around(deployment, setup, alike=alike)[1]}


def _around(deployment: Deployment, setup: Setup, *, alike: bool) -> tuple[Sequence[Choice], ...]:
    """The measured batches before, of and after the stretch around the asked one that a setup was decided for."""
    rows = deployment.batches
    asked = next(at for at, row in enumerate(rows) if row.batch_size == deployment.choice.batch_size)
    others = [] if alike else [at for at, row in enumerate(rows) if row.setup not in (setup, deployment.choice.setup)]
    first = max((at + 1 for at in others if at < asked), default=0)
    end = min((at for at in others if at > asked), default=len(rows))
    return rows[:first], rows[first:end], rows[end:]


def made(deployment: Deployment, engine: Engine, setup: Setup, text: str, notes: list[str]) -> Export:
    """The export with its label, of one length for the batches that were decided so."""
    label = label_of(deployment, engine.form, setup)
    return Export(text=text, note=joined(notes), setup=setup, label=label, claims=claimed(deployment, setup))


def label_of(deployment: Deployment, form: str, setup: Setup) -> str:
    """How sure a setup is. A choice measured on one engine is never called proven on another."""
    choice = deployment.choice
    if deployment.transferred:
        return TRANSFERRED
    if not choice.is_decided:
        return "not measured"
    # paired runs time plain decoding beside their setup
    is_measured = choice.measured is not None and setup in (choice.measured.setup, PLAIN)
    if setup != choice.setup or not is_measured:
        return f"forecast on {deployment.where}"
    return "proven" if choice.proven and deployment.where == form else f"measured on {deployment.where}"


def refused(notes: list[str]) -> Export:
    return Export(text="", note=joined(notes))


def joined(notes: list[str]) -> str | None:
    return "; ".join(notes) or None


def kind_objection(setup: Setup, engine: Engine) -> str | None:
    """What no serving engine can be told: two sources, the target's own layers, a stop before a proposal."""
    assert setup.draft is not None  # only drafting setups are asked about
    if setup.draft.kind == "composite":
        return f"{engine.title} takes a look-up or a draft model, not both"
    if setup.draft.kind == "early_exit":
        return f"{engine.title} cannot draft with the target's own layers"
    if setup.draft.kind == "native" and engine.form not in NATIVE_FORMS:
        return f"{engine.title} is not told of {setup.draft.name}"
    if setup.stop_below is not None:
        return f"{engine.title} has no stop before a proposal"
    return None


def weights_objection(target: Model, setup: Setup, engine: Engine) -> str | None:
    """What came in a bundle has no place here; GGUF is for llama.cpp alone, which reads nothing else.

    The target is named in the text for transformers only, which can be told GGUF too.
    """
    draft = setup.draft.model if setup.draft is not None else None
    for role, model in (("target", target), ("draft", draft)):
        if model is None:
            continue
        if model.name.startswith(IMPORTED_MARKS) and (role == "draft" or engine.form == "transformers"):
            came = "came in a bundle from a path of another machine: its place here is not known"
            return f"the {role} {replace_mark(model.name)} {came}"
        if engine.form == "transformers":
            continue
        if engine.form == "llamacpp" and not is_gguf(model) and written_gguf(model) is None:
            return f"llama.cpp reads GGUF files only: convert the {role} {model.name} and measure that"
        if engine.form != "llamacpp" and is_gguf(model):
            return f"the {role} {model.name} is a GGUF file, which {engine.title} is not told"
    return None


def is_gguf(model: Model) -> bool:
    return model.name.lower().endswith(".gguf")


def written_gguf(model: Model) -> Path | None:
    """The GGUF that a run on llama.cpp wrote of a directory; None where there is none here."""
    folder = Path(place_of(model))
    found = gguf_place(folder, model.digest, model.dtype) if folder.is_dir() else None
    return found if found is not None and found.is_file() else None


def place_of(model: Model) -> str:
    """The directory, file or hub id the engine loads."""
    if model.name.startswith(BUILTIN):
        return str(BUILTIN_FOLDER / model.name.removeprefix(BUILTIN))
    return model.name


def comment(text: str) -> str:
    """One line, whatever a name or a domain holds: a line break would end the comment, a control character a file."""
    return "# " + " ".join(printable(text).split())


def title(deployment: Deployment, setup: Setup, label: str) -> str:
    choice = deployment.choice
    asked = f"{choice.domain} prompts, batch {choice.batch_size}, context up to {choice.context_length}"
    return comment(f"{setup.name} for {asked} ({label})")
