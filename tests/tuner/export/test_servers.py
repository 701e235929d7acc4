"""What a choice becomes for SGLang, TensorRT-LLM and llama.cpp: spellings by version, refusals, hostile names."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.builtin import IMPORTED_MARKS
from profiles.engines.llamacpp.flags import FIRST_BUILD
from profiles.engines.releases import NEWEST
from profiles.records.core import Draft, Setup
from tests.lanes.cases import cases, deployment, draft_at, model_at
from tests.lanes.places import LANES
from tests.support.policies import CODE_DRAFT, NGRAM, TARGET, choice, forecast
from tuner.export import Form, emit
from tuner.policy.policy import Choice

WITH_MODEL = Setup(draft=CODE_DRAFT, length=4)
LOOK_UP = Setup(draft=NGRAM, length=3)
PACKED = Setup(draft=draft_at("draft.gguf"), length=4)
GGUF_TARGET = model_at("target.gguf")


def flags_of(text: str) -> dict[str, str]:
    """Flag to value, as the shell and an argument parser read them."""
    words = [part for word in shlex.split(text) for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    assert len(words) % 2 == 0
    return dict(zip(words[::2], words[1::2], strict=True))


def test_sglang_draft_model() -> None:
    """A draft model is a chain of k steps; the count of verified tokens has one more."""
    export = emit(deployment(choice(Setup(draft=draft_at("org/draft", "v1"), length=4))), "sglang", "0.5.23")
    assert export.text == (
        "--speculative-algorithm STANDALONE --speculative-draft-model-path org/draft "
        "--speculative-draft-model-revision v1 --speculative-num-steps 4 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 5\n"
    )
    assert export.label == "measured on torch"
    assert "--max-running-requests to 48" in str(export.note)


def test_sglang_look_up() -> None:
    """A look-up goes out as a trie of breadth 1, and the note says that the match sizes do not."""
    export = emit(deployment(choice(LOOK_UP)), "sglang", "0.5.3")
    assert flags_of(export.text)["--speculative-num-draft-tokens"] == "4"
    assert "the measured matches of 2 to 4 tokens have no flag" in str(export.note)


def yaml_of(text: str) -> dict[str, object]:
    """The mapping under `speculative_config`, read as strictly as it is written: JSON values, one key a line."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines[0] == "speculative_config:"
    pairs = [re.fullmatch(r"  (\w+): (.+)", line) for line in lines[1:]]
    assert all(pairs)
    return {pair[1]: json.loads(pair[2]) for pair in pairs if pair}


def test_trtllm_file() -> None:
    """A file with its label and version as comments; the weights' key is the version's own."""
    export = emit(deployment(choice(WITH_MODEL)), "trtllm", "1.3.0rc27")
    assert export.text == (
        "# family/draft-code k=4 for mixed prompts, batch 1, context up to 512 (measured on torch)\n"
        "# for TensorRT-LLM 1.3.0rc27\n"
        "# k=4 is for batches up to 1; from 2 on nothing was measured: keep max_batch_size at or under 1\n"
        "speculative_config:\n"
        '  decoding_type: "Draft_Target"\n'
        "  max_draft_len: 4\n"
        '  speculative_model: "family/draft-code"\n'
    )
    assert yaml_of(emit(deployment(choice(WITH_MODEL)), "trtllm", "1.2.1").text)["speculative_model_dir"]


def test_trtllm_look_up() -> None:
    """A look-up has a largest match only; that it also looks up single tokens is said."""
    export = emit(deployment(choice(LOOK_UP)), "trtllm", "1.2.1")
    assert yaml_of(export.text) == {"decoding_type": "NGram", "max_draft_len": 3, "max_matching_ngram_size": 4}
    assert "also looks up single tokens; the choice was measured with matches of 2 or more" in str(export.note)
    assert f"# {export.note}\n" in export.text


@pytest.mark.parametrize("version", ["1.2.0", "1.3.0rc26", "1.3.0rc27", "1.4.0rc1"])
def test_trtllm_has_one_length(version: str) -> None:
    """What its schedule means differs by version, so the asked batch's length alone is told, with its batches."""
    export = emit(cases(TARGET, CODE_DRAFT)["schedule"], "trtllm", version)
    key = "speculative_model" if version >= "1.3.0rc27" else "speculative_model_dir"
    assert yaml_of(export.text) == {"decoding_type": "Draft_Target", "max_draft_len": 4, key: "family/draft-code"}
    assert "k=4 is for batches up to 1; from 2 on" in str(export.note)


