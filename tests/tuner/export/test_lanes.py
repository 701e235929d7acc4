"""What is emitted, put before the engines' own parsers and config classes; skipped where a lane is not installed."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.records.core import Draft, Model, Setup
from tests.lanes.cases import cases, deployment, draft_at, model_at
from tests.lanes.places import LANES, RUNNING, Lane, ask
from tests.support.policies import NGRAM, choice
from tests.support.tiny import write_gguf, write_model
from tuner.export import Form, emit

pytestmark = pytest.mark.slow  # half a minute for each release of vLLM
NOT_ON_A_CPU = {"suffix": "Arctic Inference is required", "dspark": "Model Runner V1 does not support: dspark"}
SCHEDULE = "num_speculative_tokens_per_batch_size"


def lanes(form: str, *versions: str) -> pytest.MarkDecorator:
    """A test over the lanes of an engine, each skipped where it is not installed."""
    found = [lane for lane in LANES if lane.form == form and (not versions or lane.version in versions)]
    why = f"no lane: python -m tests.lanes.install {form}"
    marked = [
        pytest.param(lane, id=lane.version, marks=pytest.mark.skipif(not lane.is_whole, reason=why)) for lane in found
    ]
    return pytest.mark.parametrize("lane", marked)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Draft]:
    """A tiny target and draft, as directories; the folder has a space and a quote in its name."""
    folder = tmp_path_factory.mktemp("models") / "it's a folder"
    target = write_model(folder / "target", num_layers=2, eos_token_id=None)
    return model_at(target), draft_at(write_model(folder / "draft", num_layers=1, seed=1, eos_token_id=None))


@pytest.fixture(scope="module")
def packed(pair: tuple[Model, Draft]) -> tuple[Model, Draft]:
    """The same two as GGUF files that llama.cpp reads."""
    assert pair[1].model is not None
    files = []
    for folder in (Path(pair[0].name), Path(pair[1].model.name)):
        changes: dict[str, object] = {"tokenizer__ggml__pre": "gpt-2", "tokenizer__ggml__token_type": None}
        files.append(write_gguf(folder.with_suffix(".gguf"), folder, **changes))
    return model_at(files[0]), draft_at(files[1])


def emitted(form: Form, version: str, target: Model, draft: Draft) -> dict[str, list[str]]:
    """The words of every case that gives a text; by the case's name."""
    texts = {name: emit(case, form, version).text for name, case in cases(target, draft).items()}
    return {name: shlex.split(text) for name, text in texts.items() if text}


@lanes("vllm")
def test_vllm_takes_what_is_emitted(lane: Lane, pair: tuple[Model, Draft]) -> None:
    """vLLM's own classes accept every line for their version and read from it what was meant."""
    lines = emitted("vllm", lane.version, *pair)
    verdicts = dict(zip(lines, ask(lane, Path(pair[0].name), list(lines.values())), strict=True))
    assert {"look-up", "composite"} <= set(verdicts)
    for name, verdict in verdicts.items():
        assert verdict.accepted, f"{name}: {verdict.said}"
        given = json.loads(lines[name][1])
        for key, value in given.items():
            if key != SCHEDULE:
                assert verdict.read[key] == value, f"{name}: {key}"
        if SCHEDULE in given:
            assert verdict.read[SCHEDULE] == [0, 4, 2, 2, 2, *[0] * 28]


@lanes("vllm", "0.33.0", "0.24.0")
def test_vllm_takes_a_head(lane: Lane, pair: tuple[Model, Draft]) -> None:
    """An EAGLE head by its method, with a schedule: to vLLM's config class it is a draft like any other."""
    head = Draft(kind="native", method="eagle", model=pair[1].model)
    case = cases(pair[0], head)["schedule"]
    words = shlex.split(emit(case, "vllm", lane.version).text)
    (verdict,) = ask(lane, Path(pair[0].name), [words])
    assert verdict.accepted, verdict.said
    assert (verdict.read["method"], verdict.read["num_speculative_tokens"]) == ("eagle", 4)
    assert verdict.read[SCHEDULE][:4] == [0, 4, 2, 2]


@pytest.mark.skipif(not RUNNING.is_whole, reason="no lane: make test-vllm")
def test_vllm_takes_every_method(pair: tuple[Model, Draft], tmp_path: Path) -> None:
    """Each by what is emitted for it; heads by configs alone, which is all that vLLM's config class reads.

    A look-up by suffixes needs a package that vLLM does not bring, and DSpark the model runner of GPUs, which it says.
    """
    config = json.loads((Path(str(pair[1].model and pair[1].model.name)) / "config.json").read_text(encoding="utf-8"))
    block = config | {"model_type": "qwen3", "block_size": 4}
    nextn = json.loads((Path(pair[0].name) / "config.json").read_text(encoding="utf-8"))
    nextn |= {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "num_nextn_predict_layers": 1}
    configs = {
        "dspark": block | {"architectures": ["Qwen3DSparkModel"]},
        "dflash": block | {"architectures": ["DFlashDraftModel"]},
        "nextn": nextn,
    }
    for name, values in configs.items():
        shutil.copytree(pair[0].name, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(values), encoding="utf-8")
    by_target = {
        pair[0].name: {
            **{method: replace(pair[1], kind="native", method=method) for method in ("eagle", "eagle3")},
            **{
                method: Draft(kind="native", method=method, model=model_at(tmp_path / method))
                for method in ("dflash", "dspark")
            },
            "suffix": Draft(kind="native", method="suffix"),
            "draft_model": pair[1],
            "ngram": NGRAM,
        },
        str(tmp_path / "nextn"): {"mtp": Draft(kind="native", method="mtp")},
    }
    for target, drafts in by_target.items():
        answers = {method: deployment(choice(Setup(draft=draft, length=3))) for method, draft in drafts.items()}
        lines = {method: shlex.split(emit(case, "vllm", RUNNING.version).text) for method, case in answers.items()}
        for method, verdict in zip(lines, ask(RUNNING, Path(target), list(lines.values())), strict=True):
            if not verdict.accepted:
                assert NOT_ON_A_CPU.get(method, "?") in verdict.said, f"{method}: {verdict.said[:500]}"
                continue
            assert (verdict.read["method"], verdict.read["num_speculative_tokens"]) == (method, 3)


