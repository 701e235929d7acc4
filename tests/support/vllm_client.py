"""One vLLM engine of the lane in a process of its own (`vllm_driver.py`), on the models that ship."""

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from profiles.builtin import BUILTIN_FOLDER
from profiles.engines.serving.process import Process
from profiles.engines.vllm.flags import SCHEDULE
from tests.lanes.places import ROOT, RUNNING, V2

QUIET = {  # on a shared machine
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "DRAFTPICK_METRICS": "",
}


def speculative(length: int, *, scheduled: bool, draft: str = "draft-general") -> dict[str, Any]:
    """The config of a draft model, with a schedule that captures every length where k is chosen at run time."""
    config = {"method": "draft_model", "model": str(BUILTIN_FOLDER / draft), "num_speculative_tokens": length}
    return config | ({SCHEDULE: [[k, k, k] for k in range(1, length + 1)]} if scheduled else {})


class VllmClient(AbstractContextManager["VllmClient"]):
    """`options` are vLLM's engine arguments; `v2`: Model Runner V2; `asynchronous`: two batches are in flight."""

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        *,
        v2: bool = False,
        asynchronous: bool = False,
        variables: dict[str, str] | None = None,
    ) -> None:
        path = os.pathsep.join([str(ROOT), *([V2["PYTHONPATH"]] if v2 else [])])
        environment = QUIET | (V2 if v2 else {}) | (variables or {}) | {"PYTHONPATH": path}
        command = [str(RUNNING.python), "-m", "tests.support.vllm_driver"]
        self.process = Process(command, folder / "vllm.log", environment=environment, piped=True)
        defaults = {
            "model": str(BUILTIN_FOLDER / "target"),
            "dtype": "float32",
            "max_model_len": 384,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": 2**27,
            "generation_config": "vllm",
            "async_scheduling": asynchronous,
        }
        self._send(defaults | options)

    def decode(self, prompts: Sequence[Sequence[int]], batch_size: int, max_tokens: int) -> dict[str, Any]:
        """`tokens` by prompt and the `seconds` of the queue. Raises EngineError: the engine ended."""
        self._send({"prompts": prompts, "batch_size": batch_size, "max_tokens": max_tokens})
        line = self.process.pipes[1].readline()
        if not line:
            self.process.wait(10.0)
            raise self.process.failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _send(self, document: dict[str, Any]) -> None:
        stdin, _ = self.process.pipes
        stdin.write(json.dumps(document).encode() + b"\n")
        stdin.flush()

    def __exit__(self, *_: object) -> None:
        self.process.stop()
