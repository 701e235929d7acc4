"""The CUDA path on an emulated GPU: graphs, kernels' memory layouts, waits of the host, two devices.

The last tests plant faults and check that the emulation sees them.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from profiles.engines.torch import batch_model
from profiles.engines.torch.attention import kernel_name
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.records.core import PLAIN, Setup, digest_of
from tests.benchmarks.first_gpu_run import ALLOWED, PROMPTS, WORKLOAD, Watch, engine_on, step_difference
from tests.emulated_gpu import EmulatedGpu, Stream

KINDS = pytest.mark.parametrize(
    ("device", "cudnn_first"), [("cuda:0", False), ("cuda:1", True)], ids=["first GPU", "second GPU, cuDNN first"]
)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[EmulatedGpu]:
    """Two emulated GPUs."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with EmulatedGpu(cudnn_first=params.get("cudnn_first", False)) as emulated:
        yield emulated


@pytest.fixture(scope="module")
def llama(tiny_folders: dict[str, Path]) -> PreTrainedModel:
    """A model on the second GPU, whichever is emulated later."""
    with EmulatedGpu():
        return loader.load(str(tiny_folders["llama"]), dtype="float32", device="cuda:1").model


@KINDS
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_emulated_graphs_equal_eager_steps(
    tiny_folders: dict[str, Path], gpu: EmulatedGpu, architecture: str, device: str, cudnn_first: bool
) -> None:
    """In float32 and, where cuDNN would come first, in bfloat16; no step copies a key or runs on cuDNN."""
    dtype = "bfloat16" if cudnn_first else "float32"
    model = loader.load(str(tiny_folders[architecture]), dtype=dtype, device=device).model
    assert kernel_name(model) != "cudnn"  # nor before the first step: it is part of the key of evidence
    graphed = RowModel(model, 2, 64)
    assert step_difference(graphed, RowModel(model, 2, 64)) < ALLOWED[dtype]
    assert len(graphed._graphs or ()) == 3  # one a width
    key_heads = {"llama": 2, "qwen2": 2}.get(architecture, 4)
    assert {call.keys[1] for call in gpu.attention if call.is_masked} == {key_heads}
    assert "cudnn" not in {call.kernel for call in gpu.attention}


@pytest.mark.parametrize(
    ("device", "cudnn_first", "temperature"),
    [("cuda:0", False, 0.0), ("cuda:1", True, 0.8)],
    ids=["greedy on the first GPU", "sampled on the second, cuDNN first"],
)
def test_emulated_decoding_captures_nothing_in_timed_units_and_waits_once_a_round(
    tiny_folders: dict[str, Path],
    gpu: EmulatedGpu,
    device: str,
    temperature: float,
    cudnn_first: bool,
) -> None:
    """Greedy outputs are those of plain decoding."""
    engine = engine_on(tiny_folders, "llama", device)
    assert engine.environment.engine_options == '{"attention": "efficient"}'
    workload = replace(WORKLOAD, temperature=temperature, top_p=0.9 if temperature else 1.0)
    setups = (PLAIN, *(Setup(draft=draft, length=2) for draft in engine.drafts))
    with Watch() as watch:
        samples = engine.run_together(workload, PROMPTS, setups, "test")
    assert (watch.captures > 0, watch.timed_captures) == (True, 0)
    assert watch.waits_per_round == 1.0, watch.waits
    assert {sample.output_tokens for sample in samples} == {WORKLOAD.max_new_tokens}
    if temperature == 0.0:
        plain = {sample.prompt_digest: sample.output_digest for sample in samples[: len(PROMPTS)]}
        assert all(sample.output_digest == plain[sample.prompt_digest] for sample in samples)
        trace = engine.trace_target(workload, PROMPTS[0])
        assert plain[PROMPTS[0].digest] == digest_of(list(trace.token_ids))


def test_emulated_steps_see_what_their_own_workload_needs(tiny_folders: dict[str, Path], gpu: EmulatedGpu) -> None:
    """A longer workload before it does not widen a step, and no capture falls into a timed unit after it."""
    engine = TorchEngine(loader.load(str(tiny_folders["llama"]), dtype="float32", device="cuda:0"), {}, "cuda:0")
    for context_length in (200, 40):
        gpu.attention.clear()
        with Watch() as watch:
            engine.run_together(replace(WORKLOAD, context_length=context_length), PROMPTS, (PLAIN,), "test")
        assert watch.timed_captures == 0
    # 40 tokens, a round of the longest speculation length and padding, in steps of 64
    assert {call.keys[2] for call in gpu.attention if call.is_masked} == {128}


def test_emulated_prompts_need_no_mask(tiny_folders: dict[str, Path], gpu: EmulatedGpu) -> None:
    """A mask of a long prompt would take gigabytes; the keys of a step are shared by query heads all the same."""
    model = loader.load(str(tiny_folders["llama"]), dtype="float32", device="cuda:0").model
    rows = RowModel(model, 1, 64)
    gpu.attention.clear()
    with torch.inference_mode():
        tokens = torch.arange(9, device="cuda:0")[None] + 20
        rows.step(tokens, torch.arange(9, device="cuda:0")[None], 9, row=0)
    assert {(call.queries[2], call.is_masked) for call in gpu.attention} == {(9, False)}
    assert gpu.emptied >= 3  # the separate weights of every layer went back


