"""The CUDA path on an emulated GPU: kernels' memory layouts, waits of the host, two devices.

The last tests plant faults and check that the emulation sees them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from profiles.records.core import PLAIN, Setup, digest_of
from tests.benchmarks.first_gpu_run import PROMPTS, WORKLOAD, Watch, engine_on
from tests.emulated_gpu import EmulatedGpu


@pytest.fixture
def gpu() -> Iterator[EmulatedGpu]:
    """Two emulated GPUs."""
    with EmulatedGpu() as emulated:
        yield emulated


@pytest.mark.parametrize(
    ("architecture", "device", "temperature"),
    [("llama", "cuda:0", 0.0), ("llama", "cuda:1", 0.8), ("gpt_neox", "cuda:0", 0.8), ("qwen2", "cuda:1", 0.0)],
)
def test_emulated_decoding_is_lossless_and_waits_once_a_round(
    tiny_folders: dict[str, Path], gpu: EmulatedGpu, architecture: str, device: str, temperature: float
) -> None:
    """Greedy outputs of every draft are those of plain decoding."""
    engine = engine_on(tiny_folders, architecture, device)
    assert engine.environment.engine_options == '{"steps": "eager"}'
    workload = replace(WORKLOAD, temperature=temperature, top_p=0.9 if temperature else 1.0)
    setups = (PLAIN, *(Setup(draft=draft, length=2) for draft in engine.drafts))
    with Watch() as watch:
        samples = engine.run_together(workload, PROMPTS, setups, "test")
    assert watch.waits_per_round == 1.0, watch.waits
    assert {sample.output_tokens for sample in samples} == {WORKLOAD.max_new_tokens}
    if temperature == 0.0:
        plain = {sample.prompt_digest: sample.output_digest for sample in samples[: len(PROMPTS)]}
        assert all(sample.output_digest == plain[sample.prompt_digest] for sample in samples)
        trace = engine.trace_target(workload, PROMPTS[0])
        assert plain[PROMPTS[0].digest] == digest_of(list(trace.token_ids))


@pytest.mark.parametrize("other", ["cpu", "cuda:0"])
def test_emulated_gpu_sees_two_devices(gpu: EmulatedGpu, other: str) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device="cuda:1") + torch.zeros(2, device=other)


def test_emulated_gpu_sees_a_view_of_what_attention_returns(gpu: EmulatedGpu) -> None:
    heads = torch.zeros(2, 2, 3, 8, device="cuda")
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        functional.scaled_dot_product_attention(heads, heads, heads).view(2, -1)


def test_emulated_waits_are_told_by_line(gpu: EmulatedGpu) -> None:
    """A wait of the host is counted by its kind and the product's line; a pinned copy is none."""
    values = torch.tensor([1, 2], pin_memory=True).to("cuda", non_blocking=True)
    assert not gpu.syncs
    assert values.device == torch.device("cuda:0")
    assert values.tolist() == [1, 2]
    assert torch.tensor([3]).to("cuda").device.type == "cuda"
    assert int(values[values > 1]) == 2
    kinds = [kind for kind, _ in gpu.syncs]
    assert kinds == ["tolist", "host to device", "index with a mask", "_local_scalar_dense"]
    assert all("test_emulated.py" in line for _, line in gpu.syncs)
