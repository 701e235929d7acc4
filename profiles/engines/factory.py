"""From what a user names to a serving engine on a bench: models are described, drafts that it cannot run are refused.

The one place that knows all adapters; what will be measured it must not know.
"""

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import platformdirs

from profiles.engines.base import SERVED_KINDS, Engine
from profiles.engines.bench import Bench
from profiles.engines.serving.server_kind import SERVER_KINDS_BY_NAME, kind_of
from profiles.hardware import fingerprint, machine
from profiles.models import loader, sources
from profiles.models.loader import DescribedModel
from profiles.records.core import DTYPES, Draft, Model, Setup
from profiles.records.draft_spec import DraftSpec, RefusedDraft, engine_options
from profiles.records.errors import InputError

TITLE = "draftpick"  # of the folder for logs
LEAST_ROWS = 8  # vLLM's rows are part of what its times are kept under, so few numbers of them
FlagsOf = Callable[[Model, Setup], list[str]]  # the arguments that tell a server of a setup


class ServingEngine(Engine, Protocol):
    """An engine that starts processes."""

    def close(self) -> None:
        """Ends them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which engine, and how it is reached; what is None is looked for.

    `command`: the `llama-server` to start, or the Python that has vLLM. `launch`: a server's command with `{port}` and
    `{speculative}` in it; `kind`: what such a server is; `more`: what stands behind a draft's flags. `max_requests`:
    most that will be in flight; `min_length`, `max_length`: fewest and most tokens drafted a round.
    """

    engine: str
    command: str | None = None
    launch: str | None = None
    kind: str = "vllm"
    threads: int | None = None
    device: str | None = None
    more: tuple[str, ...] = ()
    max_requests: int = 1
    min_length: int = 1
    max_length: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An engine before its drafts are known: `check` raises InputError for a draft that it does not have."""

    check: Callable[[Draft], None]
    with_drafts: Callable[[tuple[Draft, ...]], ServingEngine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Target and drafts as a user names them; `dtype` None: float32 on a CPU, bfloat16 on a GPU, of a GGUF its own.

    `known`: drafts whose records are at hand.
    """

    target: str
    drafts: tuple[DraftSpec, ...] = ()
    dtype: str | None = None
    known: tuple[Draft, ...] = ()


def open_bench(place: Place, asked: Models, flags_of: FlagsOf) -> Bench:
    """The bench of a serving engine. A draft that cannot be used is refused and the others go on.

    Raises: InputError: an unknown engine or dtype, no way to reach it. ModelError: the target cannot be read. The first
    draft's error, when there are drafts and none can be used.
    """
    if place.engine not in OPENED:
        raise InputError(f"engine {place.engine!r}: allowed are torch, {', '.join(OPENED)}")
    if asked.dtype is not None and asked.dtype not in DTYPES:
        raise InputError(f"dtype {asked.dtype!r}: allowed are {', '.join(DTYPES)}")
    on_cpu = fingerprint.pick_device(place.device) == "cpu"
    own = None if asked.target.lower().endswith(".gguf") else "float32" if on_cpu else "bfloat16"
    described = {asked.target: loader.describe(asked.target, dtype=asked.dtype or own)}
    found = OPENED[place.engine](place, described[asked.target], flags_of)
    drafts = {draft.digest: draft for draft in asked.known}
    errors: dict[str, InputError] = {}
    for spec in asked.drafts:
        try:
            draft = _draft(spec, described, asked.target)
            found.check(draft)
            drafts.setdefault(draft.digest, draft)
        except InputError as error:
            errors[spec.name] = error
    if errors and not drafts:
        raise next(iter(errors.values()))
    engine = found.with_drafts(tuple(drafts.values()))
    used = {draft.model for draft in drafts.values()}
    refused = [RefusedDraft.from_error(name, error) for name, error in errors.items()]
    return Bench(
        engine=engine,
        loaded=tuple(one for name, one in described.items() if name == asked.target or one.record in used),
        refused=tuple(refused),
        close=engine.close,
    )


