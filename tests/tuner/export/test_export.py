"""What a choice becomes for transformers, checked by running it on tiny random models; and as JSON."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.records.errors import InputError
from tests.lanes.cases import deployment, draft_at, model_at
from tests.lanes.transformers_lane import PROMPT, drafts_as_asked, rounds_of, run_snippet
from tests.support.policies import CODE_DRAFT, EARLY_EXIT, NGRAM, TARGET, choice, forecast, measured
from tests.support.tiny import READS_GGUF, write_gguf, write_model
from tuner.export import EXPORTERS as ENGINES
from tuner.export import Export, Form, emit
from tuner.policy.policy import Choice


def test_json_form() -> None:
    """The JSON form is the choice with every field, plain decoding included."""
    raw = json.loads(emit(deployment(choice(Setup(draft=NGRAM, length=3))), "json").text)
    assert raw["setup"]["draft"]["max_match"] == 4
    assert raw["setup"]["length"] == 3
    assert raw["measured"]["speedup"]["estimate"] == 1.6
    plain = emit(deployment(choice(PLAIN)), "json")
    assert json.loads(plain.text)["setup"] == {"draft": None, "length": 0, "stop_below": None}
    assert plain.note is None


def test_unknown_form() -> None:
    """Another form is refused, naming those there are."""
    with pytest.raises(
        InputError, match="format 'yaml': allowed are json, llamacpp, sglang, transformers, trtllm, vllm"
    ):
        emit(deployment(choice()), "yaml")  # type: ignore[arg-type]


def test_model_draft_snippet() -> None:
    """The snippet is readable Python that sets the assistant's own generation config."""
    text = emit(deployment(choice(Setup(draft=CODE_DRAFT, length=4))), "transformers").text
    assert text == (
        "# family/draft-code k=4 for mixed prompts, batch 1, context up to 512 (measured on torch)\n"
        "from transformers import AutoModelForCausalLM\n"
        "\n"
        "model = AutoModelForCausalLM.from_pretrained('family/target', dtype='float32')\n"
        "assistant = AutoModelForCausalLM.from_pretrained('family/draft-code', dtype='float32')\n"
        "assistant.generation_config.num_assistant_tokens = 4\n"
        'assistant.generation_config.num_assistant_tokens_schedule = "constant"\n'
        "assistant.generation_config.assistant_confidence_threshold = 0.0\n"
        'generate_kwargs = {"do_sample": False, "assistant_model": assistant}\n'
        "# output_ids = model.generate(**inputs, **generate_kwargs)\n"
    )


@READS_GGUF
def test_every_spelling_of_a_model_loads(tmp_path: Path) -> None:
    """A GGUF file and a model that ships are named as transformers takes them."""
    packed = write_gguf(tmp_path / "target.gguf", write_model(tmp_path / "llama", num_layers=2))
    for name, num_layers in ((str(packed), 2), ("builtin:draft-code", 1)):
        target = Model(name=name, dtype="float32", digest="target", num_params=1)
        text = emit(deployment(choice(Setup(draft=NGRAM, length=2)), target=target), "transformers").text
        assert run_snippet(text)["model"].config.num_hidden_layers == num_layers


def test_sampling_is_part_of_the_snippet() -> None:
    """Temperature, top-p and top-k go out as they were measured."""
    sampled = choice(Setup(draft=CODE_DRAFT, length=4), temperature=0.7, top_p=0.9, top_k=40)
    text = emit(deployment(sampled), "transformers").text
    assert '{"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "assistant_model": assistant}' in text


def test_names_cannot_break_out_of_the_snippet() -> None:
    """A line break or a quote in a name or a domain stays inside its comment or string."""
    nasty = Model(name="a'\nimport os", revision="main", dtype="bfloat16", digest="cc", num_params=1)
    odd = choice(Setup(draft=Draft(kind="model", model=nasty), length=1), domain="x\nraise SystemExit")
    text = emit(deployment(odd, target=nasty), "transformers").text
    compile(text, "snippet", "exec")
    first = "# a' import os k=1 for x raise SystemExit prompts, batch 1, context up to 512 (measured on torch)"
    assert text.splitlines()[0] == first
    assert """from_pretrained("a'\\nimport os", revision='main', dtype='bfloat16')""" in text


