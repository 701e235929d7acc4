"""Opens a serving engine: models are described, and drafts that the engine cannot run are refused one by one."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from profiles.engines import rules
from profiles.engines.base import SERVED_KINDS, Engine
from profiles.engines.bench import Bench
from profiles.engines.releases import release_of
from profiles.engines.serving.redaction import removed_variables
from profiles.hardware import fingerprint, machine, software
from profiles.models import loader, sources
from profiles.models.loader import DescribedModel
from profiles.models.memory import check_dtype
from profiles.records.core import LOOKUP_LENGTH, Draft, Setup
from profiles.records.draft_spec import DraftSpec, RefusedDraft, engine_options
from profiles.records.errors import InputError, PairError, require
from profiles.records.files import user_folder

MIN_ROWS = 8  # vLLM's rows are part of the key of its times, so few different numbers are used


class ServingEngine(Engine, Protocol):
    """An engine that starts processes; `notes` are lines about it for the user."""

    notes: tuple[str, ...]

    def close(self) -> None:
        """Ends them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Which engine, and how it is started; what is None is looked for."""

    engine: str
    command: str | None = None  # the `llama-server` to start, or the Python that has vLLM
    launch: str | None = None  # a server's command with `{port}` and `{speculative}` in it
    kind: str = "vllm"  # of such a server, as its version
    version: str | None = None
    draft_args: tuple[str, ...] | None = None  # replace the arguments of any setup that drafts
    threads: int | None = None
    engine_args: tuple[str, ...] = ()  # further arguments of vLLM's, `KEY=VALUE` each
    device: str | None = None
    max_requests: int = 1  # in flight
    min_length: int = 1  # tokens drafted a round
    max_length: int = 8

    @property
    def log_folder(self) -> Path:
        name = self.kind if self.engine == "server" else self.engine
        return user_folder("log") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Target and drafts as a user names them."""

    target: str
    drafts: tuple[DraftSpec, ...] = ()
    dtype: str | None = None  # None: float32 on a CPU, bfloat16 on a GPU, of a GGUF its own
    described: tuple[Draft, ...] = ()  # drafts whose records are there already


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuilder:
    """An engine before its drafts are known: `check` raises InputError for a draft that it cannot run."""

    check: Callable[[Draft], None]
    build: Callable[[tuple[Draft, ...]], ServingEngine]


def open_bench(spec: EngineSpec, models: ModelSpec) -> Bench:
    """The bench of a serving engine; drafts that cannot be used are refused with a reason.

    Raises: InputError: an unknown engine or dtype, a program that is not there. ModelError: the target cannot be read.
    The first draft's error, where all drafts are refused.
    """
    require(spec.engine in BUILDERS, f"engine {spec.engine!r}: allowed are torch, {', '.join(BUILDERS)}")
    if models.dtype is not None:
        check_dtype(models.dtype)
    described = {models.target: loader.describe(models.target, dtype=models.dtype or _default_dtype(spec, models))}
    builder = BUILDERS[spec.engine](spec, described[models.target])
    drafts = {draft.digest: draft for draft in models.described}
    errors: dict[str, InputError] = {}
    for draft_spec in models.drafts:
        try:
            draft = _describe_draft(draft_spec, described, models.target, engine=spec.engine)
            builder.check(draft)
            drafts.setdefault(draft.digest, draft)
        except InputError as error:
            errors[draft_spec.name] = error
    if errors and not drafts:
        raise next(iter(errors.values()))
    engine = builder.build(tuple(drafts.values()))
    removed = removed_variables(os.environ)
    draft_models = {draft.model for draft in drafts.values()}
    loaded = (model for name, model in described.items() if name == models.target or model.record in draft_models)
    return Bench(
        engine=engine,
        loaded=tuple(loaded),
        refused=tuple(RefusedDraft.from_error(name, error) for name, error in errors.items()),
        close=engine.close,
        notes=(*engine.notes, *((f"not passed on to servers: {', '.join(removed)}",) if removed else ())),
    )


def default_engine(
    target: str, drafts: Sequence[DraftSpec], device: str | None
) -> tuple[Literal["torch", "vllm"], str | None]:
    """vLLM where it is installed and a GPU is there, and the line that says so; else the torch engine.

    That also runs what vLLM does not: a GGUF file, a draft of a kind that only it has, a GPU by its number.
    """
    from profiles.engines.vllm.client import find_python

    is_served = not target.lower().endswith(".gguf") and all(draft.kind in SERVED_KINDS for draft in drafts)
    if not is_served or device not in (None, "auto", "cuda") or fingerprint.pick_device(device) == "cpu":
        return "torch", None
    python = find_python(None)
    here = python == sys.executable
    version = software.installed_version("vllm") if here else software.installed_version_in(python, "vllm")
    if version is None:
        return "torch", None
    return "vllm", f"engine: vLLM {version}, because there is a GPU; --engine torch takes draftpick's own loop"


