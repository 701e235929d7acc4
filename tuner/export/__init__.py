"""Turns a choice into what a serving engine takes; one small module per engine.

The text goes to stdout and the note to stderr, so that a deploy script can read the one and a person the other. How
the choice was made it must not know.
"""

import json
import shlex
from dataclasses import asdict
from typing import Literal, get_args

from packaging.version import Version

from profiles.records.core import Model, Setup, Workload
from profiles.records.errors import InputError
from tuner.export import llamacpp, sglang, transformers, trtllm, vllm
from tuner.export.select import label_of
from tuner.export.types import Deployment, Export
from tuner.export.versions import engine_of
from tuner.policy.policy import Choice
from tuner.policy.query import MIXED

__all__ = ["FORMS", "Deployment", "Export", "Form", "emit", "record_words", "words"]

Form = Literal["json", "llamacpp", "sglang", "transformers", "trtllm", "vllm"]
FORMS: tuple[Form, ...] = get_args(Form)
EMITTERS = {"sglang": sglang.emit, "transformers": transformers.emit, "trtllm": trtllm.emit, "vllm": vllm.emit}


def emit(deployment: Deployment, form: str, version: str | None = None) -> Export:
    """The best setup the engine can express, spelled for its `version`; or the choice as a JSON document.

    `version` None takes the installed engine's, and without one the newest known, which the note says. Raises
    InputError: an unknown form, a version that is none.
    """
    if form == "json":
        choice = deployment.choice
        text = json.dumps(asdict(choice), indent=2, allow_nan=False) + "\n"
        return Export(text=text, setup=choice.setup, label=label_of(deployment, deployment.where, choice.setup))
    if form == "llamacpp":
        return llamacpp.emit(deployment, version)
    if form in EMITTERS:
        return EMITTERS[form](deployment, engine_of(form, version))
    raise InputError(f"format {form!r}: allowed are {', '.join(FORMS)}")


def words(target: Model, setup: Setup, workload: Workload, form: str, version: str | None = None) -> list[str]:
    """The arguments that tell an engine a setup; none for plain decoding. Raises InputError where it has none."""
    if setup.draft is None:
        return []
    choice = Choice(
        batch_size=workload.batch_size,
        context_length=workload.context_length,
        domain=MIXED,
        temperature=workload.temperature,
        setup=setup,
        reason="asked for",
    )
    made = emit(Deployment(target=target, choice=choice, rows=(choice,), measured_on=form), form, version)
    if not made.text:
        raise InputError(f"{setup.name}: {made.note}")
    return shlex.split(made.text)


def record_words(form: str, version: str | None = None) -> tuple[str, ...]:
    """The arguments by which a server tells of each request how it was drafted; none where its version has none."""
    if form != "vllm" or Version(engine_of(form, version).version) < Version(vllm.FIRST_RECORDS):
        return ()
    return vllm.RECORDS
