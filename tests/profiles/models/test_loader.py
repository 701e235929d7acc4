"""Loading models, every way a model directory can be wrong, pairs, room, memory and early exit."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoConfig, GPTNeoForCausalLM, MambaConfig

from profiles.models import loader, memory, sources
from profiles.models.early_exit import early_exit
from profiles.models.loader import LoadedModel
from profiles.records.errors import ModelError, OutOfMemoryError, PairError
from tests.support import tiny

TOKEN_IDS = torch.tensor([[2, 40, 77, 105, 260, 33, 1, 3]])
FINAL_NORM = {"llama": "norm", "qwen2": "norm", "gpt_neox": "final_layer_norm", "gpt2": "ln_f"}


@pytest.fixture(scope="module")
def llama(tiny_folders: dict[str, Path]) -> LoadedModel:
    return load(tiny_folders["llama"])


@pytest.fixture
def broken(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama to spoil."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "broken"))


def load(folder: Path) -> LoadedModel:
    return loader.load(str(folder), dtype="float32", device="cpu")


def refusal(folder: Path | str) -> str:
    """The one line that loading is refused with."""
    with pytest.raises(ModelError) as caught:
        loader.load(str(folder), dtype="float32", device="cpu")
    message = str(caught.value)
    assert message.startswith(f"model {str(folder)!r}")
    assert "\n" not in message
    assert len(message) < 500 + len(str(folder))
    return message


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_loads(
    tiny_folders: dict[str, Path], capfd: pytest.CaptureFixture[str], architecture: str
) -> None:
    """A loaded model is in evaluation mode, without gradients, on fused attention, with its limits known.

    No progress bar, warning or report reaches the terminal.
    """
    loaded = load(tiny_folders[architecture])
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.max_positions == 256
    assert loaded.end_token_ids == (1,)
    assert len(loaded.tokenizer) == 300
    assert loaded.record.name == str(tiny_folders[architecture])
    assert (loaded.record.revision, loaded.record.dtype) == (None, "float32")
    assert loaded.record.num_params == loaded.model.num_parameters()
    assert capfd.readouterr() == ("", "")


def test_weights_are_held_in_the_dtype_asked_for(tiny_folders: dict[str, Path]) -> None:
    """A float32 file loads as bfloat16 when asked, under the same digest; unknown dtypes are refused."""
    name = str(tiny_folders["llama"])
    loaded = loader.load(name, dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.record.digest == load(tiny_folders["llama"]).record.digest
    with pytest.raises(ModelError, match="dtype 'int4': allowed are float32, bfloat16, float16"):
        loader.load(name, dtype="int4", device="cpu")


def test_the_digest_follows_weights_and_config(
    llama: LoadedModel, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """A copy elsewhere has the same digest; another weight or another config value has another."""
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "copy"))
    assert load(folder).record.digest == llama.record.digest
    change_config(folder, rms_norm_eps=1e-3)
    changed = load(folder).record.digest
    assert changed != llama.record.digest
    change_weight(folder, "model.norm.weight", 1.5)
    assert load(folder).record.digest not in {changed, llama.record.digest}


def test_the_digest_follows_the_rows_of_the_embedding(
    llama: LoadedModel, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The tokenizer cuts the embedding: with a token less, probabilities are others though all weights are the same."""
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "copy"))
    assert llama.num_tokens == llama.record.vocab_size
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    del vocabulary[max(vocabulary, key=vocabulary.get)], merges[-1]
    file.write_text(json.dumps(document))
    cut = load(folder)
    assert cut.num_tokens == llama.num_tokens - 1
    assert cut.record.digest != llama.record.digest == loader.describe(str(folder), dtype=None).record.digest


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_sharded_weights_load(broken: Path) -> None:
    """Weights in several files with an index give the same logits; a missing shard is named."""
    whole = load(broken)
    shutil.copytree(broken, broken / "shards", ignore=shutil.ignore_patterns("model.safetensors"))
    whole.model.save_pretrained(broken / "shards", max_shard_size="40KB")
    shards = sorted((broken / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    sharded = load(broken / "shards")
    assert torch.equal(sharded.model(TOKEN_IDS).logits, whole.model(TOKEN_IDS).logits)
    shards[-1].unlink()
    assert f"1 of {len(shards)} weight files are missing, first {shards[-1].name}" in refusal(broken / "shards")
    (broken / "shards" / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not JSON" in refusal(broken / "shards")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (float("inf"), "float32"), (1e30, "float16")])
def test_weights_that_are_not_finite_are_refused(broken: Path, value: float, dtype: str) -> None:
    """NaN, infinity and float32 values too large for float16 are refused under the tensor's name."""
    change_weight(broken, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(ModelError, match=f"layers.1.mlp.up_proj.weight holds NaN or infinity as {dtype}"):
        loader.load(str(broken), dtype=dtype, device="cpu")


INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"config.json": b"{oops"}, "config.json is not JSON"),
        ({"config.json": b"\xef\xbb\xbf{}"}, "config.json is not JSON"),
        ({"config.json": b"[1]"}, "config.json holds no JSON object"),
        ({"config.json": b'{"model_type": "llama", "num_attention_heads": null}'}, "its config.json: "),
        ({"config.json": b'{"model_type": "nonesuch"}'}, "nonesuch"),
        ({"config.json": b'{"model_type": "t5"}'}, "t5 has no language model of its own in transformers"),
        ({"config.json": b'{"model_type": "llama", "hidden_size": "wide"}'}, "hidden_size"),
        ({"config.json": b'{"model_type": "llama", "dtype": "float9"}'}, "float9"),
        ({"generation_config.json": b"{"}, "generation_config.json is not JSON"),
        ({"tokenizer_config.json": b""}, "tokenizer_config.json is not JSON"),
        ({INDEX: b"[]"}, "index.json holds no JSON object"),
        ({INDEX: b"{}"}, "index.json has no weight_map of file names"),
        ({INDEX: b'{"weight_map": {}}'}, "index.json has no weight_map of file names"),
        *(
            ({INDEX: json.dumps({"weight_map": {"a": name}}).encode()}, f"{INDEX} names '{name}'; allowed are .safe")
            for name in (1, "shard.bin", "../model.safetensors", "/etc/model.safetensors", "sub/a.safetensors")
        ),
        ({WEIGHTS: None}, "has no model.safetensors or model.safetensors.index.json; convert it"),
        ({WEIGHTS: b""}, "model.safetensors is not a whole safetensors file"),
        ({WEIGHTS: b"12345"}, "SafetensorError"),
        (
            {WEIGHTS: None, "pytorch_model.bin": b""},
            "but pytorch_model.bin: pickled weights can run code and are refused",
        ),
        ({WEIGHTS: None, "model-1-of-1.safetensors": b""}, ", but model-1-of-1.safetensors"),
        ({"adapter_config.json": b"{}"}, "has a LoRA adapter"),
        ({WEIGHTS: None, "adapter_config.json": b"{}"}, "a LoRA adapter (adapter_config.json)"),
        ({WEIGHTS: None, "adapter_config.json": b"{}", "config.json": None}, "a LoRA adapter"),
        ({"tokenizer.json": None}, "has no tokenizer"),
        ({"tokenizer.json": b"{oops"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": b"{}"}, "its tokenizer cannot be read: KeyError"),
        ({"tokenizer.json": b'{"version": "1.0", "added_tokens": [], "model": {"type": "X"}}'}, "model"),
    ],
)
def test_a_broken_file_is_named(broken: Path, files: dict[str, bytes | None], words: str) -> None:
    """A missing, broken or pickled file, or one that engines read otherwise: one line with the cause.

    Pickles are not opened, and no index leads out of the folder.
    """
    for file, content in files.items():
        if content is None:
            (broken / file).unlink()
        else:
            (broken / file).write_bytes(content)
    assert words in refusal(broken)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {"rope_type": "warped", "rope_theta": 1e4}}, "KeyError: 'warped'"),
        ({"rope_scaling": {"type": "warped", "factor": 2.0}}, "KeyError: 'warped'"),
        ({"hidden_act": "swish9"}, "KeyError: 'swish9'"),
        ({"model_type": "mymodel", "auto_map": {"AutoConfig": "a.B"}}, "its own code (auto_map) is not run"),
        ({"quantization_config": {"quant_method": "newquant"}}, "quantised by 'newquant', which transformers does not"),
        ({"num_hidden_layers": 4}, "9 weights are not in its files, first model.layers.3."),
        (
            {"intermediate_size": 65},
            "9 weights are of another size, first model.layers.0.mlp.down_proj.weight ([32, 64] instead of [32, 65])",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_named(broken: Path, fields: dict[str, object], words: str) -> None:
    """Values that transformers does not know, what only others read, and weights that the config does not describe."""
    change_config(broken, **fields)
    assert words in refusal(broken)


def test_an_architecture_without_fused_attention_falls_back(tmp_path: Path) -> None:
    """GPT-Neo refuses fused attention and is loaded with the plain one."""
    layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = GPTNeoConfig(vocab_size=300, hidden_size=32, max_position_embeddings=64, **layers)
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.model.config._attn_implementation, loaded.max_positions) == ("eager", 64)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_running_out_of_memory_while_loading_is_said(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A full device is an engine's failure, not the model's fault."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory while loading"):
        load(tiny_folders["llama"])


