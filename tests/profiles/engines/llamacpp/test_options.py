"""What llama.cpp is started with, and what of it times are kept under; the order in which lengths are timed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.builtin import TARGET
from profiles.engines.llamacpp import engine as llamacpp
from profiles.engines.llamacpp import timing
from profiles.engines.llamacpp.engine import LlamaCppEngine
from profiles.engines.llamacpp.servers import Options, Program, find_program
from profiles.hardware import fingerprint, software
from profiles.models import loader
from profiles.records.core import Draft
from profiles.records.errors import InputError

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def program() -> Program:
    return find_program()


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(threads=1, log_folder=tmp_path)


def test_a_gpu_that_it_cannot_use(program: Program, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the processor does not pass as one that computes on the GPU; layers go where was asked."""
    target = loader.describe(TARGET, dtype="float32")
    with pytest.raises(InputError, match=r"device 'cuda:0': xllamacpp .* finds no GPU"):
        LlamaCppEngine(target, (), program, replace(options, device="cuda:0"))
    listing = [
        sys.executable,
        "-c",
        "print('Available devices:\\n  CUDA0: NVIDIA H100 (81559 MiB, 80000 MiB free)')",
    ]
    assert software.server_devices(listing) == ["CUDA0"]
    monkeypatch.setattr(llamacpp, "fingerprint", lambda _: fingerprint.fingerprint("cpu"))
    can = replace(program, command=tuple(listing))
    with LlamaCppEngine(target, (), can, replace(options, device="cuda")) as engine:
        assert '"-ngl","99"' in str(engine.environment.engine_options)


def test_threads_belong_to_the_key(program: Program, options: Options) -> None:
    """Times with another number of threads, or other arguments, are other evidence."""
    target = loader.describe(TARGET, dtype="float32")
    kinds = (options, replace(options, threads=2), replace(options, more=("--no-mmap",)))
    found = [LlamaCppEngine(target, (), program, one).environment for one in kinds]
    assert len({one.digest for one in found}) == 3
    assert [one.threads for one in found] == [1, 2, 1]
    assert found[0].engine_options is not None
    assert json.loads(found[0].engine_options)["weights"] == "float32"


def test_lengths_are_timed_there_and_back() -> None:
    """Every width has samples of passes in opposite order, so that a machine that slows down favours none."""
    target = loader.describe(TARGET, dtype="float32").record
    look_up = Draft(kind="ngram", max_match=3, min_match=3)
    plan = timing.plan_of(target, [look_up], 3, has_synthetic_rates=True)
    widths: list[int] = []

    def measure(visit: timing.Visit) -> list[float]:
        widths.append(visit.width)
        return [float(len(widths))] * 4

    shape = timing.Shape(batch_size=2, context_length=100, max_tokens=200)
    times = timing.time_plan(plan, shape, measure)
    assert widths == widths[::-1]
    assert set(times[look_up.digest].samples_s) == {1, 2, 3, 4}
    for width, samples_s in times[look_up.digest].samples_s.items():
        assert len(samples_s) == 4 * 2 * timing.PASSES
        assert sum(samples_s) / len(samples_s) == (len(widths) + 1) / 2, width
