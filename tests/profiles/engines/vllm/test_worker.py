"""What the worker makes of vLLM's objects, on stand-ins for those of a GPU: not yet run on a GPU."""

import ast
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from profiles.engines.vllm.flags import TRACED
from profiles.engines.vllm.worker import SCHEDULE, Worker, _drafts_fewer, _look_up
from tests.lanes.places import LANES, RUNNING, Lane

HOOKS = {"schedule": ["self", "throttle_prefills"], "update_draft_token_ids": ["self", "draft_token_ids"]}
FIRST, LAST = map(Version, TRACED)
LANES_TRACED = [lane for lane in (*LANES, RUNNING) if "vllm" in lane.form and FIRST <= Version(lane.version) <= LAST]
SCHEDULER = "vllm/v1/core/sched/scheduler.py"


@pytest.mark.parametrize(
    ("method", "device", "runner", "fewer"),
    [
        ("draft_model", "cpu", 1, True),
        ("draft_model", "cuda", 1, False),  # a table of lengths takes Model Runner V1 its full graphs
        ("draft_model", "cuda", 2, False),
        ("dflash", "cuda", 2, False),
        ("eagle3", "cuda", 2, True),
        ("mtp", "cuda", 2, True),
        ("ngram", "cuda", 2, True),
    ],
)
def test_which_drafters_draft_fewer_tokens(method: str, device: str, runner: int, fewer: bool) -> None:
    """Only these change their length in place; the others have a server for each."""
    speculative = make_dataclass("Speculative", ["method", SCHEDULE])(method, None)
    speculative.use_multi_module_mtp = lambda: False
    config = SimpleNamespace(
        speculative_config=speculative,
        use_v2_model_runner=runner == 2,
        device_config=SimpleNamespace(device_type=device),
    )
    assert _drafts_fewer(config) == fewer


@pytest.mark.parametrize("name", ["drafter", "speculator"])
def test_the_window_of_either_model_runner(name: str) -> None:
    """V1 has a `drafter`, V2 a `speculator`."""
    drafter, worker = SimpleNamespace(min_n=1, max_n=1), Worker()
    held: Any = SimpleNamespace(**{name: drafter})
    for part in ("model_runner", "worker", "driver_worker", "model_executor", "engine_core", "engine_core"):
        held = SimpleNamespace(**{part: held})
    worker._engine = held
    worker.use(window=[2, 4])
    assert (drafter.min_n, drafter.max_n) == (2, 4)


def test_look_ups_of_requests_are_apart() -> None:
    """Each has an index of its own text, which grows with it."""
    look_up = _look_up(3, 1, 4)
    assert look_up("a", [5, 6, 7, 8, 9, 5, 6]) == [7, 8, 9, 5]
    assert look_up("b", [1, 2, 3]) == []
    assert look_up("a", [5, 6, 7, 8, 9, 5, 6, 7]) == [8, 9, 5, 6]


@pytest.mark.parametrize("lane", LANES_TRACED, ids=lambda lane: lane.folder.name)
def test_the_hooks_are_those_of_the_release(lane: Lane) -> None:
    """Their signatures, in the source of each version that is traced, run or not."""
    if not lane.is_whole:
        pytest.skip(f"no lane: python -m tests.lanes.install vllm={lane.version}")
    [source] = [*lane.folder.glob(SCHEDULER), *lane.folder.glob(f"lib/python3*/site-packages/{SCHEDULER}")]
    tree = ast.parse(source.read_text(encoding="utf-8"))
    [scheduler] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Scheduler"]
    signatures = {
        node.name: [argument.arg for argument in node.args.args]
        for node in scheduler.body
        if isinstance(node, ast.FunctionDef) and node.name in HOOKS
    }
    assert signatures == HOOKS
