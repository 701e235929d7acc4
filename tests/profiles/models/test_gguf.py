"""GGUF files: the logits and tokens of the safetensors twin, what a file says of itself, every way to break."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from profiles.models import loader, memory, sources
from profiles.records.errors import ModelError
from tests.profiles.models.test_loader import load, refusal
from tests.support import tiny

pytestmark = tiny.READS_GGUF
TOKEN_IDS = torch.tensor([[2, 40, 77, 105, 260, 33, 1, 3, *range(50, 90)]])
TEXT = "The quick\nbrown fox 12345 ünï<|end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose weights fill whole blocks of every quantised type that is tested."""
    return tiny.write_model(tmp_path_factory.mktemp("twin") / "llama", num_layers=2)


@pytest.mark.parametrize(("float_type", "distance"), [("F32", 1e-5), ("F16", 2e-2), ("BF16", 1e-1), ("Q8_0", 2e-1)])
def test_logits_equal_those_of_the_safetensors_twin(
    folder: Path, tmp_path: Path, float_type: str, distance: float
) -> None:
    """Up to the precision of the file's float type (logits here are around 3 wide); the type is stated."""
    loaded, twin = load(tiny.write_gguf(tmp_path / "model.gguf", folder, float_type)), load(folder)
    with torch.inference_mode():
        difference = (loaded.model(TOKEN_IDS).logits - twin.model(TOKEN_IDS).logits).abs().max()
    assert float(difference) < distance
    assert loaded.record.num_params == twin.record.num_params
    assert (loaded.max_positions, loaded.end_token_ids) == (256, (1,))
    assert f"a GGUF of {float_type} weights, dequantised and run as float32;" in loaded.note
    assert twin.note is None
    assert (loaded.record.stored_type, twin.record.stored_type) == (float_type, None)
    assert loaded.record.weights_type == float_type


def test_the_tokenizer_is_the_files_own(folder: Path, tmp_path: Path) -> None:
    """The same map, text, special tokens and chat template as the twin, so that each may draft for the other."""
    loaded, twin = load(tiny.write_gguf(tmp_path / "model.gguf", folder)), load(folder)
    loader.check_pair(loaded, twin)
    loader.check_pair(twin, loaded)
    assert loaded.tokenizer.encode(TEXT) == twin.tokenizer.encode(TEXT)
    assert loaded.tokenizer.decode(twin.tokenizer.encode(TEXT)) == TEXT
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == (tiny.END, tiny.PAD)
    talk = [{"role": "user", "content": "hello"}]
    assert loaded.tokenizer.apply_chat_template(talk) == twin.tokenizer.apply_chat_template(talk)


def test_a_sentencepiece_vocabulary(folder: Path, tmp_path: Path) -> None:
    """Such a file starts every text with its first token, and spells unknown letters in bytes."""
    spelled = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "he",
        "▁the",
    ]
    tokens = [*spelled, *(f"<spare{index}>" for index in range(300 - len(spelled)))]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * 41],
        "scores": [-float(index) for index in range(300)],
        "merges": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": None,
    }
    path = tmp_path / "model.gguf"
    loaded = load(tiny.write_gguf(path, folder, **{f"tokenizer__ggml__{key}": value for key, value in fields.items()}))
    assert loaded.tokenizer.get_vocab() == {token: index for index, token in enumerate(tokens)}
    assert loaded.tokenizer.encode("theü</s>") == [1, tokens.index("▁the"), 3 + 0xC3, 3 + 0xBC, 2]
    assert loaded.end_token_ids == (2,)


def test_files_beside_it_play_no_part(folder: Path, tmp_path: Path) -> None:
    """Another tokenizer and another end token in the same directory belong to something else."""
    path = tiny.write_gguf(tmp_path / "model.gguf", folder)
    tiny.tokenizer(tiny.OTHER_TEXT).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    loaded = load(path)
    loader.check_pair(load(folder), loaded)
    assert loaded.end_token_ids == (1,)