def _default_dtype(spec: EngineSpec, models: ModelSpec) -> str | None:
    """None: the type that the file holds."""
    if models.target.lower().endswith(".gguf"):
        return None
    reads_gguf = spec.engine == "llamacpp"  # the GGUF files of builtin models are float32
    return "float32" if reads_gguf or fingerprint.pick_device(spec.device) == "cpu" else "bfloat16"


def _describe_draft(spec: DraftSpec, described: dict[str, DescribedModel], target: str, *, engine: str) -> Draft:
    """The record of a draft; its model is described first. Raises InputError: a kind or a model that cannot be used."""
    if spec.kind not in SERVED_KINDS and (spec.kind, engine) != ("composite", "vllm"):
        raise InputError(f"draft {spec.name!r}: a serving engine drafts with {', '.join(SERVED_KINDS)} only")
    record = None
    if spec.path is not None and spec.method is not None:
        record = loader.describe_head(spec.path, dtype=described[target].record.dtype)
    elif spec.path is not None:
        if spec.path not in described:
            model = loader.describe(spec.path, dtype=described[target].record.dtype)
            loader.check_pair(described[target], model, engine=engine)
            described[spec.path] = model
        record = described[spec.path].record
    return spec.draft(record)


def _vllm(spec: EngineSpec, target: DescribedModel) -> EngineBuilder:
    from profiles.engines.vllm.config import VllmOptions, engine_arguments, num_positions
    from profiles.engines.vllm.engine import VllmEngine

    def check(draft: Draft) -> None:
        if draft.model is not None:
            num_positions(sources.find(draft.model.name))
        if draft.method is not None:
            engine_options(draft.method)
        setup = Setup(draft=draft.components[-1], length=spec.max_length)
        if reason := rules.vocabulary_objection(target.record, setup, release_of("vllm", spec.version)):
            raise PairError(f"draft {draft.name!r}: {reason}")

    def build(drafts: tuple[Draft, ...]) -> ServingEngine:
        mixed = LOOKUP_LENGTH if any(draft.kind == "composite" for draft in drafts) else 1
        options = VllmOptions(
            python=spec.command,
            max_batch_size=max(MIN_ROWS, 1 << (spec.max_requests - 1).bit_length()),
            max_length=max(spec.max_length, mixed),
            max_alive=len(drafts) + 2,  # the plain engine and one that scores, beside the drafts' engines
            given=given,
            log_folder=spec.log_folder,
        )
        return VllmEngine(target.record, drafts, options)

    given = engine_arguments(spec.engine_args)
    num_positions(sources.find(target.record.name))  # refuses what vLLM does not read
    return EngineBuilder(check=check, build=build)


def _llamacpp(spec: EngineSpec, target: DescribedModel) -> EngineBuilder:
    from profiles.engines.llamacpp.engine import LlamaCppEngine, check_draft
    from profiles.engines.llamacpp.servers import Options, find_program, weights_of

    program = find_program(spec.command)
    weights_of(target.record)
    options = Options(
        threads=spec.threads or machine.num_threads() or 1,
        log_folder=spec.log_folder,
        device=fingerprint.pick_device(spec.device),
    )

    def check(draft: Draft) -> None:
        check_draft(draft)
        if draft.model is not None:
            weights_of(draft.model)

    return EngineBuilder(check=check, build=lambda drafts: LlamaCppEngine(target, drafts, program, options))


def _server(spec: EngineSpec, target: DescribedModel) -> EngineBuilder:
    from profiles.engines.llamacpp.ngram import match_size
    from profiles.engines.openai.engine import ServerEngine
    from profiles.engines.openai.launch import Launch, release_for, server_kind

    kind, release = server_kind(spec.kind), release_for(spec.kind, spec.version)
    source = sources.find(target.record.name)
    path = str(source.folder if source.gguf is None else source.gguf.path)
    if kind.reads_gguf:
        path = rules.gguf_path(target.record.name) or path

    def flags_of(setup: Setup) -> list[str]:
        if spec.draft_args is not None:
            return list(spec.draft_args)
        reason = release.objection or kind.objection(target.record, setup, release)
        if reason is not None:
            raise InputError(f"{setup.name}: {reason}")
        return [*kind.args_for(setup, release), *kind.record_args(release)]

    launch = Launch(
        kind=spec.kind, log_folder=spec.log_folder, template=spec.launch or "", model_path=path, flags_of=flags_of
    )

    def check(draft: Draft) -> None:
        """Accepts a draft that can be run at one of its lengths: short look-ups may be dropped."""
        if kind.drops_short and draft.kind == "ngram":
            match_size(draft)
        try:
            launch.command(Setup(draft=draft, length=spec.max_length))
        except InputError:
            launch.command(Setup(draft=draft, length=spec.min_length))

    def build(drafts: tuple[Draft, ...]) -> ServingEngine:
        return ServerEngine(target.record, drafts, launch, fingerprint.pick_device(spec.device))

    return EngineBuilder(check=check, build=build)


BUILDERS: dict[str, Callable[[EngineSpec, DescribedModel], EngineBuilder]] = {
    "vllm": _vllm,
    "llamacpp": _llamacpp,
    "server": _server,
}
