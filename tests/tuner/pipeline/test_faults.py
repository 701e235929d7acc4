"""Faults in a run: what fails is listed with its reason, the rest goes on, and what was measured is kept."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from profiles.engines.torch import trace
from tests.support.cli import DECIDED, assert_packs, call, database, small_run, write_prompts
from tests.support.fakes import sql


@pytest.fixture(scope="module")
def nan_draft(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the target with one weight that is not a number."""
    folder = tmp_path_factory.mktemp("faults") / "nan"
    shutil.copytree(tiny_folders["llama"], folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][3, 3] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    return folder


@pytest.mark.slow
def test_bad_drafts_beside_good_ones(
    tiny_folders: dict[str, Path], nan_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in one draft, NaN in another, a third that is missing: three rows with reasons, and a choice."""
    sound = trace.trace_model

    def full(model: Any, draft: Any, *more: Any) -> Any:
        if draft.name == "early-exit:2":
            raise torch.OutOfMemoryError("tried to allocate 3 GiB, 1 GiB is free")
        return sound(model, draft, *more)

    monkeypatch.setattr("profiles.engines.torch.engine.trace_model", full)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    drafts = ("ngram", "early-exit:1", "early-exit:2", str(nan_draft), str(tmp_path / "missing"))
    words = small_run(tiny_folders["llama"], prompts, *(word for name in drafts for word in ("--draft", name)))
    said = call(tmp_path / "store", *words)
    assert said.code in DECIDED
    reasons = {row["name"].split("/")[-1].split()[0]: row["reason"] for row in said.not_measured}
    assert reasons == {"missing": "ModelError", "nan": "ModelError", "early-exit:2": "OutOfMemoryError"}
    details = " ".join(row["detail"] for row in said.document["left_out"])
    for words_of_it in ("no such directory", "lm_head.weight holds NaN", "ran out of memory: tried to allocate 3 GiB"):
        assert words_of_it in details
    stored = sql(database(tmp_path / "store"), "SELECT reason FROM infeasible")
    assert ("OutOfMemoryError",) in stored
    assert {
        name for (name,) in sql(database(tmp_path / "store"), "SELECT DISTINCT draft_name FROM acceptance_traces")
    } == {"early-exit:1"}
    assert_packs(tmp_path / "store", tmp_path)
    assert sum(line.startswith("infeasible: ") and "end to end" not in line for line in said.stdout.splitlines()) == 3


@pytest.mark.slow
def test_a_limit_that_nothing_keeps(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """A code of its own, the figure in the reason, and the evidence kept."""
    words = small_run(tiny_folders["llama"], write_prompts(tmp_path / "prompts.jsonl"))
    said = call(tmp_path / "store", *words, "--max-p95-tpot", "0.0001")
    assert said.code == 6
    assert said.document["choice"] == {"draft": None, "length": 0}
    assert said.document["reason"].startswith("Nothing is feasible")
    assert sql(database(tmp_path / "store"), "SELECT count(*) > 0 FROM samples") == [(1,)]
    assert_packs(tmp_path / "store", tmp_path)


@pytest.mark.slow
def test_a_dry_run_keeps_nothing(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """It prints units and seconds, and makes no store."""
    words = small_run(tiny_folders["llama"], write_prompts(tmp_path / "prompts.jsonl"))
    said = call(tmp_path / "store", *words, "--dry-run")
    assert said.code == 0
    assert said.document["new_units"]["target trace"] == 9  # under a third of the prompts chooses
    assert said.document["known_units"] == 0
    assert said.document["seconds"] > 0.0
    assert not (tmp_path / "store").exists()
