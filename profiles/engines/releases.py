"""The version of an engine that flags are written for: the given one, else the installed one, else the newest checked.

Engines are not imported: the metadata of their packages is read, and `llama-server` is asked for its help.
"""

import re
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from profiles.hardware import software
from profiles.records.errors import InputError

TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "llamacpp": "llama.cpp",
    "transformers": "transformers",
}
# the newest release whose own config class or parser was run on the flags; of TensorRT-LLM the newest reference page
NEWEST = {"vllm": "0.33.0", "sglang": "0.5.23", "trtllm": "1.4.0rc1", "llamacpp": "b11549", "transformers": "5.23.0"}

# the oldest whose keys are written here: vLLM's has a schedule, SGLang's STANDALONE and NGRAM
FIRST = {"vllm": "0.24.0", "sglang": "0.5.3", "trtllm": "1.2.0", "transformers": "5.17.0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRelease:
    """An engine at one version; `engine` as `--format` takes it, `note` says where the version comes from.

    `is_known`: whether llama.cpp has the flags that are written here.
    """

    engine: str
    version: str
    note: str | None = None
    is_known: bool = True

    @property
    def title(self) -> str:
        return TITLES[self.engine]

    @property
    def name(self) -> str:
        return f"{self.title} {self.version}"

    @property
    def objection(self) -> str | None:
        """Why nothing can be written for this version; None for llama.cpp, which tells its flags in its help."""
        first = FIRST.get(self.engine)
        return f"{self.name} is not known: from {first} on it is" if first and self.is_before(first) else None

    def is_before(self, version: str) -> bool:
        return Version(self.version) < Version(version)


def release_of(engine: str, version: str | None) -> EngineRelease:
    """The release that flags are written for. Raises InputError: `version` is not a version of this engine."""
    title, newest = TITLES[engine], NEWEST[engine]
    build: str | None = None
    if engine == "llamacpp":
        build = None if version is None else f"b{build_number(version)}"
        is_newer = build is not None and build_number(build) > build_number(newest)
    else:
        text = (software.installed_version(engine) or "") if version is None else version.strip().removeprefix("v")
        try:
            build = str(Version(text))
        except InvalidVersion:  # none is installed, or one of a fork that is not a version
            if version is not None:
                needed = f"a version of {title} is needed, like {newest}"
                raise InputError(f"engine version {version!r}: {needed}") from None
        newest_version = Version(newest)  # a post-release or a local build of it is not newer
        is_newer = build is not None and min(Version(build), Version(Version(build).base_version)) > newest_version
    note: str | None
    if build is None:
        note = f"no {title} is installed here: emitted for {title} {newest}, the newest one known"
        return EngineRelease(engine=engine, version=newest, note=note)
    note = f"{title} {build} is newer than {newest}, the newest one known" if is_newer else None
    return EngineRelease(engine=engine, version=build, note=note)


def build_number(text: str) -> int:
    """The number in `b6800` or `6800`. Raises InputError."""
    match = re.fullmatch(r"b?([1-9]\d{0,8})", text.strip())
    if match is None:
        raise InputError(f"engine version {text!r}: llama.cpp takes build numbers like b6800 or 6800")
    return int(match[1])
