"""vLLM's worker with the CPU build's sampling repaired: `expand` of 0.32.0 fills a copy of its output, and drops it.

Temperatures of drafted rows are then whatever memory held. Temperature and top-p are right with this, top-k is not.
"""

import importlib.util
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parents[2] / "profiles/engines/vllm/worker.py"


def main() -> None:
    import torch
    import vllm.utils.cpu_triton_utils as kernels

    def expand(
        output: Any, input_val: Any, cu_num_tokens: Any, replace_from: Any, replace_to: Any, *_: Any, **__: Any
    ) -> None:
        counts = torch.diff(cu_num_tokens, prepend=torch.zeros(1, dtype=cu_num_tokens.dtype))
        changed = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
        output.copy_(torch.repeat_interleave(changed, counts))

    kernels._expand_kernel_impl = expand
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.main()


if __name__ == "__main__":
    main()
