"""The first run on a GPU: every check of the CUDA path in at most 10 minutes, one JSON document as the last line.

    python -m tests.benchmarks.first_gpu_run              # exit code 0: all checks passed, 1: one failed, 3: no GPU
    python -m tests.benchmarks.first_gpu_run --emulated   # the same checks on GPUs emulated on the CPU, to test them

Needs no vLLM and no download: tiny random models of each architecture, and the models that ship. A check that raises
is a failed check and the others go on; what does not fit in the time is left out and named.
"""

import contextlib
import importlib.metadata
import io
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from profiles.engines.torch import batch_model
from profiles.engines.torch import engine as engine_module
from profiles.engines.torch.batch_model import RowModel
from profiles.engines.torch.decoder import Decoder
from profiles.engines.torch.engine import TorchEngine
from profiles.models import loader
from profiles.models.early_exit import early_exit
from profiles.records.core import PLAIN, Draft, Prompt, Setup, Workload
from profiles.stats import median
from profiles.timing.clock import Clock
from tests.benchmarks.common import arguments, family, finish
from tests.benchmarks.roofline import copy_bytes_per_s
from tests.emulated_gpu import EmulatedGpu
from tests.support import tiny
from tests.support.cli import small_run, write_prompts
from tuner.cli.app import main as tune

NO_GPU, LIMIT_S, TUNE_S = 3, 560.0, 120.0
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen2")
ALLOWED = {"float32": 1e-4, "bfloat16": 0.03}  # of the largest logit, between steps with graphs and without
PROMPTS = tuple(Prompt(domain="a", token_ids=tuple(range(20, 20 + size))) for size in (6, 11, 3))
WORKLOAD = Workload(batch_size=2, context_length=40, max_new_tokens=6)

Row = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Scene:
    """Where checks run: the tiny models by architecture, the devices, and whether they are emulated."""

    folders: dict[str, Path]
    devices: Sequence[str]
    is_emulated: bool


@dataclass(slots=True)
class Watch:
    """Counts captures, those inside timed units, and waits of the host inside rounds by the line that waited."""

    captures: int = 0
    timed_captures: int = 0
    rounds: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Self:
        make, quietest, run_round = batch_model._Graph.__init__, engine_module.quietest, Decoder.round

        def counted(graph: Any, *arguments: Any) -> None:
            self.captures += 1
            make(graph, *arguments)

        def timed(measure: Callable[[], Any], gpus: Sequence[str]) -> Any:
            before = self.captures
            result = quietest(measure, gpus)
            self.timed_captures += self.captures - before
            return result

        def watched(decoder: Decoder) -> Any:
            self.rounds += 1
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    return run_round(decoder)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    self.waits.update(
                        f"{Path(warning.filename).name}:{warning.lineno}"
                        for warning in caught
                        if "synchronizing CUDA operation" in str(warning.message)
                    )

        for owner, name, stand_in in (
            (batch_model._Graph, "__init__", counted),
            (engine_module, "quietest", timed),
            (Decoder, "round", watched),
        ):
            self._stack.enter_context(mock.patch.object(owner, name, stand_in))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def waits_per_round(self) -> float:
        return round(sum(self.waits.values()) / self.rounds, 3)


def step_difference(graphed: RowModel, eager: RowModel) -> float:
    """Of the largest logit: how far steps that are captured, then replayed at other positions, are from eager ones."""
    eager._graphs = None
    differences = []
    with torch.inference_mode():
        for start, width in ((0, 3), (3, 1), (4, 1), (5, 4), (7, 1), (6, 4)):
            tokens = torch.arange(2 * width, device=graphed.device).view(2, width) + 20
            positions = torch.arange(start, start + width, device=graphed.device).expand(2, -1)
            logits, expected = (
                rows.step(tokens, positions, start + width, keep=width).cpu().float() for rows in (graphed, eager)
            )
            differences.append(float((logits - expected).abs().max() / expected.abs().max()))
    return float(torch.tensor(differences).max())  # not a number where one is not


def engine_on(folders: dict[str, Path], architecture: str, device: str) -> TorchEngine:
    """A tiny random target of an architecture with a draft of every kind, in float32."""
    target = loader.load(str(folders[architecture]), dtype="float32", device=device)
    other = loader.load(str(folders["llama" if architecture == "qwen2" else "qwen2"]), dtype="float32", device=device)
    ngram = {"max_match": 3, "min_match": 1}
    drafts = {
        Draft(kind="model", model=other.record): other.model,
        Draft(kind="early_exit", num_layers=2): early_exit(target, 2),
        Draft(kind="ngram", **ngram): None,
        Draft(kind="composite", model=other.record, **ngram): other.model,
    }
    return TorchEngine(target, drafts, device)