def test_a_gpt2_without_tokenizer_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Its tokenizer class would load as a map of one token instead of failing."""
    ignored = shutil.ignore_patterns("tokenizer*", "chat_template*")
    assert "has no tokenizer" in refusal(shutil.copytree(tiny_folders["gpt2"], tmp_path / "bare", ignore=ignored))


def test_a_model_without_positions_or_attention_is_refused(tmp_path: Path) -> None:
    """A config that states no longest context cannot be measured within it; a running state has no cache to compute."""
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    source = sources.find(str(tmp_path))
    with pytest.raises(ModelError, match="states no max_position_embeddings"):
        sources.max_positions(MambaConfig(), source)
    with pytest.raises(ModelError, match="mamba layers keep a running state"):
        memory.footprint(source, "float32")


def test_an_adapter_alone_is_named_where_memory_is_computed(tmp_path: Path) -> None:
    """The command line asks for memory first: there an adapter is named too, not the config that it lacks."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="has a LoRA adapter"):
        memory.footprint(sources.find(str(tmp_path)), "float32")


def test_a_path_that_is_no_model_is_named(broken: Path) -> None:
    """What is spelled like a path is never looked up on the hub; a weight file alone has no config and no tokenizer."""
    allowed = "allowed are a model directory, a .gguf file and a hub id like owner/name"
    for name in ("/nowhere/model", "./model", "~/model"):
        assert f"no such directory or file; {allowed}" in refusal(name)
    assert f"a file; {allowed}" in refusal(broken / "model.safetensors")


