"""Every architecture that is promised: it loads in every float type and decodes speculatively as it does plainly."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.models.early_exit import early_exit
from profiles.models.loader import LoadedModel
from profiles.records.core import DTYPES, PLAIN, Draft, Prompt, Setup, Workload
from profiles.records.errors import ModelError
from tests.support import tiny

ARCHITECTURES = [*tiny.ARCHITECTURES, *tiny.MORE_ARCHITECTURES]
WORKLOAD = Workload(context_length=64, max_new_tokens=24)
SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
PROMPT = Prompt(domain="a", token_ids=tuple(range(20, 40)))


def load(folder: Path, dtype: str = "float32") -> LoadedModel:
    return loader.load(str(folder), dtype=dtype, device="cpu")


def engine_of(target: LoadedModel, twin: LoadedModel) -> TorchEngine:
    """The target with an early exit and a model of the same kind, whose weights differ, as drafts."""
    drafts = {
        Draft(kind="early_exit", num_layers=1): early_exit(target, 1),
        Draft(kind="model", model=twin.record): twin.model,
    }
    return TorchEngine(target, drafts, "cpu")


def check_lossless(engine: TorchEngine) -> tuple[int, ...]:
    """Outputs of every draft at two lengths are plain decoding's and their rounds the walk's; what was emitted."""
    trace = engine.trace_target(WORKLOAD, PROMPT)
    setups = [Setup(draft=draft, length=length) for draft in engine.drafts for length in (2, 5)]
    plain, *samples = engine.run_together(WORKLOAD, (PROMPT,), (PLAIN, *setups), "test 0")
    for setup, sample in zip(setups, samples, strict=True):
        assert setup.draft is not None
        acceptance = engine.trace_draft(WORKLOAD, PROMPT, trace, setup.draft, 5)
        assert sample.output_digest == plain.output_digest
        assert dict(sample.rounds) == dict(expected_rounds(trace, acceptance, setup.length, 24).rounds)
    return trace.token_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of three layers per architecture."""
    root = tmp_path_factory.mktemp("architectures")
    return {name: tiny.write_model(root / name, name, num_layers=3) for name in ARCHITECTURES}


def shifted(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """A twin whose weights are a little off, so that some of its proposals are kept and some are not."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(folder.with_name(f"{folder.name}-twin"))
    loaded.tokenizer.save_pretrained(folder.with_name(f"{folder.name}-twin"))
    return load(folder.with_name(f"{folder.name}-twin"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_speculative_output_is_plain_output(folders: dict[str, Path], architecture: str) -> None:
    """With both kinds of draft in float32, and plain output is what the model gives without any cache."""
    target = load(folders[architecture])
    engine = engine_of(target, shifted(target, folders[architecture]))
    emitted = check_lossless(engine)
    text = torch.tensor([[*PROMPT.token_ids, *emitted]])
    with torch.inference_mode():
        logits = target.model(text[:, :-1], use_cache=False).logits[0, len(PROMPT.token_ids) - 1 :]
    assert tuple(logits.argmax(-1).tolist()) == emitted


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_float_type_decodes(folders: dict[str, Path], architecture: str, dtype: str) -> None:
    """In 16 bit outputs may part at near-ties; every token is there and every round adds up."""
    target = load(folders[architecture], dtype)
    assert {parameter.dtype for parameter in target.model.parameters()} == {getattr(torch, dtype)}
    engine = engine_of(target, target)
    setups = (PLAIN, *(Setup(draft=draft, length=3) for draft in engine.drafts))
    for sample in engine.run_together(WORKLOAD, (PROMPT,), setups, "test 0"):
        assert sample.output_tokens == 24
        assert 1 + sum((1 + kept) * count for (_, kept), count in sample.rounds.items()) == 24


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_and_padded_and_sharded_weights(tmp_path: Path, architecture: str, tied: bool) -> None:
    """320 embedded rows of 300 tokens, in several files: rows are cut, the head stays tied, decoding is lossless."""
    folder = tiny.write_model(tmp_path / "model", architecture, vocab_size=320, tie_word_embeddings=tied)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    target = load(folder)
    embedding, head = target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert embedding.shape[0] == head.shape[0] == 300
    with torch.inference_mode():
        logits = whole(torch.tensor([PROMPT.token_ids])).logits[..., :300]
        torch.testing.assert_close(target.model(torch.tensor([PROMPT.token_ids])).logits, logits)
    check_lossless(engine_of(target, target))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_a_window_is_kept_whole(folders: dict[str, Path], architecture: str) -> None:
    """Layers that see 8 tokens keep all keys, so that tokens can be taken back, and yet see no more than 8."""
    target = load(folders[architecture])
    assert "sliding_attention" in target.model.config.layer_types
    wide = load(
        tiny.write_model(folders[architecture].with_name("wide"), architecture, num_layers=3, sliding_window=99)
    )
    text = torch.tensor([[*PROMPT.token_ids, *PROMPT.token_ids]])
    assert not torch.allclose(target.model(text).logits, wide.model(text).logits)


STATES = {
    "conv layers": (
        Lfm2ForCausalLM,
        Lfm2Config(layer_types=["conv", "full_attention"], num_attention_heads=4, **SMALL),
    ),
    "linear_attention layers": (MambaForCausalLM, MambaConfig(**SMALL)),
    "RwkvForCausalLM's layers": (RwkvForCausalLM, RwkvConfig(**SMALL)),
}


@pytest.mark.parametrize("words", STATES)
def test_a_running_state_is_refused(tmp_path: Path, words: str) -> None:
    """What cannot take tokens back cannot be a target or a draft: one line before anything runs."""
    model_class, config = STATES[words]
    model_class(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{words} keep a running state, which cannot take tokens back"):
        load(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_step_of_fixed_shape_sees_only_the_text(folders: dict[str, Path], architecture: str, num_rows: int) -> None:
    """What a GPU captures sees more slots than the text has, stale ones among them; its logits are the plain step's."""
    rows = RowModel(load(folders[architecture]).model, num_rows, 40)
    with torch.inference_mode():
        stale = torch.arange(30, 60).expand(num_rows, -1)
        rows.step(stale, torch.arange(30).expand(num_rows, -1), 30)
        for start, width in ((0, 6), (6, 1), (7, 3), (10, 1)):
            tokens = torch.arange(start, start + width).expand(num_rows, -1) + 70
            positions = torch.arange(start, start + width).expand(num_rows, -1)
            wanted = rows.step(tokens, positions, start + width, keep=width)
            torch.testing.assert_close(rows.step_in_view(36, width, tokens, positions), wanted, rtol=1e-4, atol=1e-4)
