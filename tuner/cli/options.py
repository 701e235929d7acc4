"""The options of the command line: their types and what `--help` says of each, once for all commands."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from profiles.records.errors import InputError
from tuner.deploy.match import Level

EngineName = Literal["torch", "vllm", "llamacpp", "server"]
ServerKind = Literal["vllm", "sglang", "llamacpp"]  # whose speculative flags a command line can tell
AnyServerKind = Literal["vllm", "sglang", "llamacpp", "trtllm", "openai"]
DTypeName = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal["tpot", "throughput"]
FormatName = Literal["vllm", "sglang", "trtllm", "llamacpp", "transformers", "json"]

MODELS, ENGINE, LOAD, SEARCH, OUTPUT = "Models", "Engine", "Prompts and load", "Search and limits", "Store and output"


def _option(panel: str, help_text: str, *names: str, default: str | None = None, **more: Any) -> Any:
    """A typer option under a topic; `default` is what `--help` shows where the value itself would say nothing."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, show_default=default or True, **more)


# models
Target = Annotated[str, _option(MODELS, "Target model: a directory, a .gguf file, a hub id or builtin:target.")]
TunedTarget = Annotated[
    str | None, _option(MODELS, "Name or digest of a tuned target.", "--target", default="the target tuned last")
]
ServedTarget = Annotated[
    str, _option(MODELS, "Served model, for its tokenizer: a directory or a .gguf file.", "--target")
]
Drafts = Annotated[
    list[str] | None,
    _option(
        MODELS,
        "Draft: a directory, a .gguf file, a hub id, ngram:max=4,min=2, early-exit:LAYERS, ngram+PATH, eagle3:PATH or "
        "mtp. Repeatable.",
        "--draft",
        default="the drafts that ship with builtin:target, and prompt look-up",
    ),
]
DType = Annotated[DTypeName | None, _option(MODELS, "Data type.", default="float32 on a CPU, bfloat16 on a GPU")]
Device = Annotated[str | None, _option(ENGINE, "Device: cpu, cuda or cuda:N.", default="a GPU where there is one")]

# the engine
Engine = Annotated[
    EngineName | None,
    _option(ENGINE, "Engine that decodes.", "--engine", default="vllm where it is installed beside a GPU, else torch"),
]
EngineCommand = Annotated[
    str | None,
    _option(ENGINE, "The llama-server to start, or the Python that has vLLM.", default="what is installed"),
]
Launch = Annotated[
    str | None,
    _option(ENGINE, "Command of an OpenAI-compatible server with {port} and {speculative} in it, for --engine server."),
]
VerifyLaunch = Annotated[
    str,
    _option(ENGINE, "Command of the server with {port} and {speculative} in it; {model} is the target's path."),
]
Kind = Annotated[ServerKind | None, _option(ENGINE, "Kind of server, for --engine server.", "--kind", default="vllm")]
AnyKind = Annotated[AnyServerKind, _option(ENGINE, "Kind of server.", "--kind")]
EngineVersion = Annotated[
    str | None,
    _option(ENGINE, "Version of the engine that --format or --kind names.", default="the installed, else newest known"),
]
Threads = Annotated[int | None, _option(ENGINE, "Threads of --engine llamacpp.", default="one per core")]
MeasuredEngine = Annotated[
    Literal["torch", "vllm", "llamacpp", "sglang"] | None,
    _option(ENGINE, "Engine whose measurements answer.", "--engine", default="that of --format, else the tuned one"),
]
Format = Annotated[
    FormatName | None, _option(OUTPUT, "What an engine takes, instead of sentences.", "--format", default="sentences")
]
ServerFormat = Annotated[ServerKind, _option(ENGINE, "Engine that is started.", "--format")]
Url = Annotated[str, _option(ENGINE, "Address of the server: http://HOST:PORT.")]

