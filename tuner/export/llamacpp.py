"""Writes a choice as arguments of llama.cpp's `llama-server`, in the spelling of its build."""

import shlex

from profiles.engines.llamacpp.flags import SPELLINGS, Spelling, args_for, spelling_of_build, spelling_of_help
from profiles.records.core import Model, Setup
from tuner.export import versions
from tuner.export.select import (
    Engine,
    Objection,
    kind_objection,
    made,
    one_length,
    pick,
    place_of,
    refused,
    weights_objection,
    written_gguf,
)
from tuner.export.types import Deployment, Export


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
    if deployment.where != "llamacpp" and setup.draft.kind == "ngram":
        # with at least one match of the smallest size a round drafts, here as in the measured look-up
        notes.append(
            f"llama.cpp looks up the latest {setup.draft.min_match} tokens alone; the choice was measured with the "
            f"longest match of {setup.draft.max_match} down to {setup.draft.min_match}, the earliest in the text"
        )
    elif deployment.where != "llamacpp" and deployment.choice.temperature > 0.0:
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
    assert setup.draft is not None
    model = setup.draft.model
    weights = None if model is None else str(written_gguf(model) or place_of(model))
    return [shlex.quote(word) for word in args_for(setup, spelling, weights)]
