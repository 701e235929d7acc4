"""Writes a choice as a Python snippet for `generate` of Hugging Face transformers (checked against 5.23).

`generate(num_assistant_tokens=...)` has no effect on the draft: only the generation config of the assistant counts,
and its defaults (20 tokens, growing, confidence 0.4) are not the length that was measured. It imports no transformers.
"""

from pathlib import Path

from packaging.version import Version

from profiles.records.core import Draft, Model, Setup
from tuner.export.select import (
    Engine,
    comment,
    is_gguf,
    label_of,
    made,
    pick,
    place_of,
    refused,
    title,
    weights_objection,
)
from tuner.export.types import Deployment, Export
from tuner.export.vocabulary import vocabulary_objection
from tuner.policy.policy import Choice

FIRST = "5.17.0"  # the oldest release this project is tested with


def emit(deployment: Deployment, engine: Engine) -> Export:
    """A snippet that loads the models and defines `generate_kwargs`, or a note on why there is none."""
    choice = deployment.choice
    if Version(engine.version) < Version(FIRST):
        return refused([f"{engine.name} is not known: from {FIRST} on it is"])

    def objection(setup: Setup) -> str | None:
        reason = _objection(setup, choice) or weights_objection(deployment.target, setup, engine)
        return reason or vocabulary_objection(deployment.target, setup, engine)

    setup, notes = pick(deployment, engine, objection)
    if setup is None or setup.draft is None:
        return refused(notes)
    caveat = _caveat(setup.draft)
    label = label_of(deployment, engine.form, setup)
    comments = [title(deployment, setup, label), *([] if caveat is None else [comment(caveat)])]
    text = "\n".join(comments + _lines(deployment, setup, setup.draft)) + "\n"
    return made(deployment, engine, setup, text, notes if caveat is None else [*notes, caveat])


def _objection(setup: Setup, choice: Choice) -> str | None:
    assert setup.draft is not None  # only drafting setups are asked about
    if choice.batch_size > 1:
        return f"transformers drafts for batch size 1 only, and the choice is for {choice.batch_size}"
    if setup.stop_below is not None:
        return "transformers has no stop before a proposal"
    if setup.draft.kind == "composite":
        return "transformers takes a look-up or a draft model, not both"
    return None


def _lines(deployment: Deployment, setup: Setup, draft: Draft) -> list[str]:
    kwargs = _sampling(deployment.choice)
    lines = ["from transformers import AutoModelForCausalLM", "", _load("model", deployment.target)]
    if draft.kind == "ngram":
        kwargs |= {"prompt_lookup_num_tokens": setup.length, "max_matching_ngram_size": draft.max_match}
    elif draft.kind == "early_exit":
        lines += _fixed_length("model", setup.length)  # the target is its own assistant
        kwargs["assistant_early_exit"] = draft.num_layers
    else:
        lines += [_load("assistant", _weights(draft)), *_fixed_length("assistant", setup.length)]
    items = [f'"{key}": {value!r}' for key, value in kwargs.items()]
    if draft.kind == "model":
        items.append('"assistant_model": assistant')
    kwargs_line = f"generate_kwargs = {{{', '.join(items)}}}"
    return [*lines, kwargs_line, "# output_ids = model.generate(**inputs, **generate_kwargs)"]


def _caveat(draft: Draft) -> str | None:
    if draft.kind != "ngram" or draft.min_match == 1:
        return None
    return (
        f"transformers also looks up single tokens; the choice was measured with matches of {draft.min_match} or more"
    )


def _weights(draft: Draft) -> Model:
    assert draft.model is not None  # a record of kind "model" cannot be made without
    return draft.model


def _load(variable: str, model: Model) -> str:
    place, more = place_of(model), "" if model.revision is None else f", revision={model.revision!r}"
    if is_gguf(model):
        more += f", gguf_file={Path(place).name!r}"
        place = str(Path(place).parent)
    return f"{variable} = AutoModelForCausalLM.from_pretrained({place!r}{more}, dtype={model.dtype!r})"


def _fixed_length(variable: str, length: int) -> list[str]:
    """Exactly `length` drafted tokens a round: a threshold above 0 would stop early and adapt itself."""
    return [
        f"{variable}.generation_config.num_assistant_tokens = {length}",
        f'{variable}.generation_config.num_assistant_tokens_schedule = "constant"',
        f"{variable}.generation_config.assistant_confidence_threshold = 0.0",
    ]


def _sampling(choice: Choice) -> dict[str, object]:
    if choice.temperature == 0.0:
        return {"do_sample": False}
    law = {"temperature": choice.temperature, "top_p": choice.top_p, "top_k": choice.top_k}
    return {"do_sample": True, **law}