def test_a_hub_id_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An id that is not cached, offline, and one that is no id at all."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot be downloaded as a hub id: LocalEntryNotFoundError" in refusal("nobody/nothing")
    assert "cannot be downloaded as a hub id: HFValidationError" in refusal("a/b/c")


def test_a_hub_id_loads_from_its_snapshot(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is recorded under its name with the commit as revision."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(broken))
    record = loader.load("owner/name", dtype="float32", device="cpu").record
    assert (record.name, record.revision) == ("owner/name", "broken")


@pytest.mark.parametrize(
    ("generation", "config", "expected"), [([5, 2], 1, (2, 5)), (7, 1, (7,)), (None, 4, (4,)), (None, None, (1,))]
)
def test_end_tokens_come_from_the_first_that_names_them(
    broken: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    """The generation config wins over the config, which wins over the tokenizer."""
    change_config(broken, eos_token_id=config)
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load(broken).end_token_ids == expected


def test_equal_token_maps_fit_whatever_the_padding(llama: LoadedModel, tmp_path: Path) -> None:
    """A draft whose embedding is padded to 320 rows fits a target of 300; the other way round too."""
    padded = load(tiny.write_model(tmp_path / "padded", "gpt2", vocab_size=320))
    loader.check_pair(llama, padded)
    loader.check_pair(padded, llama)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "qwen2"])
def test_a_draft_of_another_architecture_fits(
    llama: LoadedModel, tiny_folders: dict[str, Path], architecture: str
) -> None:
    """Only the token map counts; the tiny models share one and read text alike."""
    draft = load(tiny_folders[architecture])
    loader.check_pair(llama, draft)
    assert draft.tokenizer.encode("The quick\nbrown fox 12345 ünï") == llama.tokenizer.encode(
        "The quick\nbrown fox 12345 ünï"
    )


def test_another_token_map_of_the_same_size_is_refused(llama: LoadedModel) -> None:
    """Maps are compared, not sizes; the first differing tokens are told with both ids."""
    other = dataclasses.replace(llama, tokenizer=tiny.tokenizer(tiny.OTHER_TEXT))
    with pytest.raises(PairError) as caught:
        loader.check_pair(llama, other)
    message = str(caught.value)
    assert "different token maps (300 and 300 tokens)" in message
    assert " and absent)" in message
    assert "(absent and " in message
    assert "\n" not in message


