"""Keeps secrets out of what is shown and stored, and the user's shell out of the servers that are started."""

import re
from collections.abc import Mapping

HIDDEN = "***"
_NAME = r"(?:api[-_]?key|access[-_]?key|secret|password|passwd|credential|token|[-_]key)s?"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"',}\]]+)"""
_PATTERNS = (
    re.compile(rf"(?i)(\b\w*{_NAME}=)(?!\{{){_VALUE}"),  # NAME_TOKEN=value, --api-key=value
    re.compile(rf"(?i)(--?[\w-]*(?:{_NAME}|authorization)\s+)(?![-{{]){_VALUE}"),  # --api-key value
    re.compile(rf"(?i)(['\"]\w*{_NAME}['\"]\s*:\s*){_VALUE}"),  # {"api_key": "value"}
    re.compile(r"(?i)(\bbearer\s+)[^\s\"']+"),
    re.compile(r"(://)[^/\s@]+(?=@)"),  # user:password of a URL
    re.compile(r"()\b(?:hf_|sk-)[A-Za-z0-9_-]{8,}"),
)
_NOT_SECRET = re.compile(r"(?i)tokens['\"=\s]")  # --max-num-batched-tokens 512

# of VLLM_*: what says how the CPU is bound, how much memory and which runner is used; part of the key of times
KEYED = (
    "OMP_NUM_THREADS",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_USE_V2_MODEL_RUNNER",
)
PASSED_ON = (*KEYED, "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS")
REMOVED_PREFIXES = ("LLAMA_ARG_", "VLLM_")


def redacted(text: str) -> str:
    """`text` with keys, tokens and passwords replaced; unchanged where it has none."""
    for pattern in _PATTERNS:
        text = pattern.sub(_hide, text)
    return text


def _hide(match: re.Match[str]) -> str:
    return match[0] if _NOT_SECRET.search(match[1]) else f"{match[1]}{HIDDEN}"


def removed_variables(variables: Mapping[str, str]) -> list[str]:
    """Names of variables that would change a server's settings or ask its clients for a key."""
    return sorted(
        name
        for name in variables
        if name not in PASSED_ON and (name.startswith(REMOVED_PREFIXES) or name.endswith("_API_KEY"))
    )


def server_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server that is started: all variables but the removed ones."""
    removed = set(removed_variables(variables))
    return {name: value for name, value in variables.items() if name not in removed}


def keyed_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that times depend on, as far as they are set."""
    return {name: variables[name] for name in KEYED if name in variables}
