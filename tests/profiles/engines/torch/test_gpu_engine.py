"""The engine on a GPU: CUDA graphs give what eager steps give, and decoding is lossless there too. Not run yet."""

import random
from pathlib import Path

import pytest
import torch

from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.records.core import PLAIN, Prompt, Setup, Workload, digest_of
from tests.benchmarks.first_gpu_run import engine_on
from tests.support.toys import ScriptedController, wandering

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
PROMPTS = tuple(
    Prompt(domain="a", token_ids=tuple(random.Random(size).choices(range(20, 20 + 3 * size), k=size)))
    for size in (3, 24, 1, 40, 8, 17, 2, 30, 12)
)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_graphs_equal_eager_steps(tiny_folders: dict[str, Path], architecture: str) -> None:
    """The same logits, captured and replayed at other positions, as without a graph."""
    model = loader.load(str(tiny_folders[architecture]), dtype="float32", device="cuda").model
    graphed, eager = RowModel(model, 3, 64), RowModel(model, 3, 64)
    eager._graphs = None
    with torch.inference_mode():
        for start, width in ((0, 8), (8, 1), (9, 5), (14, 1), (12, 5)):
            tokens = torch.arange(3 * width, device="cuda").view(3, width) + 20
            positions = torch.arange(start, start + width, device="cuda").expand(3, -1)
            logits, expected = (
                rows.step(tokens, positions, start + width, keep=width).clone() for rows in (graphed, eager)
            )
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert graphed._graphs


@pytest.fixture(scope="module")
def engine(tiny_folders: dict[str, Path]) -> TorchEngine:
    """A tiny random target with a draft of every kind."""
    return engine_on(tiny_folders, "llama", "cuda")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_draft_decodes_on_a_gpu(engine: TorchEngine, batch_size: int, temperature: float) -> None:
    """Greedy outputs are the traces'; sampled ones are as long."""
    workload = Workload(batch_size=batch_size, context_length=96, max_new_tokens=24, temperature=temperature)
    setups = (PLAIN, *(Setup(draft=draft, length=length) for draft in engine.drafts for length in (1, 4)))
    queues = [(prompt,) for prompt in PROMPTS] if batch_size == 1 else [PROMPTS]
    for queue in queues:
        samples = engine.run_together(workload, queue, setups, "test")
        traces = [engine.trace_target(workload, prompt) for prompt in queue] * len(setups)
        for sample, trace in zip(samples, traces, strict=True):
            assert sample.output_tokens == 24
            assert temperature > 0.0 or sample.output_digest == digest_of(list(trace.token_ids))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_controller_decides_on_a_gpu(engine: TorchEngine, batch_size: int) -> None:
    """With another setup every round, greedy outputs are the traces'."""
    workload = Workload(batch_size=batch_size, context_length=96, max_new_tokens=24)
    setups = [PLAIN, *(Setup(draft=draft, length=length) for draft in engine.drafts for length in range(1, 9))]
    for seed in range(3):
        controller = ScriptedController(wandering(setups, seed))
        logits = engine.run_adaptive(workload, PROMPTS, controller, 8)
        for run, prompt in zip(logits.generations, PROMPTS, strict=True):
            assert tuple(run.token_ids) == engine.trace_target(workload, prompt).token_ids
