"""The adapter on both model runners: V1, of the CPU build, and V2, of GPUs, its kernels in Triton's interpreter."""

from pathlib import Path

import pytest

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.engines.vllm.config import VllmOptions
from profiles.engines.vllm.engine import VllmEngine
from profiles.models import loader
from profiles.prompts import read, tokenize
from profiles.records.core import PLAIN, Draft, Setup, Workload
from tests.lanes.places import RUNNING, TRITON, V2

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not RUNNING.is_whole, reason="no lane: make test-vllm")]
interpreted = pytest.mark.skipif(not TRITON.is_whole, reason="no lane: make test-vllm")
LONGEST, NEW = 3, 10
WORKLOAD = Workload(context_length=120, max_new_tokens=NEW)
LONGER = Workload(context_length=120 + LONGEST, max_new_tokens=NEW + LONGEST)


@pytest.mark.parametrize("v2", [pytest.param(False, id="v1"), pytest.param(True, id="v2", marks=interpreted)])
def test_one_trace_tells_the_rounds_of_every_length(v2: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V2's proposals are read back from where it keeps them; each length has an engine, as its drafter drafts no fewer.

    Outputs are those of plain decoding.
    """
    for name, value in {**(V2 if v2 else {}), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    target = loader.load("builtin:target", dtype="float32", device="cpu")
    draft = Draft(kind="model", model=loader.describe("builtin:draft-general", dtype="float32").record)
    prompts, _ = tokenize(read("builtin:code")[:1] + read("builtin:prose")[:1], target.tokenizer, 100)
    options = VllmOptions(python=str(RUNNING.python), max_length=LONGEST, max_alive=6, log_folder=tmp_path)
    with VllmEngine(target.record, (draft,), options) as engine:
        assert engine.capabilities.origin == f"vllm 0.32.0+cpu {'v2=1 ' if v2 else ''}float32"
        traces = [engine.trace_target(LONGER, prompt) for prompt in prompts]
        acceptances = [
            engine.trace_draft(LONGER, prompt, trace, draft, LONGEST)
            for prompt, trace in zip(prompts, traces, strict=True)
        ]
        plain = engine._decode(WORKLOAD, prompts, PLAIN)
        assert [run.token_ids for run in plain] == [list(trace.token_ids[:NEW]) for trace in traces]
        for length in (1, LONGEST):
            runs = engine._decode(WORKLOAD, prompts, Setup(draft=draft, length=length))
            walked = [
                expected_rounds(trace, acceptance, length, NEW, past_end=True).rounds
                for trace, acceptance in zip(traces, acceptances, strict=True)
            ]
            assert [dict(run.rounds) for run in runs] == walked
            assert [run.token_ids for run in runs] == [run.token_ids for run in plain]
        assert engine.num_starts == (3 if v2 else 2)  # plain, and one for each length where it cannot be changed
