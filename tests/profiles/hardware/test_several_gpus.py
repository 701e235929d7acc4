"""Targets too large for one GPU: where they are put, what transformers is told, and that hooked models still work.

There is no GPU here: free memory is made up, and accelerate's hooks move tensors from the CPU to the CPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from profiles.engines.torch.batch_model import RowModel
from profiles.models import loader, sources
from profiles.models.early_exit import early_exit
from profiles.models.loader import LoadedModel
from profiles.records.errors import ModelError
from tests.support import tiny

TOKEN_IDS = torch.tensor([[2, 40, 77, 105, 260, 33, 1, 3]])
Calls = list[dict[str, Any]]


def with_gpus(monkeypatch: pytest.MonkeyPatch, *free_bytes: int) -> None:
    """Torch counts this many GPUs with so much free memory each."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free_bytes))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free_bytes[index], 2**40))


def parts_of(model: Any) -> dict[str, str]:
    """A device map as accelerate makes it: every block and every module with weights of its own, all on the CPU."""
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    small = [path for path, module in model.named_modules() if path and not list(module.children())]
    return dict.fromkeys(blocks + [path for path in small if not path.startswith(tuple(blocks))], "cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `from_pretrained` is called with; a map is replaced by hooks on the CPU and noted as two GPUs'."""
    found: Calls = []
    real: Callable[..., Any] = AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder: Path, **options: Any) -> Any:
        found.append(dict(options))
        spread = options.pop("device_map", None)
        options.pop("max_memory", None)
        model, info = real(folder, **options)
        if spread is not None:
            parts = parts_of(model)
            accelerate.dispatch_model(model, parts, force_hooks=True, skip_keys=model._skip_keys_device_placement)
            model.hf_device_map = {path: int(index > 2) for index, path in enumerate(parts)}
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return found


def weight_bytes(folder: Path) -> int:
    return 4 * sources.num_values(sources.find(str(folder)))


def spread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """The model loaded as on two GPUs, neither of which holds it alone."""
    with_gpus(monkeypatch, weight_bytes(folder), weight_bytes(folder))
    return loader.load(str(folder), dtype="float32", device="cuda")


@pytest.mark.parametrize(
    ("device", "free", "is_spread"),
    [
        ("cuda", (1.0, 1.0), True),
        ("cuda", (1.12, 1.0), False),  # nine tenths of it hold the weights
        ("cuda", (1.11, 9.0), True),
        ("cuda", (0.1,), False),  # with one GPU there is nothing to spread over
        ("cuda", (), False),
        ("cuda:0", (0.1, 9.0), False),  # a GPU that was named is the only one to use
        ("cuda:1", (0.1, 9.0), False),
        ("cpu", (0.1, 9.0), False),
    ],
)
def test_only_what_does_not_fit_the_first_gpu_is_spread(
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    free: tuple[float, ...],
    is_spread: bool,
) -> None:
    """Weights in float32 against nine tenths of the first GPU's free memory, on `cuda` alone."""
    source = sources.find(str(tiny_folders["llama"]))
    size = weight_bytes(tiny_folders["llama"])
    with_gpus(monkeypatch, *(int(share * size) for share in free))
    placement = loader._placement(source, "float32", device)
    assert bool(placement) is is_spread
    if is_spread:
        usable = {index: int(0.9 * int(share * size)) for index, share in enumerate(free)}
        assert placement == {"device_map": "auto", "max_memory": usable}
        assert loader._placement(source, "bfloat16", device) == {}