COMPOSITE = Draft(kind="composite", model=CODE_DRAFT.model, max_match=4, min_match=2)
WITH_MODEL, LOOK_UP = Setup(draft=CODE_DRAFT, length=4), Setup(draft=NGRAM, length=3)
PACKED, GGUF_TARGET = Setup(draft=draft_at("draft.gguf"), length=4), model_at("target.gguf")
UNKNOWN_BUILD = "are not known: they are from b9294 on"
NOTHING: list[tuple[Form, str | None, Choice, Model, str]] = [
    *((form, None, choice(PLAIN), TARGET, "plain decoding is the choice. plain was the fastest.") for form in ENGINES),
    ("vllm", "0.32.0", choice(PLAIN, alternatives=(forecast(WITH_MODEL),)), TARGET, "nothing to set for vLLM: plain"),
    ("transformers", None, choice(LOOK_UP, batch_size=4), TARGET, "batch size 1 only, and the choice is for 4"),
    ("transformers", None, choice(replace(WITH_MODEL, stop_below=0.4)), TARGET, "no stop before a proposal"),
    ("transformers", None, choice(Setup(draft=COMPOSITE, length=2)), TARGET, "a look-up or a draft model, not both"),
    ("transformers", "4.57.6", choice(LOOK_UP), TARGET, "transformers 4.57.6 is not known: from 5.17.0 on it is"),
    ("sglang", "0.5.2", choice(WITH_MODEL), TARGET, "SGLang 0.5.2 is not known: from 0.5.3 on it is"),
    ("trtllm", "1.1.0", choice(WITH_MODEL), TARGET, "TensorRT-LLM 1.1.0 is not known: from 1.2.0 on it is"),
    ("vllm", "0.23.0", choice(LOOK_UP), TARGET, "vLLM 0.23.0 is not known: from 0.24.0 on it is"),
    ("vllm", "0.32.0", choice(Setup(draft=EARLY_EXIT, length=2)), TARGET, "cannot draft with the target's own layers"),
    ("vllm", "0.32.0", choice(replace(WITH_MODEL, stop_below=0.4)), TARGET, "no stop before a proposal"),
    ("vllm", "0.32.0", choice(Setup(draft=draft_at("a.gguf"), length=2)), TARGET, "the draft a.gguf is a GGUF file"),
    ("vllm", "0.32.0", choice(LOOK_UP), model_at("B.GGUF"), "the target B.GGUF is a GGUF file"),
    *((form, None, choice(PACKED), TARGET, "the draft draft.gguf is a GGUF file") for form in ("sglang", "trtllm")),
    *((form, None, choice(LOOK_UP), GGUF_TARGET, "target.gguf is a GGUF file") for form in ("sglang", "trtllm")),
    *(("llamacpp", build, choice(PACKED), GGUF_TARGET, UNKNOWN_BUILD) for build in ("b6800", "9293")),
    ("llamacpp", "b11549", choice(WITH_MODEL), GGUF_TARGET, "convert the draft family/draft-code and measure that"),
    ("llamacpp", "b11549", choice(LOOK_UP), TARGET, "GGUF files only: convert the target family/target and measure"),
    ("llamacpp", "b11549", choice(replace(PACKED, stop_below=0.5)), GGUF_TARGET, "no stop before a proposal"),
    ("llamacpp", "b11549", choice(Setup(draft=EARLY_EXIT, length=2)), GGUF_TARGET, "with the target's own layers"),
    ("llamacpp", "b11549", choice(replace(LOOK_UP, length=1)), GGUF_TARGET, "shorter than the match, 2 tokens here"),
]


@pytest.mark.parametrize(("form", "version", "answer", "target", "note"), NOTHING)
def test_nothing_to_emit(form: Form, version: str | None, answer: Choice, target: Model, note: str) -> None:
    """Where an engine cannot, or need not, be told, there is no text, setup, label or claim; the note says why."""
    export = emit(deployment(answer, target=target), form, version)
    assert export == Export(text="", note=export.note)
    assert note in str(export.note)


@pytest.mark.parametrize(
    ("form", "versions", "needed"),
    [
        ("vllm", ("latest", "", "0.x", "b6800"), r"engine version .*: a version of vLLM is needed, like 0\.33\.0"),
        ("llamacpp", ("0.1.0", "bb1", "b-1", "", "b0", "latest"), r"llama\.cpp takes build numbers like b6800 or 6800"),
    ],
)
def test_version_that_is_none(form: Form, versions: tuple[str, ...], needed: str) -> None:
    """A version that cannot be read is refused, naming what is allowed."""
    for version in versions:
        with pytest.raises(InputError, match=needed):
            emit(deployment(choice(PACKED), target=GGUF_TARGET), form, version)


NASTY = ("a b", "it's", 'say "so"', "two\nlines", "$(reboot)", "`id`", "--evil", "back\\slash", "ü✓", "'; rm -rf x; '")
NASTY += ("# no comment", "{k}")
SHELLS = (("vllm", "0.32.0"), ("sglang", "0.5.23"), ("llamacpp", "b11549"))


