"""Asks the installed SGLang about argument lines: its own parser and arguments record, and its list of algorithms.

What the whole server would say later (kernels, memory, the models' own limits) needs a GPU and is not asked. Triton is
stood in for: it is a gigabyte, and parsing runs none of it. Loaded by `asked`.
"""

import argparse
import sys
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

for name in ("triton", "triton.language"):
    stand_in = MagicMock(name=name)
    stand_in.__spec__, stand_in.__path__, stand_in.__version__ = ModuleSpec(name, None), [], "0"
    sys.modules[name] = stand_in

from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.srt.speculative.spec_info import (  # noqa: E402
    SpeculativeAlgorithm,
)

READ = (
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_num_draft_tokens",
    "speculative_ngram_max_bfs_breadth",
)


def judge(question: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """What SGLang reads from the line."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    try:
        read = ServerArgs.from_cli_args(
            parser.parse_args(["--model-path", question["target"], "--device", "cpu", *words])
        )
        SpeculativeAlgorithm.from_string(read.speculative_algorithm)
    except SystemExit:
        return {"accepted": False, "said": "the argument parser ended the program"}
    except Exception as error:
        return {"accepted": False, "said": f"{type(error).__name__}: {error}"}
    return {"accepted": True, "said": "ServerArgs", "read": {key: getattr(read, key) for key in READ}}
