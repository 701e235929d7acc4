"""Writes a choice as arguments of llama.cpp's `llama-server`, whose flags were renamed twice in 2026.

Every spelling below was parsed by the real parser (`common_params_parse` in the xllamacpp packages built from b8672,
b8929, b9093, b9294 and b11549; `tests/lanes`). Between those builds the renaming happened, at a build not known here.
"""

import re
import shlex
from dataclasses import dataclass

from profiles.terms import Model, Setup
from tuner.export import versions
from tuner.export.picking import (
    Engine,
    Objection,
    kind_objection,
    made,
    one_length,
    pick,
    place_of,
    refused,
    weights_objection,
)
from tuner.export.terms import Deployment, Export


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


def emit(deployment: Deployment, version: str | None) -> Export:
    """One line of arguments for `llama-server`, or a note on why there is none. Raises InputError: no build number."""
    text = versions.server_help() if version is None else None
    if text is None:
        engine = versions.engine_of("llamacpp", version)
        spelling = spelling_of_build(versions.build_of(engine.version))
    else:
        engine = Engine(form="llamacpp", title="llama.cpp", version="(the llama-server installed here)")
        spelling = spelling_of_help(text)
    if spelling is None:
        known = ", ".join(one.builds for one in SPELLINGS)
        return refused([f"the flags of {engine.name} are not known: they are for {known}"])
    setup, notes = pick(deployment, engine, _objection(deployment.target, engine))
    if setup is None or setup.draft is None:
        return refused(notes)
    if setup.draft.kind == "ngram":
        # with at least one match of the smallest size a round drafts, here as in the measured look-up
        notes.append(
            f"llama.cpp looks up the latest {setup.draft.min_match} tokens alone; the choice was measured with the "
            f"longest match of {setup.draft.max_match} down to {setup.draft.min_match}, the earliest in the text"
        )
    elif deployment.choice.temperature > 0.0:
        notes.append("llama.cpp drafts greedily, the choice was measured with sampled drafts")
    notes.append(one_length(deployment, setup, "--parallel"))
    return made(deployment, engine, setup, " ".join(_words(setup, spelling)) + "\n", notes)


def _objection(target: Model, engine: Engine) -> Objection:
    def objection(setup: Setup) -> str | None:
        # `stop_below` is not llama.cpp's p-min: that one looks at the drafter's ten likeliest tokens alone, and older
        # builds looked after the token was taken
        return kind_objection(setup, engine) or weights_objection(target, setup, engine) or _length_objection(setup)

    return objection


def _length_objection(setup: Setup) -> str | None:
    """A look-up draft shorter than its match is dropped (`common_ngram_simple_draft`): such a setup never drafts."""
    smallest = setup.draft.min_match if setup.draft is not None and setup.draft.kind == "ngram" else None
    if smallest is None or setup.length >= smallest:
        return None
    return f"llama.cpp drops look-up drafts shorter than the match, {smallest} tokens here"


def _words(setup: Setup, spelling: Spelling) -> list[str]:
    draft = setup.draft
    assert draft is not None
    if draft.model is None:
        return [part.format(n=draft.min_match, k=setup.length) for part in spelling.ngram]
    quoted = shlex.quote(place_of(draft.model))
    return [
        part.replace("{model}", quoted) if "{model}" in part else part.format(k=setup.length) for part in spelling.model
    ]