@pytest.mark.parametrize(("form", "version"), SHELLS)
@pytest.mark.parametrize("name", NASTY)
def test_names_stay_in_their_word(form: Form, version: str, name: str) -> None:
    """Quotes, spaces, line breaks, leading dashes and shell words in a name come out of the shell as one value."""
    ending, target = (".gguf", GGUF_TARGET) if form == "llamacpp" else ("", TARGET)
    answer = choice(Setup(draft=draft_at(name + ending), length=2))
    text = emit(deployment(answer, target=target), form, version).text
    words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word[:6] == "--spec" else [word])]
    flags, values = words[::2], [json.loads(words[1])["model"]] if form == "vllm" else words[1::2]
    assert name + ending in (*flags, *values)  # after a flag of llama.cpp without a value it is among the flags
    assert all(word.startswith("--") for word in flags if word != name + ending)


@pytest.mark.parametrize("length", [1, 3, 7])
@pytest.mark.parametrize("kind", ["model", "ngram", "early_exit"])
def test_snippet_drafts_that_many_tokens(kind: str, length: int, tmp_path: Path) -> None:
    """Run on tiny random models, a round drafts k tokens, or all but one of those left; a look-up at most k."""
    target = model_at(write_model(tmp_path / "target", num_layers=3, eos_token_id=None))
    own = model_at(write_model(tmp_path / "draft", num_layers=1, seed=1, eos_token_id=None))
    drafts = {
        "model": Draft(kind="model", model=own),
        "ngram": Draft(kind="ngram", max_match=3, min_match=1),
        "early_exit": Draft(kind="early_exit", num_layers=2),
    }
    export = emit(deployment(choice(Setup(draft=drafts[kind], length=length)), target=target), "transformers")
    rounds = rounds_of(export.text, 30)
    assert drafts_as_asked(rounds, length, 30, looks_up=kind == "ngram")


def test_snippet_output_is_plain_output(tmp_path: Path) -> None:
    """What the snippet generates is what the target generates alone (greedy)."""
    target = model_at(write_model(tmp_path / "target", num_layers=3, eos_token_id=None))
    draft = Draft(kind="early_exit", num_layers=2)
    names = run_snippet(emit(deployment(choice(Setup(draft=draft, length=3)), target=target), "transformers").text)
    settings = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 30}
    plain = names["model"].generate(PROMPT, do_sample=False, **settings)
    assert torch.equal(plain, names["model"].generate(PROMPT, **settings, **names["generate_kwargs"]))


def test_json_is_labelled() -> None:
    """The JSON form is for no engine: proven where the runs were, and the label says where."""
    answer = choice(Setup(draft=NGRAM, length=3))
    assert emit(deployment(answer), "json").label == "proven"
    beaten = choice(PLAIN, measured=measured(Setup(draft=NGRAM, length=3), 0.9))  # timed beside what lost
    assert emit(deployment(beaten), "json").label == "measured on torch"
    assert emit(deployment(choice(PLAIN, evidence=())), "json").label == "not measured"


@pytest.mark.parametrize("form", ["json", "transformers", "vllm", "sglang", "trtllm"])
def test_what_was_not_run_is_a_forecast(form: Form) -> None:
    """A label says measured only of a setup that was timed; the title in the text says the same."""
    setup = Setup(draft=NGRAM, length=3)
    others = measured(Setup(draft=NGRAM, length=2))
    for changes in ({"measured": None}, {"measured": others}):
        export = emit(deployment(choice(setup, proven=False, **changes)), form)
        assert export.label == "forecast on torch"
        assert "measured on" not in export.text
    assert emit(deployment(choice(setup, proven=False)), form).label.endswith(" on torch")


@pytest.mark.parametrize("form", ["transformers", "vllm", "sglang"])
@pytest.mark.parametrize("vocab_size", [320, None])
def test_padded_vocabularies_are_refused(form: Form, vocab_size: int | None) -> None:
    """A draft whose embeddings are padded to another size ends these engines, so it is not emitted."""
    target = replace(model_at("org/target"), vocab_size=300)
    padded = replace(model_at("org/draft"), vocab_size=vocab_size)
    export = emit(deployment(choice(Setup(draft=Draft(kind="model", model=padded), length=2)), target=target), form)
    assert (export.text == "") == (vocab_size is not None)
    if vocab_size is not None:
        assert "needs equal vocabulary sizes, and the target has 300, the draft 320" in str(export.note)