def environment(scene: Scene) -> Row:
    """What the document is about; the device's copy bandwidth."""
    versions = {}
    for package in ("torch", "transformers", "vllm", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "copy_gb_per_s": None if scene.is_emulated else round(copy_bytes_per_s("cuda") / 1e9),
    }


def graphs(scene: Scene) -> Row:
    """Each architecture loads, and its graphs give what eager steps give, on every device and in both float types."""
    rows = []
    for architecture, device, dtype in (
        *((name, scene.devices[0], dtype) for name in ARCHITECTURES for dtype in ALLOWED),
        *((name, device, "float32") for name in ("llama", "qwen2") for device in scene.devices[1:2]),
    ):
        model = loader.load(str(scene.folders[architecture]), dtype=dtype, device=device).model
        graphed = RowModel(model, 2, 64)
        difference = step_difference(graphed, RowModel(model, 2, 64))
        rows.append(
            {
                "architecture": architecture,
                "device": device,
                "dtype": dtype,
                "difference": round(difference, 7) if math.isfinite(difference) else None,
                "graphs": len(graphed._graphs or ()),
                "kernel": engine_module.kernel_name(model),
                "ok": difference <= ALLOWED[dtype] and len(graphed._graphs or ()) == 3,
            }
        )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def decoding(scene: Scene) -> Row:
    """Greedy outputs with every draft equal plain ones, no capture is timed, and the host waits once a round."""
    rows = []
    devices = {"llama": scene.devices[-1]}
    for architecture, temperature in ((name, value) for name in ARCHITECTURES for value in (0.0, 0.8)):
        engine = engine_on(scene.folders, architecture, devices.get(architecture, scene.devices[0]))
        workload = replace(WORKLOAD, temperature=temperature, top_p=0.9 if temperature else 1.0)
        setups = (PLAIN, *(Setup(draft=draft, length=2) for draft in engine.drafts))
        with Watch() as watch:
            samples = engine.run_together(workload, PROMPTS, setups, "check")
        plain = {sample.prompt_digest: sample.output_digest for sample in samples[: len(PROMPTS)]}
        differing = sum(sample.output_digest != plain[sample.prompt_digest] for sample in samples)
        is_complete = all(sample.output_tokens == workload.max_new_tokens for sample in samples)
        rows.append(
            {
                "architecture": architecture,
                "device": str(engine._target.model.device),
                "temperature": temperature,
                "options": engine.environment.engine_options,
                "outputs_that_differ_from_plain": differing if temperature == 0.0 else None,
                "captures": watch.captures,
                "captures_in_timed_units": watch.timed_captures,
                "waits_per_round": watch.waits_per_round,
                "waits": dict(watch.waits),
                "ok": is_complete and watch.timed_captures == 0 and (temperature > 0.0 or differing == 0),
            }
        )
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def print_waits(rows: Sequence[Row]) -> None:
    """A table of what a timed round must not do."""
    print(f"{'architecture':<13}{'temperature':>12}{'captures':>10}{'in timed units':>16}{'waits a round':>15}")
    for row in rows:
        counts = f"{row['captures']:>10}{row['captures_in_timed_units']:>16}{row['waits_per_round']:>15}"
        print(f"{row['architecture']:<13}{row['temperature']:>12}{counts}")


def step_times(scene: Scene) -> Row:
    """The step-time curve of the models that ship, greedy and sampled; of a tiny model when emulated."""
    if scene.is_emulated:
        engine, workload = engine_on(scene.folders, "llama", scene.devices[0]), WORKLOAD
    else:
        bench, workload, _ = family(4, 64)
        assert isinstance(bench.engine, TorchEngine)
        engine = bench.engine
    names = {engine.target.run_digest: engine.target.name}
    names |= {component.digest: component.name for draft in engine.drafts for component in draft.components}
    curves = {}
    for temperature in (0.0, 0.8):
        point = replace(workload, temperature=temperature, top_p=0.9 if temperature else 1.0)
        times = engine.time_steps(point, workload.context_length - 10, 8 if not scene.is_emulated else 2)
        curves[f"temperature {temperature:g}"] = {
            names[digest]: {width: round(1e3 * median(samples), 4) for width, samples in component.samples_s.items()}
            for digest, component in times.items()
        }
    return {"ok": True, "context_length": workload.context_length - 10, "ms": curves}