def test_a_directory_with_one_file_is_that_file(folder: Path, tmp_path: Path) -> None:
    """Two of them leave open which one is meant; safetensors beside one are taken first."""
    (tmp_path / "one").mkdir()
    path = tiny.write_gguf(tmp_path / "one" / "a.gguf", folder)
    assert load(path.parent).record.digest == load(path).record.digest
    tiny.write_gguf(tmp_path / "one" / "b.gguf", folder)
    assert "has 2 GGUF files, first a.gguf; name one" in refusal(path.parent)
    tiny.write_model(path.parent)
    assert load(path.parent).note is None


def test_memory_is_read_from_the_header(folder: Path, tmp_path: Path) -> None:
    """A dequantised model takes what its twin takes, whatever the file's size."""
    packed = sources.find(str(tiny.write_gguf(tmp_path / "model.gguf", folder, "Q8_0")))
    assert memory.footprint(packed, "bfloat16") == memory.footprint(sources.find(str(folder)), "bfloat16")


def test_tied_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A file without an output matrix uses the embedding twice; no bar of the dequantising reaches the terminal."""
    tied = tiny.write_model(tmp_path / "tied", tie_word_embeddings=True)
    capfd.readouterr()
    loaded, twin = load(tiny.write_gguf(tmp_path / "model.gguf", tied)), load(tied)
    assert capfd.readouterr() == ("", "")
    assert "lm_head.weight" not in set(load_file(tied / "model.safetensors"))
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    torch.testing.assert_close(loaded.model(TOKEN_IDS).logits, twin.model(TOKEN_IDS).logits)


def test_scaled_rotary_frequencies_are_applied(tmp_path: Path) -> None:
    """Llama 3.1's scaling is a tensor in a GGUF, which transformers leaves unread: without it logits are far off."""
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    plain, scaled = tiny.write_model(tmp_path / "plain"), tiny.write_model(tmp_path / "s", rope_parameters=scaling)
    twin = load(scaled)
    factors = load(plain).model.model.rotary_emb.inv_freq / twin.model.model.rotary_emb.inv_freq
    assert float(factors.max()) > 7.0
    loaded = load(tiny.write_gguf(tmp_path / "model.gguf", scaled, rope_factors=factors))
    torch.testing.assert_close(loaded.model(TOKEN_IDS).logits, twin.model(TOKEN_IDS).logits, atol=1e-5, rtol=1e-4)
    without = load(tiny.write_gguf(tmp_path / "without.gguf", scaled))
    assert float((without.model(TOKEN_IDS).logits - twin.model(TOKEN_IDS).logits).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general__architecture": "nonesuch", "nonesuch__context_length": 256}, "architecture nonesuch is not"),
        ({"general__architecture": "gptneox", "gptneox__context_length": 256}, "architecture gptneox is not supported"),
        ({"llama__context_length": None}, "its header has no llama.context_length"),
        ({"tokenizer__ggml__tokens": None}, "its header has no tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__model": "riddle"}, "stating tokenizer 'riddle'"),
        ({"split__count": 3}, "one of 3 parts; join them with `llama-gguf-split --merge`"),
        ({"llama__rope__scaling__type": "yarn"}, "transformers ignores rope.scaling.type 'yarn' of a GGUF"),
        ({"llama__block_count": 3}, "9 weights are not in its files, first model.layers.2."),
        ({"llama__feed_forward_length": 65}, "6 weights are of another size, first"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(
    folder: Path, tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    """Unknown architectures, lacking keys, split files and positions that would be wrong: one line that says which."""
    assert words in refusal(tiny.write_gguf(tmp_path / "model.gguf", folder, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_cut_off_file_is_refused(folder: Path, tmp_path: Path, share: float) -> None:
    """A download that stopped early, anywhere in it."""
    path = tiny.write_gguf(tmp_path / "model.gguf", folder)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert "not a whole GGUF file" in refusal(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    """A name is not a format; a missing file is not looked up on the hub."""
    save_file({"weight": torch.zeros(4)}, tmp_path / "model.gguf")
    assert "does not start with the GGUF magic bytes" in refusal(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="no such directory or file"):
        loader.load("nowhere/model.gguf", dtype="float32", device="cpu")


def test_a_file_that_does_not_say_its_type(folder: Path, tmp_path: Path) -> None:
    """Then the type of most values is told."""
    loaded = load(tiny.write_gguf(tmp_path / "model.gguf", folder, "F16", general__file_type=None))
    assert "a GGUF of F16 weights" in loaded.note
