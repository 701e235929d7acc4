"""Broken, unknown and unfitting models end `run` and `check` in one line that names the model and what is wrong.

Each is a sound tiny model with one thing changed; `{models}` stands for the folder they are in.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny
from tests.support.cli import assert_refused, call, content

BAD_TARGETS = {
    "{models}/missing": "models/missing': no such directory or file; allowed are a model directory, a .gguf file",
    "{models}/notes.txt": "notes.txt': a file; allowed are",
    "{models}/empty": "models/empty': has no config.json; name a transformers model",
    "{models}/no-weights": "models/no-weights': has no model.safetensors or model.safetensors.index.json",
    "{models}/pickled": "pytorch_model.bin: pickled weights can run code and are refused; convert it to safetensors",
    "{models}/truncated": "models/truncated': model.safetensors is not a whole safetensors file",
    "{models}/not-weights": "models/not-weights': model.safetensors is not a whole",
    "{models}/nan": "models/nan': lm_head.weight holds NaN",
    "{models}/no-config": "models/no-config': has no config.json",
    "{models}/config-not-json": "models/config-not-json': ",
    "{models}/config-is-list": "models/config-is-list': ",
    "{models}/unknown-type": "nosuchmodel",
    "{models}/missing-shard": "models/missing-shard': 1 of 1 weight files are missing, first model-1-of-2.safetensors",
    "{models}/index-not-json": "models/index-not-json': model.safetensors.index.json is not JSON",
    "{models}/index-without-map": "models/index-without-map': model.safetensors.index.json has no weight_map",
    "{models}/no-tokenizer": "models/no-tokenizer': has no tokenizer; one of tokenizer.json",
    "{models}/tokenizer-not-json": "models/tokenizer-not-json': ",
    "{models}/other-shape": "9 weights are of another size, first model.layers.0.mlp.down_proj.weight ([32, 64]",
    "{models}/more-layers": "weights are not in its files, first model.layers.3",
    "{models}/missing.gguf": "missing.gguf': no such directory or file",
    "{models}/text.gguf": "text.gguf': not a whole GGUF file",
    "{models}/empty.gguf": "empty.gguf': not a whole GGUF file",
    "{models}/header.gguf": "header.gguf': not a whole GGUF file",
    "{models}/truncated.gguf": "truncated.gguf': not a whole GGUF file, ",
    "{models}/two-gguf": "models/two-gguf': has 2 GGUF files, first a.gguf; name one",
    "builtin:nosuch": "model 'builtin:nosuch': not a built-in model; allowed are",
    "not/a/hub/id": "model 'not/a/hub/id': no such directory or file, and it cannot be downloaded as a hub id",
    "": "model '': allowed are a model directory, a .gguf file and a hub id",
}
BAD_DRAFTS = {  # of what a target can have too, a few
    "{models}/missing": "models/missing': no such directory or file",
    "{models}/pickled": "but pytorch_model.bin: pickled weights can run code and are refused",
    "{models}/unknown-type": "nosuchmodel",
    "{models}/other-tokens": "have different token maps (300 and 300 tokens)",
    "{models}/truncated.gguf": "truncated.gguf': not a whole GGUF file, ",
    "builtin:nosuch": "model 'builtin:nosuch': not a built-in model",
    "": "draft ''",
    "early-exit:": "'' is not a whole number; allowed is early-exit:LAYERS",
    "early-exit:0": "early-exit layers 0: at least 1",
    "early-exit:-1": "'-1' is not a whole number",
    "early-exit:3": "allowed are 1 to 2",
    "early-exit:99": "early-exit:99 of target",
    "early-exit:x": "'x' is not a whole number",
    "ngram:": "'' is not one of max=N and min=N",
    "ngram:min=5,max=2": "ngram matches max=2,min=5",
    "ngram:max=0": "ngram matches max=0,min=2",
    "ngram:max=4,max=5": "'max=5' is not one of max=N and min=N, each at most once",
    "ngram:foo=1": "'foo=1' is not one of max=N and min=N",
}
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def not_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_text("prompt,answer\n")


def nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"][7, 7] = torch.nan
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def other_tokens(folder: Path) -> None:
    tiny.tokenizer(tiny.OTHER_TEXT).save_pretrained(folder)


def indexed(text: str) -> Callable[[Path], None]:
    """Replaces the weights by an index with this text."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def configured(**settings: object) -> Callable[[Path], None]:
    """Changes settings of the config, which then no longer describes the weights."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


CHANGES: dict[str, Callable[[Path], None]] = {
    "pickled": pickled,
    "truncated": truncated,
    "not-weights": not_weights,
    "nan": nan,
    "no-weights": without(WEIGHTS),
    "no-config": without("config.json"),
    "config-not-json": written("config.json", "{"),
    "config-is-list": written("config.json", "[]"),
    "unknown-type": configured(model_type="nosuchmodel"),
    "missing-shard": indexed(json.dumps({"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}})),
    "index-not-json": indexed("{"),
    "index-without-map": indexed("{}"),
    "no-tokenizer": without("tokenizer.json", "tokenizer_config.json"),
    "tokenizer-not-json": written("tokenizer.json", "{"),
    "other-tokens": other_tokens,
    "other-shape": configured(intermediate_size=96),
    "more-layers": configured(num_hidden_layers=5, layer_types=None),
}


@pytest.fixture(scope="module")
def models(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models broken in the way their name says."""
    folder = tmp_path_factory.mktemp("bad") / "models"
    for name, change in CHANGES.items():
        change(Path(shutil.copytree(tiny_folders["llama"], folder / name)))
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("weights to follow\n")
    whole = tiny.write_gguf(folder / "whole.gguf", tiny_folders["llama"]).read_bytes()
    for name, kept in {"truncated": whole[:-100], "header": whole[:100], "empty": b"", "text": b"a poem\n"}.items():
        (folder / f"{name}.gguf").write_bytes(kept)
    (folder / "two-gguf").mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(folder / "whole.gguf", folder / "two-gguf" / name)
    return folder


@pytest.mark.parametrize("name", BAD_TARGETS)
@pytest.mark.parametrize("verb", ["run", "check"])
def test_a_target_is_refused(verb: str, name: str, models: Path, sound_store: Path, sound_words: list[str]) -> None:
    """Neither verb starts with a target that cannot be loaded as it is."""
    before = content(sound_store)
    words = sound_words if verb == "run" else ["check"]
    assert_refused(call(sound_store, *words, "--target", name.format(models=models)), 2, BAD_TARGETS[name])
    assert content(sound_store) == before


@pytest.mark.parametrize("name", BAD_DRAFTS)
def test_a_draft_is_refused(name: str, models: Path, sound_store: Path, sound_words: list[str]) -> None:
    """A run whose only draft cannot be used says why instead of measuring plain decoding alone."""
    before = content(sound_store)
    assert_refused(call(sound_store, *sound_words, "--draft", name.format(models=models)), 2, BAD_DRAFTS[name])
    assert content(sound_store) == before
