"""The family that ships: its size, its prompts, one token map, and the walk against real rounds of trained models."""

import itertools
import json

import pytest

from profiles.acceptance.expected_rounds import expected_rounds
from profiles.builtin import BUILTIN_FOLDER, TARGET
from profiles.builtin.training import corpus, evaluate
from profiles.engines import bench as bench_module
from profiles.engines import workloads
from profiles.engines.torch import load
from profiles.engines.torch.engine import TorchEngine
from profiles.prompts import reader
from profiles.records import draft_spec
from profiles.records.core import PLAIN, Setup
from tests.benchmarks.common import DRAFTS
from tuner.forecast.queues import spread_over_domains

MEGABYTES = 1_000_000
LENGTHS = (1, 3, 8, 16)


def test_the_family_is_small() -> None:
    """At most 25 MB of safetensors and tokenizers with at least four drafts, and at most 20 MB of GGUF copies."""
    sizes = {path: path.stat().st_size for path in BUILTIN_FOLDER.rglob("*") if path.is_file()}
    copies = sum(size for path, size in sizes.items() if path.suffix == ".gguf")
    assert sum(sizes.values()) - copies <= 25 * MEGABYTES
    assert copies <= 20 * MEGABYTES
    assert len(list(BUILTIN_FOLDER.glob("draft-*/model.safetensors"))) >= 4
    assert sizes[BUILTIN_FOLDER / "draft-eagle/model.safetensors"] <= 2 * MEGABYTES


def test_held_out_prompts_of_three_domains() -> None:
    """48 different prompts or more of each."""
    requests = reader.read("builtin:all")
    by_domain = {domain: [one for one in requests if one.domain == domain] for domain in corpus.DOMAINS}
    for own in by_domain.values():
        assert len({one.messages for one in own}) >= 48


def test_the_training_record_tells_loss_and_loops() -> None:
    """What `train` printed is kept beside the weights."""
    record = json.loads((BUILTIN_FOLDER / "training" / "training.json").read_text(encoding="utf-8"))
    for domain in corpus.DOMAINS:
        assert record["target"][domain]["loss"] > 0.0
        assert 0.0 < record["draft-eagle"][domain]["accepted_per_round_k1"] < 1.0
        assert 0.0 <= record["target"][domain]["repeated_4grams"] <= 1.0


def test_edits_answer_what_they_ask() -> None:
    """The made-up copying tasks are right on a literal text."""
    assert evaluate.repeated([1, 2, 3, 4, 1, 2, 3, 4])[-1]
    assert not any(evaluate.repeated([1, 2, 3, 4, 5, 6, 7, 8]))
    pieces = tuple(f"The captain counted barrel number {index} in the dark hold. " for index in range(40))
    document = corpus.Document(domain="prose", pieces=pieces, held_out=True)
    stream = corpus.examples([document], "copy", seed=3)
    for example in [next(stream) for _ in range(20)]:
        task, text = example.request.split("\n\n", 1)
        if task == "Repeat this.":
            assert example.answer == text
        if task.startswith("Copy from"):
            assert text.endswith(example.answer)


@pytest.mark.slow
def test_trained_models_walk_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, every draft that ships, lengths up to 16: outputs equal plain decoding, rounds equal the walk."""
    monkeypatch.setattr(TorchEngine, "_warm_up", lambda *_: None)  # seconds are not looked at
    bench = load.load(TARGET, [draft_spec.parse_draft(text) for text in (*DRAFTS, "early-exit:4")], None, "cpu")
    question = bench_module.Question(lengths=LENGTHS, max_new_tokens=16)
    ((workload, built_in),), _ = workloads.workloads(bench, question, ["builtin:all"])
    prompts = spread_over_domains(built_in, 3)[1:]
    traces = [bench.engine.trace_target(workload, prompt) for prompt in prompts]
    pairs = itertools.cycle(zip(prompts, traces, strict=True))
    for draft, (prompt, trace) in zip(bench.engine.drafts, pairs, strict=False):
        acceptance = bench.engine.trace_draft(workload, prompt, trace, draft, LENGTHS[-1])
        setups = (PLAIN, *(Setup(draft=draft, length=length) for length in LENGTHS))
        plain, *samples = bench.engine.run_together(workload, (prompt,), setups, "test")
        for length, sample in zip(LENGTHS, samples, strict=True):
            assert sample.output_digest == plain.output_digest
            assert dict(sample.rounds) == dict(expected_rounds(trace, acceptance, length, 16).rounds)
