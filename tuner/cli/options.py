"""The command line's options: their types and the sentence that `--help` says of each, once for all verbs.

What a verb does with them it must not know.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from profiles import builtin
from profiles.records.errors import InputError

Record = TypeVar("Record")
ENGINE_OPTIONS = {  # by engine: the options that are only for it
    "torch": (),
    "vllm": ("engine_command",),
    "llamacpp": ("engine_command", "threads"),
    "server": ("launch", "kind", "engine_version"),
}
SERVER_KINDS = ("vllm", "sglang", "llamacpp")  # whose flags can be told by a command line

Target = Annotated[str, typer.Option(help="A directory, a .gguf file, a hub id or builtin:target.")]
Drafts = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        help="A directory, a .gguf file, a hub id, ngram[:max=4,min=2], early-exit:LAYERS or ngram+PATH; repeatable.",
    ),
]
Lengths = Annotated[str, typer.Option(help="Speculation lengths: 1-8, 1,2,4 or 3.")]
BatchSizes = Annotated[
    list[int] | None, typer.Option("--batch-size", help="Rows decoded at a time, 1 to 64; repeatable.")
]
Contexts = Annotated[
    list[int] | None,
    typer.Option("--context", help="Most tokens of prompt and output; default: what the prompts need. Repeatable."),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompts", help="A .jsonl, .json or .txt file, - for stdin, or builtin:NAME; may be repeated."),
]
Domain = Annotated[str | None, typer.Option(help="Label of all prompts; default: what their rows or files say.")]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample among the k most likely tokens; 0 is off.")]
EngineName = Annotated[str, typer.Option("--engine", help="What decodes: torch, vllm, llamacpp or server.")]
EngineCommand = Annotated[
    str | None,
    typer.Option(help="The llama-server to start, or the Python that has vLLM; default: what is found."),
]
Launch = Annotated[
    str | None,
    typer.Option(
        help="The command of an OpenAI-compatible server, with {port} and {speculative} in it, for --engine server."
    ),
]
Kind = Annotated[str | None, typer.Option(help="What the server is: vllm, sglang or llamacpp; default: vllm.")]
Threads = Annotated[int | None, typer.Option(help="Threads of --engine llamacpp; default: one per core.")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")]
MaxNewTokens = Annotated[int, typer.Option(help="Output tokens per prompt at most.")]
Store = Annotated[
    str | None,  # a Path would make one slash of a URL's two
    typer.Option(
        "--store",
        help="Folder of the store, or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE; "
        "default: $DRAFTPICK_STORE, else the user's data folder.",
    ),
]
Objective = Annotated[str, typer.Option(help="tpot or throughput; at one batch size they agree.")]
Budget = Annotated[float | None, typer.Option(help="Seconds after which no new measurement is started.")]
MaxMemory = Annotated[float | None, typer.Option(help="GiB that weights and caches of a setup may take.")]
MaxTtft = Annotated[float | None, typer.Option(help="Milliseconds to the first token, at the 95th percentile.")]
MaxP95Tpot = Annotated[
    float | None, typer.Option("--max-p95-tpot", help="Milliseconds per output token, at the 95th percentile.")
]
MaxAge = Annotated[
    str | None, typer.Option(help="Timings older than this are taken again: 90s, 30m, 12h or 7d; traces never age.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be measured and how long that takes.")]
Seed = Annotated[int, typer.Option(help="Of sampling and of the order of runs.")]
JsonOnly = Annotated[bool, typer.Option("--json", help="Print nothing but one JSON document on stdout.")]
TunedTarget = Annotated[str | None, typer.Option("--target", help="Name or digest of a tuned target; default: last.")]

AskedBatch = Annotated[int, typer.Option("--batch-size", help="Sequences decoded together.")]
AskedContext = Annotated[int | None, typer.Option("--context", help="Tokens of prompt and output; default: not known.")]
AskedDomain = Annotated[str | None, typer.Option("--domain", help="Domain of the prompts; default: all mixed.")]
Form = Annotated[
    str | None,
    typer.Option("--format", help="What an engine takes: vllm, sglang, trtllm, llamacpp, transformers; or json."),
]
EngineVersion = Annotated[
    str | None, typer.Option(help="Of the engine --format is for; default: the installed one, else the newest known.")
]
Require = Annotated[
    str | None,
    typer.Option(help="Fail with code 7 unless the match is at least exact, version, engine, family or capability."),
]
MachineFile = Annotated[
    Path | None,
    typer.Option("--environment", help="JSON that describes the machine to answer for; default: this one."),
]
AskedDevice = Annotated[str | None, typer.Option("--device", help="cpu answers for the processor beside a GPU.")]
AskedTemperature = Annotated[float | None, typer.Option("--temperature", help="Default: the one that was tuned last.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """The options of `tune.py run`."""

    target: Target = builtin.TARGET
    draft: Drafts = None
    engine: EngineName = "torch"
    engine_command: EngineCommand = None
    launch: Launch = None
    kind: Kind = None
    engine_version: EngineVersion = None
    threads: Threads = None
    lengths: Lengths = "1-8"
    batch_size: BatchSizes = None
    context: Contexts = None
    prompts: Prompts = None
    domain: Domain = None
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    dtype: DType = None
    device: Device = None
    max_new_tokens: MaxNewTokens = 64
    store: Store = None
    objective: Objective = "tpot"
    max_memory: MaxMemory = None
    max_ttft: MaxTtft = None
    max_p95_tpot: MaxP95Tpot = None
    budget: Budget = None
    max_age: MaxAge = None
    dry_run: DryRun = False
    seed: Seed = 0
    json_only: JsonOnly = False

    def __post_init__(self) -> None:
        """Raises InputError: an unknown engine, what is for another one, a server without its command, no threads."""
        if self.engine not in ENGINE_OPTIONS:
            raise InputError(f"engine {self.engine!r}: allowed are {', '.join(ENGINE_OPTIONS)}")
        named = dict.fromkeys(name for names in ENGINE_OPTIONS.values() for name in names)
        foreign = [
            name for name in named if name not in ENGINE_OPTIONS[self.engine] and getattr(self, name) is not None
        ]
        for name in foreign:
            engines = " or ".join(engine for engine, names in ENGINE_OPTIONS.items() if name in names)
            option = name.replace("_", "-")
            raise InputError(f"{option} {getattr(self, name)!r}: it is for --engine {engines}, not {self.engine}")
        if self.engine == "server" and not self.launch:
            raise InputError("engine server: --launch COMMAND is needed, with {port} and {speculative} in it")
        if self.kind is not None and self.kind not in SERVER_KINDS:
            raise InputError(f"kind of server {self.kind!r}: allowed are {', '.join(SERVER_KINDS)}")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads {self.threads}: whole numbers from 1 are allowed")


def of_record(record: type[Record]) -> Callable[[Callable[[Record], int]], Callable[..., int]]:
    """Lets a verb take its many options as one record: typer sees the record's fields as the parameters."""

    def decorate(verb: Callable[[Record], int]) -> Callable[..., int]:
        @functools.wraps(verb)
        def called(**options: Any) -> int:
            return verb(record(**options))

        del called.__wrapped__  # inspect would look through to the verb
        signature = inspect.signature(record)
        called.__signature__ = signature  # type: ignore[attr-defined]
        called.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
        return called

    return decorate
