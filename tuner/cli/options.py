"""The options of the command line: their types and what `--help` says of each, once for all commands."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from profiles.records.errors import require
from tuner.deploy.match import Level

if TYPE_CHECKING:
    from profiles.engines.factory import EngineSpec

EngineName = Literal["torch", "vllm", "llamacpp", "server"]
ServerKind = Literal["vllm", "sglang", "llamacpp"]  # whose speculative flags a command line can tell
DTypeName = Literal["float32", "bfloat16", "float16"]
ObjectiveName = Literal["tpot", "throughput"]
FormatName = Literal["vllm", "sglang", "trtllm", "llamacpp", "transformers", "json"]


def _option(topic: str, help_text: str, *names: str, default: str | None = None) -> Any:
    """A typer option; `default` is what `--help` shows where the value itself would say nothing."""
    return typer.Option(*names, help=help_text, rich_help_panel=topic, show_default=default or True)


_model, _engine = partial(_option, "Models"), partial(_option, "Engine")
_load, _search = partial(_option, "Prompts and load"), partial(_option, "Search and limits")
_output = partial(_option, "Store and output")

# models
Target = Annotated[str, _model("Target model: a directory, a .gguf file, a hub id or builtin:target.")]
TunedTarget = Annotated[str | None, _model("Name or digest of a tuned target.", default="the target tuned last")]
Drafts = Annotated[
    list[str] | None,
    _model(
        "Draft: a directory, a .gguf file, a hub id, ngram:max=4,min=2, early-exit:LAYERS, ngram+PATH, eagle3:PATH or "
        "mtp. Repeatable.",
        default="the drafts that ship with builtin:target, and prompt look-up",
    ),
]
DType = Annotated[DTypeName | None, _model("Data type.", default="float32 on a CPU, bfloat16 on a GPU")]
Device = Annotated[str | None, _engine("Device: cpu, cuda or cuda:N.", default="a GPU where there is one")]

PlanTarget = Annotated[
    str, _model("Target: a config.json, a directory, a .gguf file, a published name or a hub id.", "--target")
]
PlanDrafts = Annotated[
    list[str],
    _model("Draft: as --target, ngram, early-exit:LAYERS or native:METHOD, and @DTYPE. Repeatable.", "--draft"),
]
WeightsType = Annotated[
    str | None, _model("Type of the weights: bfloat16, fp8, Q4_K_M ...", "--dtype", default="the files', bfloat16")
]

# the engine
Hardware = Annotated[str, _engine("Device and count, such as H100x4, or a JSON file that describes one.")]
PlanEngine = Annotated[str, _engine("Engine: vllm, sglang, llamacpp, exllamav2, transformers ...", "--engine")]
Engine = Annotated[
    EngineName | None, _engine("Engine that decodes.", default="vllm where it is installed beside a GPU, else torch")
]
EngineCommand = Annotated[
    str | None, _engine("The llama-server to start, or the Python that has vLLM.", default="what is installed")
]
Launch = Annotated[
    str | None,
    _engine("Command of an OpenAI-compatible server with {port} and {speculative} in it, for --engine server."),
]
VerifyLaunch = Annotated[
    str, _engine("Command of the server with {port} and {speculative} in it; {model} is the target's path.")
]
Kind = Annotated[ServerKind | None, _engine("Kind of server, for --engine server.", default="vllm")]
EngineVersion = Annotated[
    str | None,
    _engine("Version of the engine that --format or --kind names.", default="the installed, else newest known"),
]
EngineArgs = Annotated[
    list[str] | None,
    _engine("Engine argument of vLLM's as KEY=VALUE, such as tensor-parallel-size=4. Repeatable.", "--engine-arg"),
]
Threads = Annotated[int | None, _engine("Threads of --engine llamacpp.", default="one per core")]
MeasuredEngine = Annotated[
    Literal["torch", "vllm", "llamacpp", "sglang"] | None,
    _engine("Engine whose measurements answer.", default="that of --format, else the tuned one"),
]
Format = Annotated[
    FormatName | None, _output("What an engine takes, instead of sentences.", "--format", default="sentences")
]
Adaptive = Annotated[bool, _output("With --format vllm: a scheduler that chooses k as the server runs.", "--adaptive")]
ServerFormat = Annotated[ServerKind, _engine("Engine that is started.", "--format")]

# prompts and load
Prompts = Annotated[
    list[str] | None,
    _load(
        "A .jsonl, .json or .txt file, - for standard input, or builtin:NAME. Repeatable.",
        default="the prompts that ship",
    ),
]
NumPrompts = Annotated[
    int | None, _load("Prompts to use, drawn evenly over the domains with --seed.", default="all of them")
]
Domain = Annotated[str | None, _load("Domain of all prompts.", default="what their rows or files say")]
QueryDomain = Annotated[str | None, _load("Domain of the prompts.", default="all domains")]
BatchSizes = Annotated[list[int] | None, _load("Sequences decoded together. Repeatable.", default="1")]
QueryBatchSize = Annotated[int, _load("Sequences decoded together.")]
Contexts = Annotated[
    list[int] | None, _load("Most tokens of prompt and output. Repeatable.", default="what the prompts need")
]
QueryContext = Annotated[int | None, _load("Tokens of prompt and output.", default="not known")]
MaxNewTokens = Annotated[int, _load("Most output tokens per prompt.")]
Temperature = Annotated[float, _load("Temperature; 0 decodes greedily.")]
QueryTemperature = Annotated[float | None, _load("Temperature.", default="the one tuned last")]
TopP = Annotated[float, _load("Nucleus sampling; 1 is off.")]
TopK = Annotated[int, _load("Number of tokens to sample among; 0 is off.")]

AcceptanceFrom = Annotated[
    str, _load("store, published, a JSON file, or a rate per token such as 0.85.", "--acceptance")
]
PlanContext = Annotated[int, _load("Tokens cached per sequence.", "--context")]

# search and limits
Lengths = Annotated[str, _search("Speculation lengths: 1-8, 1,2,4 or 3.")]
Objective = Annotated[
    ObjectiveName, _search("What is compared: seconds of decoding (tpot) or of whole requests (throughput).")
]
MaxMemory = Annotated[float | None, _search("Most GiB of a setup's weights and caches.", default="no limit")]
MaxTtft = Annotated[
    float | None, _search("Most milliseconds to the first token, at the 95th percentile.", default="no limit")
]
MaxP95Tpot = Annotated[
    float | None, _search("Most milliseconds per output token, at the 95th percentile.", default="no limit")
]
Budget = Annotated[
    float | None,
    _search("Seconds, shared among the stages, after which no measurement is started.", default="no limit"),
]
SearchEngine = Annotated[EngineName, _engine("Engine that is started.", "--engine")]
SearchBudget = Annotated[float, _search("Seconds after which no configuration is started.", "--budget")]
SpaceFile = Annotated[
    Path | None,
    _search(
        "TOML file with the values of every option, such as threads = [1, 2]: draft (none is plain), k, batch_size, "
        "dtype, threads, vLLM's engine arguments, or what stands in braces in --launch.",
        "--space",
        default="none: forecasts alone are searched",
    ),
]
MaxAge = Annotated[
    str | None, _search("Oldest stored times that are used: 90s, 30m, 12h or 7d; traces never age.", default="any age")
]
Seed = Annotated[int, _search("Seed of sampling and of the order of runs.")]
DryRun = Annotated[bool, _search("Print what would be measured and how long it would take.", "--dry-run")]
Instead = Annotated[str | None, _search("Setup, as tables name it, that was not chosen.", default="the runner-up")]

# look-ups
Require = Annotated[Level | None, _search("Worst match that is accepted; a worse one exits with 7.", default="none")]
MachineFile = Annotated[Path | None, _engine("JSON that describes the machine to answer for.", default="this one")]
QueryDevice = Annotated[str | None, _engine("cpu: answer for the processor beside a GPU.", default="the GPU, if any")]

# store and output
Store = Annotated[
    str | None,  # a Path would make one slash of a URL's two
    _output(
        "Store: a folder, sqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE.",
        default="$DRAFTPICK_STORE, else a checkout's .draftpick, else the user's data folder",
    ),
]
PolicyFile = Annotated[Path | None, _output("Policy file to answer from, instead of a store.", default="the store's")]
JsonOnly = Annotated[bool, _output("Print one JSON document and nothing else on standard output.", "--json")]
ReportFile = Annotated[Path, _output("Page to write (.html).", "--out")]

ENGINE_OPTIONS = {  # the engines that an option is for
    "engine_command": ("vllm", "llamacpp"),
    "launch": ("server",),
    "kind": ("server",),
    "engine_version": ("server",),
    "threads": ("llamacpp",),
    "engine_arg": ("vllm",),
}


def engine_spec(engine: EngineName, device: str | None, **given: Any) -> "EngineSpec":
    """How the engine is started. Raises InputError: an option for another engine, no --launch, no threads."""
    for name, engines in ENGINE_OPTIONS.items():
        value = given.get(name)
        fits = value is None or engine in engines
        option = name.replace("_", "-")
        require(fits, f"{option} {value!r}: it is for --engine {' or '.join(engines)}, not {engine}")
    launch, threads = given.get("launch"), given.get("threads")
    is_complete = engine != "server" or bool(launch)
    require(is_complete, "engine server: --launch COMMAND is needed, with {port} and {speculative} in it")
    require(threads is None or threads >= 1, f"threads {threads}: whole numbers from 1 are allowed")
    from profiles.engines.factory import EngineSpec

    return EngineSpec(
        engine=engine,
        command=given.get("engine_command"),
        launch=launch,
        kind=given.get("kind") or "vllm",
        version=given.get("engine_version"),
        threads=threads,
        engine_args=tuple(given.get("engine_arg") or ()),
        device=device,
    )