def test_transformers_is_told_to_spread(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    """The map is automatic, over the GPUs alone; safetensors only and no remote code, as ever; a note says so."""
    folder = tiny_folders["llama"]
    loaded = spread(folder, monkeypatch)
    usable = int(0.9 * weight_bytes(folder))
    assert len(calls) == 1
    assert (calls[0]["device_map"], calls[0]["max_memory"]) == ("auto", {0: usable, 1: usable})
    assert (calls[0]["use_safetensors"], calls[0]["trust_remote_code"]) == (True, False)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.note == f"model {str(folder)!r}: too large for one GPU, spread over 2, which take turns"


@pytest.mark.parametrize(
    ("device", "options", "moves"),
    [("cpu", {}, ["cpu"]), ("cuda", {"several_gpus": False}, ["cuda"]), ("cuda", {}, [])],
)
def test_what_is_moved_whole(
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    device: str,
    options: dict[str, bool],
    moves: list[str],
) -> None:
    """On a CPU, and for a draft even where it does not fit, no map is passed; a spread model is not moved again."""
    moved: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    with_gpus(monkeypatch, 1, 1)
    loaded = loader.load(str(tiny_folders["llama"]), dtype="float32", device=device, **options)
    assert moved == moves
    assert bool({"device_map", "max_memory"} & calls[0].keys()) is (not moves)
    assert (loaded.note is None) is bool(moves)
    assert moves or set(loaded.model.hf_device_map.values()) == {0, 1}


@pytest.mark.parametrize("places", [{"a": 0, "b": "disk"}, {"a": 0, "b": 1, "c": "cpu"}, {"": 1}, {}])
def test_a_part_off_the_gpus_is_refused(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, places: dict[str, object]
) -> None:
    """What would run from the disk or the processor, or not start on the first GPU, is refused before it is timed."""
    real: Callable[..., Any] = AutoModelForCausalLM.from_pretrained

    def from_pretrained(folder: Path, **options: Any) -> Any:
        model, info = real(folder, **options | {"device_map": None, "max_memory": None})
        model.hf_device_map = places
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    words = "float32 weights do not fit into 90% of the free memory of all GPUs; use a"
    with pytest.raises(ModelError, match=words):
        spread(tiny_folders["llama"], monkeypatch)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_hooked_model_decodes_and_takes_tokens_back(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: Calls, architecture: str
) -> None:
    """Under accelerate's hooks the logits are the same, also with a cache that is rolled back."""
    whole = loader.load(str(tiny_folders[architecture]), dtype="float32", device="cpu").model
    model = spread(tiny_folders[architecture], monkeypatch).model
    assert hasattr(model, "_hf_hook")
    with torch.inference_mode():
        expected = whole(TOKEN_IDS).logits[0]
        rows, places = RowModel(model, 1, 16), torch.arange(8)[None]
        rows.step(TOKEN_IDS[:, :6], places[:, :6], 6)
        rows.step(torch.tensor([[9, 9]]), places[:, 6:], 8)
        torch.testing.assert_close(rows.step(TOKEN_IDS[:, 6:], places[:, 6:], 8, keep=2)[0], expected[6:])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_early_exit_of_a_hooked_model_has_its_layers_only(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, calls: Calls, architecture: str
) -> None:
    """The twin runs its own layers, not the target's: accelerate's `forward` is bound to the module it was made for."""
    whole = loader.load(str(tiny_folders[architecture]), dtype="float32", device="cpu")
    target = spread(tiny_folders[architecture], monkeypatch)
    parameters = dict(target.model.named_parameters())
    early = early_exit(target, 1)
    assert early._hf_hook is target.model._hf_hook
    assert all(parameter is parameters[name] for name, parameter in early.named_parameters())
    with torch.inference_mode():
        expected = early_exit(whole, 1)(TOKEN_IDS).logits
        cache = DynamicCache()
        assert torch.equal(early(TOKEN_IDS, past_key_values=cache, use_cache=True).logits, expected)
        assert len(cache.layers) == 1
        assert torch.equal(target.model(TOKEN_IDS).logits, whole.model(TOKEN_IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_is_cut_from_a_hooked_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls, tied: bool
) -> None:
    """Rows that no token names go from embedding and head, and the hooks stay."""
    folder = tiny.write_model(tmp_path / "padded", "llama", vocab_size=320, tie_word_embeddings=tied)
    whole = loader.load(str(folder), dtype="float32", device="cpu").model
    model = spread(folder, monkeypatch).model
    assert model.get_input_embeddings().weight.shape[0] == 300
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert hasattr(model.get_input_embeddings(), "_hf_hook")
    assert hasattr(model.get_output_embeddings(), "_hf_hook")
    with torch.inference_mode():
        assert torch.equal(model(TOKEN_IDS).logits, whole(TOKEN_IDS).logits)


@tiny.READS_GGUF
def test_a_gguf_is_spread_alike(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    """A GGUF's dequantised weights take the same way, and both notes are told."""
    path = tiny.write_gguf(tmp_path / "model.gguf", tiny_folders["llama"])
    loaded = spread(path, monkeypatch)
    assert (calls[0]["device_map"], calls[0]["gguf_file"]) == ("auto", "model.gguf")
    assert "a GGUF of F32 weights" in loaded.note
    assert loaded.note.endswith("spread over 2, which take turns")


@pytest.mark.gpu
def test_two_real_gpus_share_a_model(tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On two GPUs the parameters lie on both, the logits come back on the first and are those of one GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    folder = tiny_folders["llama"]
    whole = loader.load(str(folder), dtype="float32", device="cuda").model
    free = weight_bytes(folder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, free))
    target = loader.load(str(folder), dtype="float32", device="cuda")
    assert {parameter.device.index for parameter in target.model.parameters()} >= {0, 1}
    early = early_exit(target, 1)
    with torch.inference_mode():
        found = target.model(TOKEN_IDS.to(target.model.device)).logits
        assert found.device == early(TOKEN_IDS.to(early.device)).logits.device == torch.device("cuda:0")
        torch.testing.assert_close(found, whole(TOKEN_IDS.to("cuda")).logits, atol=1e-4, rtol=1e-4)
