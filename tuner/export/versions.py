"""Which version of an engine the text is for: the one given, else the installed one, else the newest one checked.

The engines are never imported: their packages' metadata is read, and `llama-server` is asked for its help.
"""

import re
import shutil

from packaging.version import InvalidVersion, Version

from profiles.hardware import software
from profiles.records.errors import InputError
from tuner.export.select import Engine

TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "llamacpp": "llama.cpp",
    "transformers": "transformers",
}
# the newest release whose own class or parser, or (TensorRT-LLM) whose reference page, the exporters were checked with
NEWEST = {
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "trtllm": "1.4.0rc1",
    "llamacpp": "b11549",
    "transformers": "5.23.0",
}


def engine_of(form: str, given: str | None) -> Engine:
    """The engine with its version. Raises InputError: a version that is none."""
    if given is not None:
        version = str(build_of(given)) if form == "llamacpp" else str(version_of(form, given))
        return Engine(form=form, title=TITLES[form], version=_spelled(form, version), note=_beyond(form, version))
    found = installed(form)
    if found is not None:
        return Engine(form=form, title=TITLES[form], version=_spelled(form, found), note=_beyond(form, found))
    title = TITLES[form]
    note = f"no {title} is installed here: emitted for {title} {NEWEST[form]}, the newest one known"
    return Engine(form=form, title=title, version=NEWEST[form], note=note)


def version_of(form: str, text: str) -> Version:
    """Raises InputError, naming what is allowed."""
    try:
        return Version(text.strip().removeprefix("v"))
    except InvalidVersion:
        example = NEWEST[form]
        raise InputError(
            f"engine version {text!r}: {TITLES[form]}'s are allowed, like {example} (what its package says)"
        ) from None


def build_of(text: str) -> int:
    """The build number of `b6800` or `6800`. Raises InputError."""
    match = re.fullmatch(r"b?([1-9]\d{0,8})", text.strip())
    if match is None:
        raise InputError(f"engine version {text!r}: llama.cpp's build numbers are allowed, like b6800 or 6800")
    return int(match[1])


def installed(form: str) -> str | None:
    """The version of the package that is installed here, None without one (or of llama.cpp: see `server_help`)."""
    stated = software.installed_version(form)
    try:
        return None if stated is None else str(Version(stated))
    except InvalidVersion:
        return None


def server_help() -> str | None:
    """What `llama-server --help` prints, of the one that is named or on the PATH; None without one."""
    program = software.llama_server_path() or shutil.which("llama-server")
    return None if program is None else software.server_help([program])


def _spelled(form: str, version: str) -> str:
    return f"b{version}" if form == "llamacpp" else version


def _beyond(form: str, version: str) -> str | None:
    newest = NEWEST[form]
    if form == "llamacpp":
        newer = int(version) > build_of(newest)
    else:
        known = Version(newest)  # a post-release or a build of it is not newer
        newer = Version(version) > known and Version(Version(version).base_version) > known
    return f"{TITLES[form]} {_spelled(form, version)} is newer than {newest}, the newest one known" if newer else None