def test_emulated_graphs_keep_one_buffer_of_logits(llama: PreTrainedModel, gpu: EmulatedGpu) -> None:
    """After the widest step, others keep no memory of their own; all captures are on one stream."""
    rows = RowModel(llama, 2, 64)
    with torch.inference_mode():
        outputs = [
            rows.step(
                torch.zeros(2, width, dtype=torch.long, device="cuda:1"),
                torch.arange(width, device="cuda:1").expand(2, -1),
                width,
                keep=width,
            )
            for width in (5, 3, 1)
        ]
    assert len({output.host.untyped_storage().data_ptr() for output in outputs}) == 1
    assert [stream is gpu.streams[-1] for stream in gpu.streams[-3:]] == [True] * 3


# --- planted faults ---

Forward = Callable[..., torch.Tensor]
TABLES: dict[str, torch.Tensor] = {}


def _reads_a_value(forward: Forward, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    return forward(tokens, *rest) + int(tokens[0, 0]) * 0


def _chooses_by_a_mask(forward: Forward, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    logits = forward(tokens, *rest)
    return logits + logits[logits > 0].sum() * 0


def _makes_a_tensor(forward: Forward, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    return forward(tokens, *rest) + torch.tensor([0.0], device=tokens.device)


def _draws(forward: Forward, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    logits = forward(tokens, *rest)
    return logits + torch.multinomial(torch.ones(4, device=tokens.device), 1) * 0


def _has_a_table(device: str, forward: Forward, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    return forward(tokens + TABLES.setdefault(device, torch.zeros(1, dtype=torch.long, device=device)), *rest)


def _bakes_a_position_in(forward: Forward, tokens: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
    cache.query_positions = torch.full_like(cache.query_positions, len(TABLES))
    TABLES[f"step {len(TABLES)}"] = torch.zeros(1)
    return forward(tokens, cache, keep)


def _allocates_a_cache(forward: Forward, tokens: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
    logits = forward(tokens, cache, keep)
    cache._keys = {layer: keys.clone() for layer, keys in cache._keys.items()}
    return logits


def _views_attention(forward: Forward, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
    heads = torch.zeros(2, 2, 3, 8, device=tokens.device)
    functional.scaled_dot_product_attention(heads, heads, heads).view(2, -1)
    return forward(tokens, *rest)


NO_GRAPHS, OTHER_LOGITS = "steps run without CUDA graphs", "other logits"
FAULTS: dict[str, tuple[Any, str]] = {
    "a value read by the host": (_reads_a_value, NO_GRAPHS),
    "values chosen by a mask": (_chooses_by_a_mask, NO_GRAPHS),
    "a tensor made of host values": (_makes_a_tensor, NO_GRAPHS),
    "random numbers without a registered generator": (_draws, NO_GRAPHS),
    "a table left on the CPU": (functools.partial(_has_a_table, "cpu"), "same device"),
    "a table on another GPU": (functools.partial(_has_a_table, "cuda:0"), "same device"),
    "a position baked into the graph": (_bakes_a_position_in, OTHER_LOGITS),
    "a cache allocated anew": (_allocates_a_cache, "freed after the capture"),
    "a view of what attention returns": (_views_attention, "view size is not compatible"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulated_gpu_sees_a_planted(
    fault: str, llama: PreTrainedModel, gpu: EmulatedGpu, caplog: pytest.LogCaptureFixture
) -> None:
    """Every fault in a step is refused before a capture, raises, or gives other logits than eager steps."""
    planted, symptom = FAULTS[fault]
    graphed = RowModel(llama, 2, 64)
    graphed._forward = functools.partial(planted, graphed._forward)
    TABLES.clear()
    if symptom == NO_GRAPHS:
        assert step_difference(graphed, RowModel(llama, 2, 64)) < 1e-4
        assert graphed._graphs is None
        assert symptom in caplog.text
    elif symptom == OTHER_LOGITS:
        assert not step_difference(graphed, RowModel(llama, 2, 64)) < 1e-4
    else:
        with pytest.raises(RuntimeError, match=symptom):
            step_difference(graphed, RowModel(llama, 2, 64))


@pytest.mark.parametrize("fault", ["a capture on the current device", "logits read before a replay"])
def test_emulated_gpu_sees_a_wrong(
    fault: str, llama: PreTrainedModel, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of the code that captures."""
    graphed = RowModel(llama, 2, 64)
    with ExitStack() as stack:
        if fault == "a capture on the current device":
            graphed._resources.stream = Stream("cuda:0")  # type: ignore[assignment]
            stack.enter_context(pytest.warns(UserWarning, match="The CUDA Graph is empty"))
        else:
            monkeypatch.setattr(batch_model._Graph, "replay", lambda graph, *inputs: graph._logits)
        assert not step_difference(graphed, RowModel(llama, 2, 64)) < 1e-4


def test_emulated_waits_are_told_by_line(gpu: EmulatedGpu) -> None:
    """A wait of the host is counted by its kind and the product's line; a pinned copy is none."""
    values = torch.tensor([1, 2], pin_memory=True).to("cuda", non_blocking=True)
    assert not gpu.syncs
    assert values.device == torch.device("cuda:0")
    assert values.tolist() == [1, 2]
    assert torch.tensor([3]).to("cuda").device.type == "cuda"
    assert [kind for kind, _ in gpu.syncs] == ["tolist", "host to device"]
    assert all("test_emulated.py" in line for _, line in gpu.syncs)