def test_trtllm_takes_no_revision() -> None:
    """A revision cannot be told."""
    pinned = choice(Setup(draft=draft_at("org/draft", "v1"), length=4), alternatives=(forecast(LOOK_UP),))
    export = emit(deployment(pinned), "trtllm", "1.2.1")
    assert export.setup == LOOK_UP
    assert "TensorRT-LLM takes no revision: download v1 of org/draft" in str(export.note)


@given(
    name=st.text(min_size=1).filter(
        lambda text: not (text.startswith(IMPORTED_MARKS) or text.lower().endswith(".gguf"))
    )
)
def test_trtllm_any_name_is_one_value(name: str) -> None:
    """Any name stays one quoted value of its key, and all other lines are keys or comments."""
    export = emit(deployment(choice(Setup(draft=draft_at(name), length=2), domain=name)), "trtllm", "1.4.0rc1")
    values = yaml_of(export.text)
    assert values["speculative_model"] == name or name.startswith("builtin:")
    assert set(values) == {"decoding_type", "max_draft_len", "speculative_model"}


def for_llamacpp(answer: Choice, build: str) -> str:
    return emit(deployment(answer, target=GGUF_TARGET), "llamacpp", build).text


def test_llamacpp_draft_model() -> None:
    draft = "--spec-draft-model draft.gguf --spec-draft-n-max 4 --spec-draft-n-min 0 --spec-draft-p-min 0.0"
    for build in ("b9294", "11549"):
        assert for_llamacpp(choice(PACKED), build) == f"--spec-type draft-simple {draft}\n"


def test_llamacpp_look_up() -> None:
    """A look-up has the smallest measured match, which drafts in the same rounds; that is said."""
    export = emit(deployment(choice(LOOK_UP), target=GGUF_TARGET), "llamacpp", "b11549")
    assert export.text == "--spec-type ngram-simple --spec-ngram-simple-size-n 2 --spec-ngram-simple-size-m 3\n"
    assert "llama.cpp looks up the latest 2 tokens alone" in str(export.note)


HELP = "--spec-draft-n-max N\n--spec-type none,draft-simple\n--spec-ngram-simple-size-n N\n--draft-max N removed"


