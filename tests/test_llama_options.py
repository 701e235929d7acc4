"""What llama.cpp is started with: threads, devices, and what of them times are kept under. Nothing is run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from profiles import environment, models
from profiles.errors import InputError
from profiles.serving import llama_flags, llamacpp
from profiles.serving.llama_program import Program, program_of
from profiles.serving.llama_servers import Options
from profiles.serving.llamacpp import LlamaCppEngine
from profiles.shipped import TARGET

pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of()


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Options(threads=1, log_folder=tmp_path)


def test_a_gpu_that_it_cannot_use(program: Program, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the processor does not pass as one that computes on the GPU; layers go where was asked."""
    target = models.describe(TARGET, dtype="float32")
    with pytest.raises(InputError, match=r"device 'cuda:0': xllamacpp .* finds no GPU"):
        LlamaCppEngine(target, (), program, replace(options, device="cuda:0"))
    listing = [
        sys.executable,
        "-c",
        "print('Available devices:\\n  CUDA0: NVIDIA H100 (81559 MiB, 80000 MiB free)')",
    ]
    assert llama_flags.devices_of(listing) == ["CUDA0"]
    monkeypatch.setattr(llamacpp, "fingerprint", lambda _: environment.fingerprint("cpu"))
    can = replace(program, command=tuple(listing))
    with LlamaCppEngine(target, (), can, replace(options, device="cuda")) as engine:
        assert '"-ngl","99"' in str(engine.environment.engine_options)


def test_threads_belong_to_the_key(program: Program, options: Options) -> None:
    """Times with another number of threads, or other arguments, are other evidence."""
    target = models.describe(TARGET, dtype="float32")
    kinds = (options, replace(options, threads=2), replace(options, more=("--no-mmap",)))
    found = [LlamaCppEngine(target, (), program, one).environment for one in kinds]
    assert len({one.digest for one in found}) == 3
    assert [one.threads for one in found] == [1, 2, 1]
    assert found[0].engine_options is not None
    assert json.loads(found[0].engine_options)["weights"] == "float32"