def head_rows(scene: Scene) -> Row:
    """Whether a vocabulary of an odd number of rows makes the last product slow: milliseconds at both sizes."""
    sizes = (4, 3) if scene.is_emulated else (151680, 151665)
    clock, times = Clock(scene.devices[0]), {}
    hidden = torch.zeros(8, 64 if scene.is_emulated else 4096, dtype=torch.bfloat16, device=scene.devices[0])
    for rows in sizes:
        weight = torch.zeros(rows, hidden.shape[1], dtype=torch.bfloat16, device=scene.devices[0])
        seconds = []
        for _ in range(8):
            started_s = clock.read()
            functional.linear(hidden, weight)
            seconds.append(clock.read() - started_s)
        times[rows] = round(1e3 * median(seconds[3:]), 4)
    return {"ok": True, "ms": times}


def direct_load(scene: Scene) -> Row:
    """Whether weights can be read to the device without a copy in host memory first, which the loader still makes."""
    if scene.is_emulated:
        return {"left_out": "transformers loads in threads, which are not emulated"}
    folder, ids = scene.folders["qwen2"], torch.arange(20, 28, device="cuda:0")[None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cuda:0"})
    loaded = loader.load(str(folder), dtype="float32", device="cuda:0").model
    with torch.inference_mode():
        return {"ok": torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-4)}


def small_tune(scene: Scene) -> Row:
    """A whole run with its proof: of the models that ship, or of a tiny one."""
    with tempfile.TemporaryDirectory() as store, contextlib.ExitStack() as stack:
        command = ["run", "--max-new-tokens", "32"]
        if scene.is_emulated:
            command = small_run(scene.folders["llama"], write_prompts(Path(store) / "prompts.jsonl", 4))
        command += f"--engine torch --device cuda --json --budget {TUNE_S:g}".split()
        stack.enter_context(mock.patch.object(sys, "argv", ["tune.py", *command, "--store", store]))
        output = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        errors = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            tune()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code
    last = output.getvalue().splitlines()[-1:] or [""]
    try:
        document = json.loads(last[0])
    except ValueError:
        document = {}
    return {
        "ok": code in (0, None, 5) and "choice" in document,
        "exit_code": code,
        **{key: document.get(key) for key in ("choice", "speedup", "proven")},
        "errors": errors.getvalue().splitlines()[-3:],
    }


CHECKS = (environment, graphs, decoding, step_times, head_rows, direct_load, small_tune)


def run_checks(scene: Scene) -> Iterator[tuple[str, Row]]:
    """The checks in turn, each with its seconds; those that time leaves no room for are named."""
    started_s = time.monotonic()
    for check in CHECKS:
        begun_s = time.monotonic()
        needed_s = TUNE_S if check is small_tune else 0.0
        if begun_s - started_s + needed_s > LIMIT_S:
            yield check.__name__, {"ok": None, "left_out": "no time"}
            continue
        try:
            row = {"ok": True, **check(scene)}
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            row = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:500]}", "at": at}
        yield check.__name__, {**row, "seconds": round(time.monotonic() - begun_s, 1)}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--emulated", action="store_true", help="on emulated GPUs")
    is_emulated = parser.parse_args().emulated
    if not is_emulated and not torch.cuda.is_available():
        print(f"no CUDA device is here: nothing was checked (exit code {NO_GPU}); --emulated tests the checks")
        return NO_GPU
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        folders = {name: tiny.write_model(Path(folder) / name, name, num_layers=3) for name in ARCHITECTURES}
        if is_emulated:
            stack.enter_context(mock.patch("profiles.timing.clock.MAX_REPEATS", 0))  # its times mean nothing
            stack.enter_context(EmulatedGpu(cudnn_first=True))
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        scene = Scene(folders=folders, devices=devices, is_emulated=is_emulated)
        checks = {}
        for name, row in run_checks(scene):
            checks[name] = row
            outcome = "ok" if row["ok"] else row.get("error") or row.get("left_out") or "failed"
            print(f"{name}: {outcome} ({row.get('seconds', 0)} s)", flush=True)
            if name == "decoding":
                print_waits(row.get("rows", ()))
    finish({"benchmark": "first_gpu_run", "is_emulated": is_emulated, "checks": checks})
    return 0 if all(row["ok"] for row in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