# prompts and load
Prompts = Annotated[
    list[str] | None,
    _option(
        LOAD, "A .jsonl, .json or .txt file, - for standard input, or builtin:NAME. Repeatable.",
        "--prompts", default="the prompts that ship",
    ),
]  # fmt: skip
NumPrompts = Annotated[
    int | None, _option(LOAD, "Prompts to use, drawn evenly over the domains with --seed.", default="all of them")
]
Domain = Annotated[str | None, _option(LOAD, "Domain of all prompts.", default="what their rows or files say")]
QueryDomain = Annotated[str | None, _option(LOAD, "Domain of the prompts.", "--domain", default="all domains")]
BatchSizes = Annotated[
    list[int] | None, _option(LOAD, "Sequences decoded together. Repeatable.", "--batch-size", default="1")
]
QueryBatchSize = Annotated[int, _option(LOAD, "Sequences decoded together.", "--batch-size")]
InFlight = Annotated[list[int] | None, _option(LOAD, "Requests in flight. Repeatable.", "--batch-size", default="1")]
Contexts = Annotated[
    list[int] | None,
    _option(LOAD, "Most tokens of prompt and output. Repeatable.", "--context", default="what the prompts need"),
]
QueryContext = Annotated[int | None, _option(LOAD, "Tokens of prompt and output.", "--context", default="not known")]
MaxNewTokens = Annotated[int, _option(LOAD, "Most output tokens per prompt.")]
Temperature = Annotated[float, _option(LOAD, "Temperature; 0 decodes greedily.")]
QueryTemperature = Annotated[float | None, _option(LOAD, "Temperature.", "--temperature", default="the one tuned last")]
TopP = Annotated[float, _option(LOAD, "Nucleus sampling; 1 is off.")]
TopK = Annotated[int, _option(LOAD, "Number of tokens to sample among; 0 is off.")]

# search and limits
Lengths = Annotated[str, _option(SEARCH, "Speculation lengths: 1-8, 1,2,4 or 3.")]
Objective = Annotated[
    ObjectiveName, _option(SEARCH, "What is compared: seconds of decoding (tpot) or of whole requests (throughput).")
]
MaxMemory = Annotated[float | None, _option(SEARCH, "Most GiB of a setup's weights and caches.", default="no limit")]
MaxTtft = Annotated[
    float | None, _option(SEARCH, "Most milliseconds to the first token, at the 95th percentile.", default="no limit")
]
MaxP95Tpot = Annotated[
    float | None,
    _option(
        SEARCH, "Most milliseconds per output token, at the 95th percentile.", "--max-p95-tpot", default="no limit"
    ),
]
Budget = Annotated[
    float | None,
    _option(SEARCH, "Seconds, shared among the stages, after which no measurement is started.", default="no limit"),
]
MaxAge = Annotated[
    str | None,
    _option(SEARCH, "Oldest stored times that are used: 90s, 30m, 12h or 7d; traces never age.", default="any age"),
]
Seed = Annotated[int, _option(SEARCH, "Seed of sampling and of the order of runs.")]
DryRun = Annotated[bool, _option(SEARCH, "Print what would be measured and how long it would take.", "--dry-run")]
Instead = Annotated[
    str | None, _option(SEARCH, "Setup, as tables name it, that was not chosen.", default="the runner-up")
]

# look-ups
Require = Annotated[
    Level | None, _option(SEARCH, "Worst match that is accepted; a worse one exits with 7.", default="none")
]
MachineFile = Annotated[
    Path | None, _option(ENGINE, "JSON that describes the machine to answer for.", "--environment", default="this one")
]
QueryDevice = Annotated[
    str | None, _option(ENGINE, "cpu: answer for the processor beside a GPU.", "--device", default="the GPU, if any")
]

# store and output
Store = Annotated[
    str | None,  # a Path would make one slash of a URL's two
    _option(
        OUTPUT,
        "Store: a folder, sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE.",
        "--store",
        default="$DRAFTPICK_STORE, else a checkout's .draftpick, else the user's data folder",
    ),
]
PolicyFile = Annotated[
    Path | None, _option(OUTPUT, "Policy file to answer from, instead of a store.", "--policy", default="the store's")
]
JsonOnly = Annotated[bool, _option(OUTPUT, "Print one JSON document and nothing else on standard output.", "--json")]
ReportFile = Annotated[Path, _option(OUTPUT, "Page (.html) or picture (.png, .svg) to write.", "--out")]

ENGINE_OPTIONS: dict[str, tuple[str, ...]] = {  # by engine: the options that are for it only
    "torch": (),
    "vllm": ("engine_command",),
    "llamacpp": ("engine_command", "threads"),
    "server": ("launch", "kind", "engine_version"),
}


def check_engine_options(engine: EngineName, **options: str | int | None) -> None:
    """Raises InputError: an option for another engine, a server without its command, no threads."""
    for name, value in options.items():
        engines = [other for other, names in ENGINE_OPTIONS.items() if name in names]
        if value is not None and engine not in engines:
            option = name.replace("_", "-")
            raise InputError(f"{option} {value!r}: it is for --engine {' or '.join(engines)}, not {engine}")
    if engine == "server" and not options["launch"]:
        raise InputError("engine server: --launch COMMAND is needed, with {port} and {speculative} in it")
    threads = options["threads"]
    if threads is not None and int(threads) < 1:
        raise InputError(f"threads {threads}: whole numbers from 1 are allowed")
