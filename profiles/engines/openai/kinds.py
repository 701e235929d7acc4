"""The table of server kinds."""

from profiles.engines.llamacpp.flags import release_of_build
from profiles.engines.llamacpp.responses import SERVER as LLAMA_CPP
from profiles.engines.releases import TITLES, EngineRelease, release_of
from profiles.engines.serving.server_kind import ServerKind, openai_body
from profiles.engines.sglang.flags import SERVER as SGLANG
from profiles.engines.vllm.responses import SERVER as VLLM
from profiles.records.errors import require

SERVER_KINDS = {
    "vllm": VLLM,
    "sglang": SGLANG,
    "llamacpp": LLAMA_CPP,
    "trtllm": ServerKind(body_of=openai_body),
    "openai": ServerKind(body_of=openai_body),
}


def server_kind(name: str) -> ServerKind:
    """Raises InputError: no such kind."""
    require(name in SERVER_KINDS, f"kind of server {name!r}: allowed are {', '.join(SERVER_KINDS)}")
    return SERVER_KINDS[name]


def release_for(kind: str, version: str | None) -> EngineRelease:
    """The release whose flags a server of a kind takes. Raises InputError: not a version of it."""
    if kind == "llamacpp":
        return release_of_build(version)
    return release_of(kind, version) if kind in TITLES else EngineRelease(engine=kind, version=version or "")
