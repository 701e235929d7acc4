"""Writes a choice as a Python snippet for `generate` of Hugging Face transformers (checked against 5.23).

`generate(num_assistant_tokens=...)` has no effect on the draft: only the generation config of the assistant counts,
and its defaults (20 tokens, growing, confidence 0.4) are not the length that was measured. It imports no transformers.
"""

from pathlib import Path

from profiles.shipped import BUILTIN, FAMILY_FOLDER
from profiles.terms import Draft, Model
from tuner.export.terms import Export
from tuner.policy import Choice


def emit(choice: Choice, target: Model) -> Export:
    """A snippet that loads the models and defines `generate_kwargs`, or a note on why there is none."""
    draft = choice.setup.draft
    if draft is None:
        return Export(text="", note=f"nothing to set for transformers: plain decoding is the choice. {choice.reason}")
    if choice.batch_size > 1:
        note = f"transformers drafts for batch size 1 only, and the choice is for {choice.batch_size}"
        return Export(text="", note=note)
    if choice.setup.stop_below is not None:
        note = f"transformers has no stop before a proposal, and the choice is {choice.setup.name!r}"
        return Export(text="", note=note)
    if draft.kind == "composite":
        note = f"transformers takes a look-up or a draft model, not both, and the choice is {choice.setup.name!r}"
        return Export(text="", note=note)
    kwargs, caveat = _sampling(choice), _caveat(draft)
    lines = ["from transformers import AutoModelForCausalLM", "", _load("model", target)]
    if draft.kind == "ngram":
        kwargs |= {"prompt_lookup_num_tokens": choice.setup.length, "max_matching_ngram_size": draft.max_match}
    elif draft.kind == "early_exit":
        lines += _fixed_length("model", choice.setup.length)  # the target is its own assistant
        kwargs["assistant_early_exit"] = draft.num_layers
    else:
        lines += [_load("assistant", _weights(draft)), *_fixed_length("assistant", choice.setup.length)]
    items = [f'"{key}": {value!r}' for key, value in kwargs.items()]
    if draft.kind == "model":
        items.append('"assistant_model": assistant')
    lines += [f"generate_kwargs = {{{', '.join(items)}}}", "# output_ids = model.generate(**inputs, **generate_kwargs)"]
    title = f"{choice.setup.name} for {choice.domain} prompts, context up to {choice.context_length}"
    comments = [_comment(text) for text in (title, caveat) if text is not None]
    return Export(text="\n".join(comments + lines) + "\n", note=caveat)


def _caveat(draft: Draft) -> str | None:
    if draft.kind != "ngram" or draft.min_match == 1:
        return None
    return (
        f"transformers also looks up single tokens; the choice was measured with matches of {draft.min_match} or more"
    )


def _comment(text: str) -> str:
    """One line, whatever a name or a domain holds: a line break would end the comment."""
    return "# " + " ".join(text.split())


def _weights(draft: Draft) -> Model:
    assert draft.model is not None  # a record of kind "model" cannot be made without
    return draft.model


def _load(variable: str, model: Model) -> str:
    place, more = model.name, "" if model.revision is None else f", revision={model.revision!r}"
    if place.startswith(BUILTIN):
        place = str(FAMILY_FOLDER / place.removeprefix(BUILTIN))
    elif place.lower().endswith(".gguf"):
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
