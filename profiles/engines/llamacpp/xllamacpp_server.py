"""Runs llama.cpp's server from the package xllamacpp with the arguments of `llama-server` that draftpick gives.

Run as a script. The arguments are set on the package's own `CommonParams`; a flag that is not listed in `--help` needs
llama.cpp's `llama-server` program.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

REFUSED = 2


def parser_of(params: Any) -> argparse.ArgumentParser:
    """The arguments; those of drafting methods are the numbers in the package's records (`--spec-ngram-mod-n-max`)."""
    parser = argparse.ArgumentParser(prog="xllamacpp_server", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--list-devices", action="store_true")
    parser.add_argument("-m", "--model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("-fa", choices=("auto", "off", "on"), default="auto")
    parser.add_argument("-dev", "-devd", choices=("none",), help="no GPU")
    for flag in ("-c", "-np", "-b", "-ub", "-ngl", "-ngld"):
        parser.add_argument(flag, type=int)
    for flag in ("-t", "-tb", "-td", "-tbd"):
        parser.add_argument(flag, type=int, default=os.cpu_count())
    for flag in ("-ctk", "-ctv", "-ctkd", "-ctvd"):
        parser.add_argument(flag, default="f16")
    parser.add_argument("--spec-type", choices=_spec_types())
    parser.add_argument("--spec-draft-model", default="")
    parser.add_argument("--spec-synth-rates", default="", help="acceptance rates by position, with commas")
    for record in ("draft", "ngram_simple", "ngram_mod", "ngram_map_k", "ngram_map_k4v"):
        for name, value in _numbers(getattr(params.speculative, record)):
            flag = f"--spec-{record}-{name}".replace("_", "-")
            parser.add_argument(flag, type=type(value), dest=f"{record}.{name}")
    return parser


def parse(arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The parameters that `arguments` set and the arguments as parsed; ends the process where one is not known."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    options, unknown = parser_of(params).parse_known_args(arguments)
    if unknown:
        _end(REFUSED, f"error: invalid argument: {unknown[0]}: the package xllamacpp takes fewer than llama-server")
    params.hostnames, params.port = [options.host], options.port
    params.endpoint_metrics = options.metrics
    params.model.path = options.model or ""
    attention = {"auto": "AUTO", "off": "DISABLED", "on": "ENABLED"}[options.fa]
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{attention}")
    speculative = params.speculative
    draft = speculative.draft
    for record, name, value in (
        (params, "n_ctx", options.c),
        (params, "n_parallel", options.np),
        (params, "n_batch", options.b),
        (params, "n_ubatch", options.ub),
        (params, "n_gpu_layers", 0 if options.dev else options.ngl),
        (params.cpuparams, "n_threads", options.t),
        (params.cpuparams_batch, "n_threads", options.tb),
        (draft, "n_gpu_layers", 0 if options.dev else options.ngld),
        (draft.cpuparams, "n_threads", options.td),
        (draft.cpuparams_batch, "n_threads", options.tbd),
    ):
        if value is not None:
            setattr(record, name, value)
    for record, name, value in (
        (params, "cache_type_k", options.ctk),
        (params, "cache_type_v", options.ctv),
        (draft, "cache_type_k", options.ctkd),
        (draft, "cache_type_v", options.ctvd),
    ):
        setattr(record, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{value.upper()}"))
    draft.mparams.path = options.spec_draft_model
    if options.spec_type:
        kind = options.spec_type.replace("-", "_").upper()
        speculative.types = [getattr(xllamacpp.common_speculative_type, f"{_SPEC_TYPE}{kind}")]
    speculative.synth_rates = [float(rate) for rate in options.spec_synth_rates.split(",") if rate]
    for name, value in vars(options).items():
        record, dot, attribute = name.partition(".")
        if dot and value is not None:
            setattr(getattr(speculative, record), attribute, value)
    return params, options


_SPEC_TYPE = "COMMON_SPECULATIVE_TYPE_"


def _spec_types() -> list[str]:
    import xllamacpp

    names = (name for name in dir(xllamacpp.common_speculative_type) if name.startswith(_SPEC_TYPE))
    return sorted(name.removeprefix(_SPEC_TYPE).lower().replace("_", "-") for name in names)


def _numbers(record: Any) -> list[tuple[str, int | float]]:
    values = ((name, getattr(record, name)) for name in dir(record) if not name.startswith("_"))
    return [(name, value) for name, value in values if type(value) in (int, float) and name != "n_gpu_layers"]


def main(arguments: Sequence[str]) -> None:
    """Serves until SIGINT or SIGTERM."""
    import xllamacpp

    params, options = parse(arguments)
    if options.version:
        _end(0, f"version: xllamacpp {xllamacpp.__version__}")
    if options.list_devices:
        names = [str(device["name"]) for device in xllamacpp.get_device_info() if device["name"] != "CPU"]
        _end(0, "\n".join(["Available devices:", *(f"  {name}: GPU" for name in names)]))
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the server's threads inherit the mask
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # the package raises its own types for C++ exceptions
        _end(1, f"error: {' '.join(str(error).split())}")
    sys.stderr.write(f"listening on {server.listening_address}\n")
    sys.stderr.flush()
    signal.sigwait(signals)
    _end(0, "stopped")


def _end(code: int, text: str) -> None:
    """Ends without taking the server down, which may take seconds and writes nothing."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