@lanes("vllm", "0.33.0", "0.24.0")
def test_vllm_refuses_dead_keys_and_zero(lane: Lane, pair: tuple[Model, Draft]) -> None:
    """What is never emitted is an error there: a length of 0, a key that is none."""
    own = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    bad = ({"num_speculative_tokens": 0}, {"nonsense": 1})
    lines = [["--speculative-config", json.dumps(own | one)] for one in ({}, *bad)]
    assert [one.accepted for one in ask(lane, Path(pair[0].name), lines)] == [True, False, False]


@lanes("vllm", "0.33.0", "0.24.0")
def test_vllm_refuses_padded_vocabularies(lane: Lane, pair: tuple[Model, Draft]) -> None:
    """Why a draft with embeddings of another size is not emitted: vLLM's class refuses the pair."""
    target = Path(pair[0].name)
    padded = write_model(target.with_name("padded"), num_layers=1, vocab_size=320)
    config = {"method": "draft_model", "num_speculative_tokens": 2, "model": str(padded)}
    (verdict,) = ask(lane, target, [["--speculative-config", json.dumps(config)]])
    assert not verdict.accepted
    assert "same vocabulary size" in verdict.said


@lanes("sglang")
def test_sglang_takes_what_is_emitted(lane: Lane, pair: tuple[Model, Draft]) -> None:
    """SGLang's own parser reads every line, as a chain of k drafted tokens; a flag or algorithm that is none fails."""
    lines = emitted("sglang", lane.version, *pair)
    wrong = [["--speculative-algorithm", "NOPE"], ["--speculative-nonsense", "1"]]
    verdicts = ask(lane, Path(pair[0].name), [*lines.values(), *wrong])
    assert [one.accepted for one in verdicts] == [True] * len(lines) + [False, False]
    read = dict(zip(lines, (one.read for one in verdicts), strict=False))
    drafted = read["draft model"]
    assert drafted["speculative_algorithm"] == "STANDALONE"
    assert drafted["speculative_draft_model_path"] == pair[1].name
    assert (drafted["speculative_num_steps"], drafted["speculative_num_draft_tokens"]) == (4, 5)
    assert drafted["speculative_eagle_topk"] == 1
    looked_up = read["look-up"]
    assert (looked_up["speculative_algorithm"], looked_up["speculative_num_draft_tokens"]) == ("NGRAM", 4)
    assert looked_up["speculative_ngram_max_bfs_breadth"] == 1


@lanes("llamacpp")
def test_llamacpp_takes_what_is_emitted(lane: Lane, packed: tuple[Model, Draft]) -> None:
    """llama-server's own parser reads every line for its build, and the lengths out of it are those meant."""
    lines = emitted("llamacpp", lane.version, *packed)
    verdicts = dict(zip(lines, ask(lane, Path(packed[0].name), list(lines.values())), strict=True))
    assert {"look-up", "draft model", "composite"} <= set(verdicts)
    for name, verdict in verdicts.items():
        assert verdict.accepted, f"{name}: {verdict.said}"
    read = verdicts["draft model"].read
    assert (read["n_max"], read["n_min"], read["p_min"]) == (4, 0, 0.0)
    assert read["draft"] == packed[1].name
    looked_up = verdicts["look-up"].read
    assert (looked_up["size_n"], looked_up["size_m"]) == (2, 3)


@lanes("llamacpp", "b11549")
@pytest.mark.parametrize("length", [1, 4])
def test_llamacpp_drafts_that_many_tokens(lane: Lane, packed: tuple[Model, Draft], length: int) -> None:
    """The server started with the line drafts k tokens a round, or what is left of 40; a look-up k where it matches."""
    drafts = {"model": packed[1], "ngram": Draft(kind="ngram", max_match=4, min_match=min(length, 2))}
    lines = {}
    for kind, draft in drafts.items():
        text = emit(deployment(choice(Setup(draft=draft, length=length)), target=packed[0]), "llamacpp", lane.version)
        lines[kind] = shlex.split(text.text)
    verdicts = ask(lane, Path(packed[0].name), list(lines.values()), serve=True)
    for kind, verdict in zip(lines, verdicts, strict=True):
        assert verdict.accepted, verdict.said
        assert verdict.read["accepted_tokens"] <= verdict.read["draft_tokens"]
        rounds, drafted = verdict.read["drafts"], verdict.read["draft_tokens"]
        assert rounds > 0
        assert drafted <= length * rounds, kind
        assert drafted >= length * rounds - sum(range(length)), kind  # the last rounds have less room


@lanes("llamacpp", "b11549")
def test_llamacpp_never_drafts_less_than_its_match(lane: Lane, packed: tuple[Model, Draft]) -> None:
    """Why a look-up of k=1 with matches of 2 is refused: the real server takes it and drafts nothing."""
    words = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m"]
    short, enough = ask(lane, Path(packed[0].name), [[*words, "1"], [*words, "2"]], serve=True)
    assert short.accepted
    assert short.read["drafts"] == 0
    assert enough.read["drafts"] > 0