def test_tokens_at_the_end_of_one_map_are_fine(llama: LoadedModel) -> None:
    """A draft never proposes a token that it lacks, and one that the target lacks is refused in its round.

    But the torch engine compares probabilities over one width.
    """
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|tool|>\n"])
    longer = dataclasses.replace(llama, tokenizer=tokenizer)
    loader.check_pair(llama, longer)
    loader.check_pair(longer, llama)
    tokenizer.add_tokens([f"<{number}>" for number in range(128)])
    loader.check_pair(llama, longer)
    with pytest.raises(PairError, match=r"129 tokens at the end of one map only; llama.cpp takes 128"):
        loader.check_pair(llama, longer, engine="llamacpp")
    with pytest.raises(PairError, match="embed 299 and 300 tokens"):
        loader.check_pair(llama, dataclasses.replace(llama, num_tokens=299))


def test_a_tokenizer_may_name_tokens_that_the_model_lacks(tmp_path: Path) -> None:
    """As gemma-3's does; only prompts with such a token cannot be used."""
    folder = tiny.write_model(tmp_path / "small", "gpt2", vocab_size=299)
    loaded = load(folder)
    assert (loaded.num_tokens, loaded.record.vocab_size) == (299, 299)
    assert loader.describe(str(folder), dtype=None).num_tokens == 299


def spoil(folder: Path, **tensors: torch.Tensor) -> None:
    """Adds tensors to a model's weights; `__` in a name stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__0__self_attn__q_proj__weight_scale",
        "model__layers__0__self_attn__q_norm__weight",
        "model__layers__7__mlp__up_proj__weight",
        "model__layers__0__self_attn__q_proj__bias",
        "model__embed_shift",
    ],
)
def test_left_over_tensors_are_refused(broken: Path, name: str) -> None:
    """transformers drops tensors that it has no place for: the model would be another one."""
    spoil(broken, **{name: torch.ones(4)})
    assert f"1 weights have no place in the model, first {name.replace('__', '.')}; its config.json" in refusal(broken)


def test_whole_numbers_are_no_weights(broken: Path) -> None:
    """Quantised weights whose scales are in no file would be read as if they were the values."""
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    spoil(broken, **{name.replace(".", "__"): (weights[name] * 100).to(torch.int8)})
    assert f"1 weights are whole numbers, first {name}; its config.json must" in refusal(broken)


def test_a_tokenizer_without_tokens_is_refused(broken: Path) -> None:
    """It is read, with its special tokens alone, and every prompt would be empty."""
    content = json.loads((broken / "tokenizer.json").read_text())
    content["model"].update(vocab={}, merges=[])
    (broken / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}))
    assert "its tokenizer makes no tokens of a text" in refusal(broken)


def test_tensors_of_other_parts_are_noted(broken: Path) -> None:
    """A vision tower or a value head is no part of the language model; computed buffers are not even noted."""
    spoil(
        broken,
        visual__blocks__0__weight=torch.ones(4),
        v_head__summary__bias=torch.ones(1),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__self_attn__k_scale=torch.ones(1),
    )
    note = load(broken).note
    assert "2 tensors beside the language model are not read (v_head, visual)" in note


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_named(broken: Path, file: str) -> None:
    """A clone without LFS has pointers in place of files."""
    (broken / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{file} is a Git LFS pointer, not the file; run `git lfs pull`" in refusal(broken)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        loader.describe(str(broken), dtype=None)


def test_an_unreadable_file_is_named(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission is not absence."""
    real = Path.open

    def open_(path: Path, *options: str, **more: object) -> object:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return real(path, *options, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_)
    assert "model.safetensors cannot be read: Permission denied" in refusal(broken)


def test_weights_beside_an_index_of_others_are_refused(broken: Path) -> None:
    """transformers would load the one, vLLM the others; an index that names the file itself is fine."""
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))
    load(broken)
    shutil.copy(broken / "model.safetensors", broken / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "part.safetensors"}}))
    assert "engines load either" in refusal(broken)


