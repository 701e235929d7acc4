"""A choice as a Python snippet for `generate` of Hugging Face transformers (checked with 5.23).

`generate(num_assistant_tokens=...)` does not reach the draft: only the generation config of the assistant counts, and
its defaults (20 tokens, growing, confidence 0.4) are not the length that was measured.
"""

from pathlib import Path

from profiles.engines import rules
from profiles.engines.releases import EngineRelease
from profiles.records.core import Model, Setup
from tuner.export.select import Deployment, Export, Pick, comment, look_up_notes, title
from tuner.policy.policy import Choice


def objection(deployment: Deployment, setup: Setup, release: EngineRelease) -> str | None:
    batch_size = deployment.choice.batch_size
    if batch_size > 1:
        return f"transformers drafts for batch size 1 only, and the choice is for {batch_size}"
    return rules.objection(deployment.target, setup, release)


def write(pick: Pick) -> Export:
    """A snippet that loads the models and defines `generate_kwargs`."""
    notes = look_up_notes(pick)
    return pick.export("\n".join([title(pick), *map(comment, notes), *_code(pick)]) + "\n", notes)


def _code(pick: Pick) -> list[str]:
    setup, draft = pick.setup, pick.draft
    kwargs = _sampling(pick.deployment.choice)
    lines = ["from transformers import AutoModelForCausalLM", "", _load("model", pick.deployment.target)]
    if draft.kind == "ngram":
        kwargs |= {"prompt_lookup_num_tokens": setup.length, "max_matching_ngram_size": draft.max_match}
    elif draft.kind == "early_exit":
        lines += _fixed_length("model", setup.length)  # the target is its own assistant
        kwargs["assistant_early_exit"] = draft.num_layers
    elif draft.model is not None:
        lines += [_load("assistant", draft.model), *_fixed_length("assistant", setup.length)]
    items = [f'"{key}": {value!r}' for key, value in kwargs.items()]
    if draft.kind == "model":
        items.append('"assistant_model": assistant')
    kwargs_line = f"generate_kwargs = {{{', '.join(items)}}}"
    return [*lines, kwargs_line, "# output_ids = model.generate(**inputs, **generate_kwargs)"]


def _load(variable: str, model: Model) -> str:
    path, more = rules.model_path(model), "" if model.revision is None else f", revision={model.revision!r}"
    if rules.is_gguf(model):
        more += f", gguf_file={Path(path).name!r}"
        path = str(Path(path).parent)
    return f"{variable} = AutoModelForCausalLM.from_pretrained({path!r}{more}, dtype={model.dtype!r})"


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
    return {"do_sample": True, "temperature": choice.temperature, "top_p": choice.top_p, "top_k": choice.top_k}