def test_installed_llamacpp_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a version the server on the PATH is asked; one whose flags are strange gets nothing."""
    case = deployment(choice(PACKED), target=GGUF_TARGET)
    monkeypatch.setenv("DRAFTPICK_LLAMA_SERVER", "llama-server")
    monkeypatch.setattr("profiles.hardware.software.server_help", lambda _: HELP)
    assert "--spec-draft-n-max 4" in emit(case, "llamacpp").text
    monkeypatch.setattr("profiles.hardware.software.server_help", lambda _: "usage: something else")
    export = emit(case, "llamacpp")
    assert export.text == ""
    assert "(the llama-server installed here) are not known" in str(export.note)
    monkeypatch.setattr("profiles.hardware.software.server_help", lambda _: None)
    assert "no llama.cpp is installed here: emitted for llama.cpp b11549" in str(emit(case, "llamacpp").note)


def test_a_real_program_is_asked_for_its_help(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `llama-server` found on the PATH is run with --help; one that cannot run counts as none."""
    program = tmp_path / "llama-server"  # type: ignore[operator]
    program.write_text(f"#!/bin/sh\necho '{HELP}'\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program.chmod(0o755)
    assert "--spec-type draft-simple" in emit(deployment(choice(PACKED), target=GGUF_TARGET), "llamacpp").text
    program.write_text("not a program")
    assert "no llama.cpp is installed here" in str(
        emit(deployment(choice(PACKED), target=GGUF_TARGET), "llamacpp").note
    )


@pytest.mark.parametrize("form", ["vllm", "sglang", "trtllm", "llamacpp", "transformers"])
def test_a_carried_draft_has_no_place(form: Form) -> None:
    """A draft that a bundle brought from a path elsewhere is not emitted as a hub id; a look-up beside it is."""
    name = "imported:draft one.gguf" if form == "llamacpp" else "imported:draft one"
    target = GGUF_TARGET if form == "llamacpp" else TARGET
    answer = choice(Setup(draft=draft_at(name), length=4), alternatives=(forecast(LOOK_UP),))
    export = emit(deployment(answer, target=target), form)
    assert export.setup == LOOK_UP
    lines = [line for line in export.text.splitlines() if not line.startswith("#")]
    assert "draft one" not in "".join(lines)
    assert "came in a bundle from a path of another machine: it is not here" in str(export.note)


def test_a_carried_target_matters_where_it_is_named() -> None:
    """Only the transformers snippet loads the target; the servers' arguments do not name it."""
    case = deployment(choice(LOOK_UP), target=model_at("imported:target"))
    assert "the target target came in a bundle from a path" in str(emit(case, "transformers").note)
    assert emit(case, "transformers").text == ""
    assert emit(case, "vllm").text
    assert emit(replace(case, target=model_at("imported:t.gguf")), "llamacpp").text
    assert "is a GGUF file" in str(emit(replace(case, target=model_at("imported:t.gguf")), "vllm").note)


@pytest.mark.parametrize("form", ["vllm", "sglang", "llamacpp", "transformers"])
def test_builtin_models_may_not_be_installed(form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package has no built-in models, no path of one is emitted; a look-up is, where no target is named."""
    monkeypatch.setattr("profiles.engines.rules.BUILTIN_FOLDER", tmp_path)
    answer = choice(Setup(draft=draft_at("builtin:draft-general"), length=4), alternatives=(forecast(LOOK_UP),))
    export = emit(deployment(answer, target=model_at("builtin:target")), form)
    assert str(tmp_path) not in export.text
    assert export.setup == (None if form == "transformers" else LOOK_UP)
    assert "comes with a source checkout, not with the installed package" in str(export.note)


@pytest.mark.parametrize("form", ["sglang", "trtllm", "llamacpp"])
def test_alternative_is_emitted(form: Form) -> None:
    """Where the engine has no composite, the best forecast setup it has goes out, not called proven."""
    target, draft = (GGUF_TARGET, draft_at("d.gguf")) if form == "llamacpp" else (TARGET, CODE_DRAFT)
    composite = Setup(draft=Draft(kind="composite", model=draft.model, max_match=4, min_match=2), length=5)
    instead = Setup(draft=draft, length=2)
    answer = choice(composite, alternatives=(forecast(instead), forecast(LOOK_UP)))
    export = emit(deployment(answer, target=target, measured_on=form), form)
    assert export.setup == instead
    assert export.label == f"forecast on {form}"
    assert "is left out" in str(export.note)
    assert "not proven by runs" in str(export.note)
    proven = emit(deployment(choice(instead), target=target, measured_on=form), form)
    assert proven.label == "proven"


@pytest.mark.parametrize(("form", "limit"), [("sglang", "--max-running-requests"), ("llamacpp", "--parallel")])
def test_one_length_for_every_batch(form: Form, limit: str) -> None:
    """An engine that keeps one length gets the asked batch's, and the batches it was decided for are named."""
    target, draft = (GGUF_TARGET, draft_at("d.gguf")) if form == "llamacpp" else (TARGET, CODE_DRAFT)
    case = cases(target, draft)["schedule"]
    said = f"k=4 is for batches up to 1; from 2 on {case.rows[1].setup.name} was decided: keep {limit} at or under 1"
    assert said in str(emit(case, form).note)
    at_four = emit(replace(case, choice=case.rows[1]), form)
    assert at_four.setup == case.rows[1].setup
    said = f"k=2 is for batches 2 to 4, smaller ones otherwise; from 5 on plain was decided: keep {limit} at or under 4"
    assert said in str(at_four.note)


def test_newest_known_is_checked_by_a_lane() -> None:
    """The version assumed where nothing is installed is one that a lane puts before the real engine."""
    lanes = {(lane.form, lane.version) for lane in LANES}
    assert {(form, NEWEST[form]) for form in ("vllm", "sglang", "llamacpp")} <= lanes
    assert ("llamacpp", f"b{FIRST_BUILD}") in lanes
