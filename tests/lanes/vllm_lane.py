"""Asks the installed vLLM about argument lines: its own parser, then its own engine and speculative config classes.

Loaded by `asked` with the lane's folder on the path; it knows nothing of this project.
"""

from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

READ = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", "revision", "draft_sample_method")
SCHEDULE = "num_speculative_tokens_per_batch_size"


def judge(question: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """What vLLM makes of the line, down to the config its engine would start with."""
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    own = ["--model", question["target"], "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    try:
        config = EngineArgs.from_cli_args(parser.parse_args([*own, *words])).create_engine_config()
    except SystemExit:
        return {"accepted": False, "said": "the argument parser ended the program"}
    except Exception as error:
        return {"accepted": False, "said": f"{type(error).__name__}: {error}"}
    speculative = config.speculative_config
    if speculative is None:
        return {"accepted": False, "said": "accepted, but nothing speculative was read from it"}
    read = {key: getattr(speculative, key, None) for key in READ}
    read[SCHEDULE] = lookup(speculative)
    draft = getattr(speculative, "draft_model_config", None)
    read["model"] = None if draft is None else draft.model
    return {"accepted": True, "said": type(speculative).__name__, "read": read}


def lookup(speculative: Any) -> list[int] | None:
    """Drafted tokens at batch sizes 0 (unused), 1, 2, ... as the scheduler looks them up; None without a schedule."""
    schedule = getattr(speculative, SCHEDULE, None)
    if schedule is None:
        return None
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    most = speculative.num_speculative_tokens
    dense = build_dynamic_sd_schedule_lookup(schedule, vllm_max_batch_size=32, vllm_num_speculative_tokens=most)
    return [int(length) for length in dense]
