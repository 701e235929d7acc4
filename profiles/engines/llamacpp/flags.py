"""How llama.cpp's `llama-server` is told to draft; its flags were renamed twice in 2026.

Every spelling below was parsed by the real parser (`common_params_parse` in the xllamacpp packages built from b8672,
b8929, b9093, b9294 and b11549; `tests/lanes`). Between those builds the renaming happened, at a build not known here.
"""

import re
from dataclasses import dataclass

from profiles.records.core import Draft, Setup
from profiles.records.draft_spec import method_options
from profiles.records.errors import InputError

LOOK_UP = "ngram-simple"


# methods that llama.cpp names itself -> its name of them, and what says how many tokens they draft
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
class Spelling:
    """The flags of the builds `first` to `last` (None: on to the newest); `has` and `lacks` tell it by its help."""

    first: int
    last: int | None
    model: tuple[str, ...]
    ngram: tuple[str, ...]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    @property
    def builds(self) -> str:
        if self.last is None:
            return f"b{self.first} and newer"
        return f"b{self.first}" if self.first == self.last else f"b{self.first} to b{self.last}"


# what drafts fewer tokens than asked (a least number, a least probability) is switched off: exactly k were measured
SPELLINGS = (
    Spelling(
        first=8672,
        last=8929,
        model=("--model-draft {model}", "--draft-max {k}", "--draft-min 0", "--draft-p-min 0.0"),
        ngram=("--spec-type ngram-simple", "--spec-ngram-size-n {n}", "--spec-ngram-size-m {k}", "--draft-max {k}"),
        has=("--draft-max", "--spec-type", "--spec-ngram-size-n"),
        lacks=("--spec-draft-n-max",),
    ),
    Spelling(  # llama.cpp PR #22397: --draft-max and --spec-ngram-size-n removed, they end the server
        first=9093,
        last=9093,
        model=(
            "--spec-draft-model {model}",
            "--spec-draft-n-max {k}",
            "--spec-draft-n-min 0",
            "--spec-draft-p-min 0.0",
        ),
        ngram=("--spec-type ngram-simple", "--spec-ngram-simple-size-n {n}", "--spec-ngram-simple-size-m {k}"),
        has=("--spec-draft-n-max", "--spec-ngram-simple-size-n"),
        lacks=("draft-simple",),
    ),
    Spelling(  # llama.cpp PR #22964: a draft model needs its type named
        first=9294,
        last=None,
        model=(
            "--spec-type draft-simple",
            "--spec-draft-model {model}",
            "--spec-draft-n-max {k}",
            "--spec-draft-n-min 0",
            "--spec-draft-p-min 0.0",
        ),
        ngram=("--spec-type ngram-simple", "--spec-ngram-simple-size-n {n}", "--spec-ngram-simple-size-m {k}"),
        has=("--spec-draft-n-max", "--spec-ngram-simple-size-n", "draft-simple"),
    ),
)


def spelling_of_build(build: int) -> Spelling | None:
    return next((one for one in SPELLINGS if one.first <= build <= (one.last or build)), None)


def spelling_of_help(text: str) -> Spelling | None:
    words = set(re.findall(r"[\w-]+", text))
    known = (one for one in SPELLINGS if words.issuperset(one.has) and not words.intersection(one.lacks))
    return next(known, None)


def keeps_history(setup: Setup) -> bool:
    """Whether what a setup drafts depends on what ran before it."""
    method = None if setup.draft is None else setup.draft.method
    return method is not None and method_options(method)[0] in KEEPS_HISTORY


def args_for(setup: Setup, spelling: Spelling, weights: str | None = None) -> list[str]:
    """The arguments of a setup that drafts, one word each; `weights` is the place of its draft's model.

    Raises InputError: a kind of draft or a method that llama.cpp does not have.
    """
    draft = setup.draft
    assert draft is not None
    if draft.kind == "native":
        return _native_args(draft, setup.length, weights)
    if draft.kind not in ("model", "ngram"):
        raise InputError(f"draft {draft.name}: llama.cpp has no {draft.kind} drafts")
    parts = spelling.ngram if draft.model is None else spelling.model
    words = [word for part in parts for word in part.split(" ")]
    values = {"{n}": str(draft.min_match), "{k}": str(setup.length), "{model}": str(weights)}
    return [values.get(word, word) for word in words]


def _native_args(draft: Draft, length: int, weights: str | None) -> list[str]:
    """`ngram-mod,n-match=8` is `--spec-type ngram-mod --spec-ngram-mod-n-match 8`, with the length beside it."""
    assert draft.method is not None
    name, options = method_options(draft.method)
    if name not in NATIVE:
        raise InputError(f"draft {draft.name}: llama.cpp's methods are {', '.join(NATIVE)}")
    kind, length_flag = NATIVE[name]
    words = ["--spec-type", kind, length_flag, str(length)]
    if name == "ngram-mod" and "n-min" not in options:
        words += ["--spec-ngram-mod-n-min", "1"]  # its own least number is above the lengths that are asked
    if weights is not None:
        words += ["--spec-draft-model", weights]
    for key, value in options.items():
        if not _OPTION.fullmatch(f"{key}={value}"):
            raise InputError(f"draft {draft.name}: option {key}={value}: NAME=VALUE is needed, like n-match=8")
        words += [f"--spec-{kind}-{key}", value]
    return words
