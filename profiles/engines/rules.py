"""What engines refuse of a target and a draft: kinds of drafts, forms of weights, sizes of vocabularies.

Every rule gives the objection as a text, or None. Exporters and the engines that are run ask the same rules.
"""

from pathlib import Path

from profiles.builtin import BUILTIN, BUILTIN_FOLDER, GGUF_MODELS, IMPORTED_MARKS, replace_mark
from profiles.engines.releases import EngineRelease
from profiles.records.core import Model, Setup

NATIVE_ENGINES = ("llamacpp", "vllm")  # engines whose own drafting methods have flags here
EQUAL_VOCABULARIES = ("sglang", "transformers", "vllm")


def kind_objection(setup: Setup, release: EngineRelease) -> str | None:
    """What no serving engine takes: two sources, the target's own layers, a stop before a proposal."""
    assert setup.draft is not None  # only setups that draft are checked
    if setup.draft.kind == "composite" and release.engine != "vllm":
        return f"{release.title} takes a look-up or a draft model, not both"
    if setup.draft.kind == "early_exit" and release.engine != "transformers":
        return f"{release.title} cannot draft with the target's own layers"
    if setup.draft.kind == "native" and release.engine not in NATIVE_ENGINES:
        return f"{release.title} is not told of {setup.draft.name}"
    if setup.stop_below is not None:
        return f"{release.title} has no stop before a proposal"
    return None


def weights_objection(target: Model, setup: Setup, release: EngineRelease) -> str | None:
    """Weights that are not on this machine, GGUF where it is not read, and safetensors where only GGUF is.

    Only the transformers snippet names the target; it also reads GGUF.
    """
    draft = setup.draft.model if setup.draft is not None else None
    for role, model in (("target", target), ("draft", draft)):
        if model is None:
            continue
        if role == "draft" or release.engine == "transformers":
            if model.name.startswith(IMPORTED_MARKS):
                name = replace_mark(model.name)
                return f"the {role} {name} came in a bundle from a path of another machine: it is not here"
            if model.name.startswith(BUILTIN) and not Path(model_path(model)).is_dir():
                return f"the {role} {model.name} comes with a source checkout, not with the installed package"
        if release.engine == "transformers":
            continue
        if release.engine == "llamacpp" and model.name not in GGUF_MODELS and gguf_path(model.name) is None:
            return f"llama.cpp reads GGUF files only: convert the {role} {model.name} and measure that"
        if release.engine != "llamacpp" and is_gguf(model):
            return f"the {role} {model.name} is a GGUF file, which {release.title} does not read"
    return None


def vocabulary_objection(target: Model, setup: Setup, release: EngineRelease) -> str | None:
    """Engines that compare the rows of the embeddings refuse a draft of other padding, although the tokens are equal.

    A family's models are padded to different sizes (151,936 and 152,064 rows). Evidence of 0.5.0 does not have them,
    which is no objection.
    """
    draft = setup.draft.model if setup.draft is not None and setup.draft.kind == "model" else None
    if draft is None or release.engine not in EQUAL_VOCABULARIES:
        return None
    sizes = target.vocab_size, draft.vocab_size
    if None in sizes or sizes[0] == sizes[1]:
        return None
    return f"{release.title} needs equal vocabulary sizes, and the target has {sizes[0]}, the draft {sizes[1]}"


def objection(target: Model, setup: Setup, release: EngineRelease) -> str | None:
    """The first objection of all rules."""
    return (
        kind_objection(setup, release)
        or weights_objection(target, setup, release)
        or vocabulary_objection(target, setup, release)
    )


def is_gguf(model: Model) -> bool:
    return model.name.lower().endswith(".gguf")


def model_path(model: Model) -> str:
    """The directory, file or hub id by which an engine loads a model."""
    if model.name.startswith(BUILTIN):
        return str(BUILTIN_FOLDER / model.name.removeprefix(BUILTIN))
    return model.name


def gguf_path(name: str) -> str | None:
    """The GGUF file of a model by its name: itself, a builtin model's, or the only one in a directory; else None."""
    if name in GGUF_MODELS and (parts := sorted((BUILTIN_FOLDER / name.removeprefix(BUILTIN)).glob("*.gguf"))):
        return str(parts[0])  # of a split file the first one
    if name.lower().endswith(".gguf"):
        return name
    files = [str(path) for path in Path(name).glob("*.gguf")]
    return files[0] if len(files) == 1 else None
