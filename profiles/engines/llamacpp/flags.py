"""Speculative flags of llama.cpp's `llama-server`, from b9294 on; before, they were renamed twice in half a year.

llama.cpp's own parser read them in the xllamacpp packages built from b9294 and b11549 (`tests/lanes`).
"""

import re
import shutil
from dataclasses import replace

from profiles.engines import rules
from profiles.engines.releases import EngineRelease, build_number, release_of
from profiles.hardware import software
from profiles.records.core import Draft, Model, Setup
from profiles.records.draft_spec import method_options
from profiles.records.errors import InputError, require

# methods of llama.cpp's own: its name, and the flag for the number of drafted tokens
NATIVE = {
    "eagle3": ("draft-eagle3", "--spec-draft-n-max"),
    "mtp": ("draft-mtp", "--spec-draft-n-max"),
    "ngram-mod": ("ngram-mod", "--spec-ngram-mod-n-max"),
    "ngram-map-k": ("ngram-map-k", "--spec-ngram-map-k-size-m"),
    "ngram-map-k4v": ("ngram-map-k4v", "--spec-ngram-map-k4v-size-m"),
}
KEEPS_HISTORY = ("ngram-mod", "ngram-map-k", "ngram-map-k4v")  # their pool outlives a request
_OPTION = re.compile(r"[a-z][a-z-]*=[\w.]+")


FIRST_BUILD = 9294  # PR #22964: the type of a draft model has to be given
# `{k}`: the drafted tokens, `{n}`: the match, `{model}`: the draft's file. What lets a server draft fewer tokens (a
# minimum, a probability) is switched off: k tokens were measured.
_DRAFT_MODEL = (
    "--spec-type draft-simple --spec-draft-model {model} --spec-draft-n-max {k} --spec-draft-n-min 0 "
    "--spec-draft-p-min 0.0"
)
_NGRAM = "--spec-type ngram-simple --spec-ngram-simple-size-n {n} --spec-ngram-simple-size-m {k}"
_LISTED = {"--spec-draft-n-max", "--spec-ngram-simple-size-n", "draft-simple"}  # in the help of these builds alone


def is_known(help_text: str) -> bool:
    """Whether a server's help lists these flags."""
    return _LISTED.issubset(re.findall(r"[\w-]+", help_text))


def release_of_build(version: str | None) -> EngineRelease:
    """The build given, else the `llama-server` that is installed, else the newest one known.

    Raises InputError: not a build number.
    """
    program = None if version else software.llama_server_path() or shutil.which("llama-server")
    text = None if program is None else software.server_help([program])
    if text is not None:
        name = "(the llama-server installed here)"
        return EngineRelease(engine="llamacpp", version=name, is_known=is_known(text))
    release = release_of("llamacpp", version)
    return replace(release, is_known=build_number(release.version) >= FIRST_BUILD)


def keeps_history(setup: Setup) -> bool:
    """Whether what a setup drafts depends on earlier requests."""
    method = None if setup.draft is None else setup.draft.method
    return method is not None and method_options(method)[0] in KEEPS_HISTORY


def objection(target: Model, setup: Setup, release: EngineRelease) -> str | None:
    """Why llama.cpp cannot be told a setup; short look-up drafts are dropped (`common_ngram_simple_draft`)."""
    if not release.is_known:
        return f"the flags of {release.name} are not known: they are from b{FIRST_BUILD} on"
    min_match = setup.draft.min_match if setup.draft is not None and setup.draft.kind == "ngram" else None
    if min_match is not None and setup.length < min_match:
        return f"llama.cpp drops look-up drafts shorter than the match, {min_match} tokens here"
    return rules.objection(target, setup, release)


def args_for(setup: Setup, weights: str | None = None) -> list[str]:
    """The arguments of a setup that drafts; `weights`: the file of its draft model, by default the draft's own.

    Raises InputError: a kind of draft or a method that llama.cpp does not have.
    """
    draft = setup.draft
    assert draft is not None
    if weights is None and draft.model is not None:
        weights = rules.gguf_path(draft.model.name) or draft.model.name
    if draft.kind == "native":
        return _native_args(draft, setup.length, weights)
    require(draft.kind in ("model", "ngram"), f"draft {draft.name}: llama.cpp has no {draft.kind} drafts")
    template = _NGRAM if draft.model is None else _DRAFT_MODEL
    values = {"{n}": str(draft.min_match), "{k}": str(setup.length), "{model}": str(weights)}
    return [values.get(word, word) for word in template.split()]


def _native_args(draft: Draft, length: int, weights: str | None) -> list[str]:
    """`ngram-mod,n-match=8` becomes `--spec-type ngram-mod --spec-ngram-mod-n-match 8` and the length."""
    assert draft.method is not None
    name, options = method_options(draft.method)
    require(name in NATIVE, f"draft {draft.name}: llama.cpp's methods are {', '.join(NATIVE)}")
    spec_type, length_flag = NATIVE[name]
    args = ["--spec-type", spec_type, length_flag, str(length)]
    if name == "ngram-mod" and "n-min" not in options:
        args += ["--spec-ngram-mod-n-min", "1"]  # its default minimum is above the lengths that are measured
    if weights is not None:
        args += ["--spec-draft-model", weights]
    for key, value in options.items():
        if not _OPTION.fullmatch(f"{key}={value}"):
            raise InputError(f"draft {draft.name}: option {key}={value}: NAME=VALUE is needed, like n-match=8")
        args += [f"--spec-{spec_type}-{key}", value]
    return args
