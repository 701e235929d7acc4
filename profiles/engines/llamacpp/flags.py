"""Speculative flags of llama.cpp's `llama-server` by build; they were renamed twice in 2026.

llama.cpp's own parser read every flag set below, in the xllamacpp packages built from b8672, b8929, b9093, b9294 and
b11549 (`tests/lanes`). The builds between those are not told apart.
"""

import re
import shutil
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagSet:
    """The flags of the builds `first` to `last` (None: and newer); the words `has` and `lacks` identify it in a help.

    `{k}` stands for the drafted tokens, `{n}` for the match, `{model}` for the draft's file. Flags that let a server
    draft fewer tokens (a minimum, a probability) are switched off: k tokens were measured.
    """

    first: int
    last: int | None
    model: str
    ngram: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    @property
    def builds(self) -> str:
        if self.last is None:
            return f"b{self.first} and newer"
        return f"b{self.first}" if self.first == self.last else f"b{self.first} to b{self.last}"


_DRAFT_MODEL = "--spec-draft-model {model} --spec-draft-n-max {k} --spec-draft-n-min 0 --spec-draft-p-min 0.0"
_NGRAM = "--spec-type ngram-simple --spec-ngram-simple-size-n {n} --spec-ngram-simple-size-m {k}"
FLAG_SETS = (
    FlagSet(
        first=8672,
        last=8929,
        model="--model-draft {model} --draft-max {k} --draft-min 0 --draft-p-min 0.0",
        ngram="--spec-type ngram-simple --spec-ngram-size-n {n} --spec-ngram-size-m {k} --draft-max {k}",
        has=("--draft-max", "--spec-type", "--spec-ngram-size-n"),
        lacks=("--spec-draft-n-max",),
    ),
    FlagSet(  # PR #22397 removed --draft-max and --spec-ngram-size-n: they end the server
        first=9093,
        last=9093,
        model=_DRAFT_MODEL,
        ngram=_NGRAM,
        has=("--spec-draft-n-max", "--spec-ngram-simple-size-n"),
        lacks=("draft-simple",),
    ),
    FlagSet(  # PR #22964: the type of a draft model has to be given
        first=9294,
        last=None,
        model=f"--spec-type draft-simple {_DRAFT_MODEL}",
        ngram=_NGRAM,
        has=("--spec-draft-n-max", "--spec-ngram-simple-size-n", "draft-simple"),
    ),
)


def flags_of_build(build: str) -> FlagSet | None:
    number = build_number(build)
    return next((flags for flags in FLAG_SETS if flags.first <= number <= (flags.last or number)), None)


def flags_of_help(text: str) -> FlagSet | None:
    listed = set(re.findall(r"[\w-]+", text))
    matching = (flags for flags in FLAG_SETS if listed.issuperset(flags.has) and not listed.intersection(flags.lacks))
    return next(matching, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaRelease(EngineRelease):
    """A build of llama.cpp with its flags, None where they are not known."""

    flags: FlagSet | None


def release_of_build(version: str | None) -> LlamaRelease:
    """The build given, else the `llama-server` that is installed, else the newest one known.

    Raises InputError: not a build number.
    """
    program = None if version else software.llama_server_path() or shutil.which("llama-server")
    text = None if program is None else software.server_help([program])
    if text is not None:
        name = "(the llama-server installed here)"
        return LlamaRelease(engine="llamacpp", version=name, flags=flags_of_help(text))
    release = release_of("llamacpp", version)
    flags = flags_of_build(release.version)
    return LlamaRelease(engine="llamacpp", version=release.version, note=release.note, flags=flags)


def builds_with_flags() -> str:
    return ", ".join(flags.builds for flags in FLAG_SETS)


def keeps_history(setup: Setup) -> bool:
    """Whether what a setup drafts depends on earlier requests."""
    method = None if setup.draft is None else setup.draft.method
    return method is not None and method_options(method)[0] in KEEPS_HISTORY


def objection(target: Model, setup: Setup, release: EngineRelease) -> str | None:
    """Why llama.cpp cannot be told a setup; short look-up drafts are dropped (`common_ngram_simple_draft`)."""
    assert isinstance(release, LlamaRelease)
    if release.flags is None:
        return f"the flags of {release.name} are not known: they are for {builds_with_flags()}"
    min_match = setup.draft.min_match if setup.draft is not None and setup.draft.kind == "ngram" else None
    if min_match is not None and setup.length < min_match:
        return f"llama.cpp drops look-up drafts shorter than the match, {min_match} tokens here"
    return rules.objection(target, setup, release)


def args_for_release(setup: Setup, release: EngineRelease) -> list[str]:
    """As `args_for`, with the draft's own GGUF file."""
    assert isinstance(release, LlamaRelease)
    assert release.flags is not None
    assert setup.draft is not None
    model = setup.draft.model
    return args_for(setup, release.flags, None if model is None else rules.gguf_path(model.name) or model.name)


def args_for(setup: Setup, flags: FlagSet, weights: str | None = None) -> list[str]:
    """The arguments of a setup that drafts; `weights` is the file of its draft model.

    Raises InputError: a kind of draft or a method that llama.cpp does not have.
    """
    draft = setup.draft
    assert draft is not None
    if draft.kind == "native":
        return _native_args(draft, setup.length, weights)
    require(draft.kind in ("model", "ngram"), f"draft {draft.name}: llama.cpp has no {draft.kind} drafts")
    template = flags.ngram if draft.model is None else flags.model
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