def _draft(spec: DraftSpec, described: dict[str, DescribedModel], target: str) -> Draft:
    """The record of a draft; a model is described first. Raises InputError: of a kind or a model that does not do."""
    if spec.kind not in SERVED_KINDS:
        raise InputError(f"draft {spec.name!r}: a serving engine drafts with {', '.join(SERVED_KINDS)} only")
    record = None
    if spec.path is not None and spec.kind == "native":
        record = loader.describe_head(spec.path, dtype=described[target].record.dtype)
    elif spec.path is not None:
        if spec.path not in described:
            one = loader.describe(spec.path, dtype=described[target].record.dtype)
            loader.check_pair(described[target], one)
            described[spec.path] = one
        record = described[spec.path].record
    return Draft(kind=spec.kind, model=record, max_match=spec.max_match, min_match=spec.min_match, method=spec.method)


def _place_of(name: str) -> str:
    """The folder or file of a model, as a server is told of it."""
    source = sources.find(name)
    return str(source.folder if source.gguf is None else source.gguf.path)


def _logs(engine: str) -> Path:
    """A folder of this run's own, under the user's for logs."""
    return platformdirs.user_log_path(TITLE) / f"{engine}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _vllm(place: Place, target: DescribedModel, flags_of: FlagsOf) -> Found:  # noqa: ARG001
    from profiles.engines.vllm.config import VllmOptions, num_positions
    from profiles.engines.vllm.engine import VllmEngine

    def check(draft: Draft) -> None:
        if draft.model is not None:
            num_positions(sources.find(draft.model.name))
        if draft.method is not None:
            engine_options(draft.method)

    def with_drafts(drafts: tuple[Draft, ...]) -> ServingEngine:
        options = VllmOptions(
            python=place.command,
            max_batch_size=max(LEAST_ROWS, 1 << (place.max_requests - 1).bit_length()),
            max_length=place.max_length,
            max_alive=len(drafts) + 2,  # beside the drafts' engines the plain one, and one that scores
            log_folder=_logs(place.engine),
        )
        return VllmEngine(target.record, drafts, options)

    num_positions(sources.find(target.record.name))  # refuses what vLLM does not read
    return Found(check=check, with_drafts=with_drafts)


def _llamacpp(place: Place, target: DescribedModel, flags_of: FlagsOf) -> Found:  # noqa: ARG001
    from profiles.engines.llamacpp import ngram
    from profiles.engines.llamacpp.binary import program_of, weights_of
    from profiles.engines.llamacpp.engine import LlamaCppEngine
    from profiles.engines.llamacpp.flags import args_for
    from profiles.engines.llamacpp.servers import Options

    program = program_of(place.command)
    options = Options(
        threads=place.threads or machine.num_threads() or 1,
        log_folder=_logs(place.engine),
        device=fingerprint.pick_device(place.device),
    )

    def check(draft: Draft) -> None:
        if draft.kind == "ngram":
            ngram.check(draft)
        args_for(Setup(draft=draft, length=place.max_length), program.spelling, "")
        if draft.model is not None:
            weights_of(draft.model)

    return Found(check=check, with_drafts=lambda drafts: LlamaCppEngine(target, drafts, program, options))


def _server(place: Place, target: DescribedModel, flags_of: FlagsOf) -> Found:
    from profiles.engines.llamacpp import ngram
    from profiles.engines.openai.engine import ServerEngine
    from profiles.engines.openai.launch import Launch

    kind = kind_of(place.kind)
    launch = Launch(
        kind=kind,
        log_folder=_logs(place.kind),
        template=(place.launch or "").replace("{model}", shlex.quote(_place_of(target.record.name))),
        flags_of=lambda setup: [*flags_of(target.record, setup), *place.more],
    )

    def check(draft: Draft) -> None:
        """A draft that can be told at one of its lengths: what drops short look-ups takes them at others only."""
        if SERVER_KINDS_BY_NAME[kind].drops_short and draft.kind == "ngram":
            ngram.check(draft)
        try:
            launch.command(Setup(draft=draft, length=place.max_length))
        except InputError:
            launch.command(Setup(draft=draft, length=place.min_length))

    def with_drafts(drafts: tuple[Draft, ...]) -> ServingEngine:
        return ServerEngine(target.record, drafts, launch, target.encode, fingerprint.pick_device(place.device))

    return Found(check=check, with_drafts=with_drafts)


OPENED: dict[str, Callable[[Place, DescribedModel, FlagsOf], Found]] = {
    "vllm": _vllm,
    "llamacpp": _llamacpp,
    "server": _server,
}