def test_room_ends_where_the_positions_end(llama: LoadedModel) -> None:
    """256 positions hold a context of 248 with 8 drafted tokens, and not one token more."""
    loader.check_context(llama, context_length=248, max_length=8)
    loader.check_context(llama, context_length=256, max_length=0)
    with pytest.raises(ModelError, match=r"context 257: .* has 256 positions; allowed are contexts up to 256$"):
        loader.check_context(llama, context_length=257, max_length=0)
    with pytest.raises(
        ModelError, match=r"context 249 with speculation length 8: .* contexts up to 248 with that length$"
    ):
        loader.check_context(llama, context_length=249, max_length=8)


def test_memory_is_checked_from_the_headers(tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as asked plus 2 x 3 layers x 2 heads x 8 values a token: just enough passes, a token more does not."""
    name = str(tiny_folders["llama"])
    num_values = sum(tensor.numel() for tensor in load_file(tiny_folders["llama"] / "model.safetensors").values())
    needed = 2 * (num_values + 1000 * 2 * 3 * 2 * 8)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    memory.check_memory(name, dtype="bfloat16", device="cpu", num_tokens=1000)
    with pytest.raises(
        ModelError, match=r"GiB of bfloat16 weights and .* GiB of cache for 1001 tokens; cpu has .* free"
    ):
        memory.check_memory(name, dtype="bfloat16", device="cpu", num_tokens=1001)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_early_exit_is_norm_and_head_on_a_hidden_state(
    tiny_folders: dict[str, Path], architecture: str, num_layers: int
) -> None:
    """Its logits are the target's norm and head on the target's hidden state after that layer, cached or not."""
    target = load(tiny_folders[architecture])
    with torch.inference_mode():
        before = target.model(TOKEN_IDS, output_hidden_states=True)
        norm = getattr(target.model.base_model, FINAL_NORM[architecture])
        expected = target.model.get_output_embeddings()(norm(before.hidden_states[num_layers]))
        early = early_exit(target, num_layers)
        assert torch.equal(early(TOKEN_IDS).logits, expected)
        cache = DynamicCache(config=early.config)
        assert len(cache.layers) == num_layers
        steps = [early(TOKEN_IDS[:, [i]], past_key_values=cache, use_cache=True).logits for i in range(8)]
        torch.testing.assert_close(torch.cat(steps, 1), expected)
        assert torch.equal(target.model(TOKEN_IDS).logits, before.logits)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_early_exit_shares_weights_and_leaves_the_target_alone(
    tiny_folders: dict[str, Path], architecture: str
) -> None:
    """Every parameter is the target's own object; the target keeps its layers and its config."""
    target = load(tiny_folders[architecture])
    config, parameters = copy.deepcopy(target.model.config), dict(target.model.named_parameters())
    early = early_exit(target, 1)
    own = dict(early.named_parameters())
    assert 0 < len(own) < len(parameters)
    assert all(parameter is parameters[name] for name, parameter in own.items())
    assert list(dict(target.model.named_parameters())) == list(parameters)
    assert target.model.config.to_dict() == config.to_dict()
    assert early.config is early.base_model.config
    assert (early.config.num_hidden_layers, target.model.config.num_hidden_layers) == (1, 3)


@pytest.mark.parametrize(
    ("num_all", "num_layers", "allowed"),
    [*((3, num_layers, "1 to 2") for num_layers in (-1, 0, 3, 4)), (1, 1, "none, it has 1 layer")],
)
def test_early_exit_needs_a_proper_part_of_the_layers(
    tmp_path: Path, num_all: int, num_layers: int, allowed: str
) -> None:
    """Of three layers the first one or two can be an exit, of one none."""
    target = load(tiny.write_model(tmp_path, "gpt2", num_layers=num_all))
    with pytest.raises(PairError, match=f"early-exit:{num_layers} of target .*: allowed are {allowed}$"):
        early_exit(target, num_layers)


def test_early_exit_refuses_layers_it_cannot_tell(tiny_folders: dict[str, Path]) -> None:
    """Two module lists of the same length leave open which one holds the layers."""
    target = load(tiny_folders["llama"])
    target.model.model.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(PairError, match="LlamaForCausalLM has no single list of 3 layers to cut"):
        early_exit(target, 1)


def test_an_installed_package_has_no_builtin_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wheel leaves the weights out; the error says where they are."""
    monkeypatch.setattr("profiles.models.sources.BUILTIN_FOLDER", tmp_path)
    with pytest.raises(ModelError, match="come with a source checkout"):
        sources.find("builtin:target")
