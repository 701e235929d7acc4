"""Keeps secrets out of what is shown and stored, and the user's shell out of the servers that are started."""

import re
from collections.abc import Mapping

from profiles.records.core import digest_of

HIDDEN = "***"
_NAME = r"(?:api[-_]?key|access[-_]?key|secret|password|passwd|credential|token|[-_]key)s?"
_HEADER = r"(?<![\w-])(?:x-[\w-]*(?:key|token|secret|auth)|api-?key|authorization)"
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"',}\]]+)"""
_PATTERNS = (
    re.compile(rf"(?i)(\b\w*{_NAME}=\[?)(?!\{{){_VALUE}"),  # NAME_TOKEN=value, --api-key=value
    re.compile(rf"(?i)((?<![\w-])--?[\w-]*(?:{_NAME}|authorization)\s+)(?![-{{]){_VALUE}"),  # --api-key value
    re.compile(rf"(?i)(['\"][\w-]*{_NAME}\\?['\"]\s*:\s*\[?\\?){_VALUE}"),  # {"api_key": "value"}
    re.compile(rf"(?i)({_HEADER}\s*:(?!\s*bearer\b)\s*)[^\"'\n]+"),  # a header
    re.compile(r"(?i)(\bbearer\s+)[^\s\"']+"),
    re.compile(r"(?i)([?&](?:key|sig|signature|auth|code)=)[^&\s\"']+"),
    re.compile(r"(://)[^/\s?#\"']+(?=@)"),  # user:password of a URL
    re.compile(r"()\b(?:hf_|sk-)[A-Za-z0-9_-]{8,}"),
)
_NOT_SECRET = re.compile(r"(?i)tokens['\"=\s]")  # --max-num-batched-tokens 512
_ROOT = r"(?:file:)?(?:(?:~|\.{1,2})?/|[A-Za-z]:[/\\])"
_QUOTED_PATH = re.compile(rf"""(?P<quote>["'])(?P<path>{_ROOT}[^"'{{}}\n]*)(?P=quote)""")
# no slash of a URL or of a relative name, as `https://host:{{port}}/v1` and `org/model` have them
_BARE_PATH = re.compile(
    rf"""(?<![\w.~/\\\]}}-])(?!(?<=:)//)(?P<path>{_ROOT}(?:\\.|[^\s"'`:;,=|<>(){{}}\\])*)""", re.DOTALL
)

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


def without_paths(text: str) -> str:
    """A command's text with the last part and a digest in place of each absolute path; unchanged where it has none.

    Such a text tells nobody where files lie, and still differs where a path differs. Doing it twice changes nothing.
    """
    text = _QUOTED_PATH.sub(lambda match: f"{match['quote']}{_last_part(match['path'])}{match['quote']}", text)
    return _BARE_PATH.sub(lambda match: _last_part(match["path"]), text)


def _last_part(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    if not parts or (len(parts) == 1 and len(parts[0]) < 3):  # a slash, or `/v1`
        return path
    return f"{parts[-1]}#{digest_of(path)[:8]}"


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
