"""Step times that ship: the script that makes them, at a tiny shape on the processor, and their way into a store."""

import json
import sys
from pathlib import Path

import pytest
import torch

from profiles.engines.torch import shape_times
from profiles.records.codec import environment_from, model_from
from profiles.records.core import Workload
from profiles.records.errors import InputError
from store import shape_times as stored_shapes
from store.evidence_store import EvidenceStore, Scope

TINY = ["--shapes", "tiny", "--dtype", "float32", "--device", "cpu", "--batch-sizes", "1,3", "--contexts", "40"]


def run_script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make", *flags])
    shape_times.main()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a tiny run."""
    monkeypatch.setattr(shape_times, "COPIED_BYTES", 2**20)
    run_script(monkeypatch, *TINY, "--max-length", "4", "--out", str(tmp_path))
    [path] = tmp_path.glob("*.json")
    return path


def test_a_file_is_loaded_once(made: Path, evidence_store: EvidenceStore) -> None:
    """Every sweep is found under its shape, machine, batch and context; again it changes nothing."""
    assert stored_shapes.load(evidence_store, made) == 2
    assert stored_shapes.load(evidence_store, made) == 0
    document = json.loads(made.read_text())
    assert document["copy_bytes_per_s"] > 0.0
    for entry, batch_size in zip(document["entries"], (1, 3), strict=True):
        workload = Workload(batch_size=batch_size, context_length=42, max_new_tokens=2)
        target, machine = model_from(entry["target"]), environment_from(document["environment"])
        scope = Scope(target=target, environment=machine, workload=workload)
        times = evidence_store.find_step_times(scope, (), (40, 4))
        assert times is not None
        assert set(times[target.run_digest].samples_s) == {1, 2, 3, 4, 5}


def test_the_whole_plan_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Six shapes at four batches and two contexts, with what they need; nothing is measured."""
    run_script(monkeypatch, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 * 4 * 2
    assert lines[0].startswith("qwen2.5-0.5b   bfloat16 batch   1 context   512 widths 1 to 17:")
    [eight] = [line for line in lines if line.startswith("llama-3.1-8b") and "batch   1 context   512" in line]
    assert 14.9 < float(eight.split()[-2]) < 15.2  # 8.03e9 parameters of two bytes, and 64 MiB of cache


def test_what_does_not_fit_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures, and the rest goes on."""
    monkeypatch.setattr("profiles.hardware.fingerprint.free_bytes", lambda _: 200_000)
    found = list(shape_times.measure(shape_times.points(("tiny",), "float32", (1,), (40,)), "cpu", 2))
    assert "GiB of weights and cache" in found[0]["infeasible"]
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no more\nof it")

    monkeypatch.setattr(shape_times, "sweep", full)
    [entry] = shape_times.measure(shape_times.points(("tiny",), "float32", (1,), (40,)), "cpu", 2)
    assert entry["infeasible"] == "no more"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ('{"evidence_version": 9}', "it has version 9, this draftpick reads version 1"),
        ("{}", "it has no 'evidence_version'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, evidence_store: EvidenceStore, text: str, reason: str) -> None:
    """In one line that names it."""
    path = tmp_path / "evidence.json"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        stored_shapes.load(evidence_store, path)
