"""Runs llama.cpp's server from the package xllamacpp with the arguments of `llama-server` that draftpick gives.

Run as a script. The arguments are set on the package's own `CommonParams` (2026.10); a flag that is not listed in
`--help` needs llama.cpp's `llama-server` program.
"""

import argparse
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

REFUSED = 2
NUMBERS = {  # flags with a number, and what they set
    "--port": "port",
    "-c": "n_ctx",
    "-np": "n_parallel",
    "-ngl": "n_gpu_layers",
    "-ngld": "speculative.draft.n_gpu_layers",
    "-t": "cpuparams.n_threads",
    "-tb": "cpuparams_batch.n_threads",
    "-td": "speculative.draft.cpuparams.n_threads",
    "-tbd": "speculative.draft.cpuparams_batch.n_threads",
}
CACHE_TYPES = {
    "-ctk": "cache_type_k",
    "-ctv": "cache_type_v",
    "-ctkd": "speculative.draft.cache_type_k",
    "-ctvd": "speculative.draft.cache_type_v",
}
ATTENTION = {"auto": "AUTO", "off": "DISABLED", "on": "ENABLED"}
METHODS = ("draft", "ngram_simple", "ngram_mod", "ngram_map_k", "ngram_map_k4v")  # records of `speculative`
SPEC_TYPE = "COMMON_SPECULATIVE_TYPE_"


def parser_of(params: Any) -> argparse.ArgumentParser:
    """The arguments; a method's are the numbers of its record: `--spec-ngram-mod-n-max`."""
    import xllamacpp

    parser = argparse.ArgumentParser(prog="xllamacpp_server", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in ("--version", "--list-devices", "--metrics"):
        parser.add_argument(flag, action="store_true", default=False)
    parser.add_argument("-m", dest="model.path")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("-fa", choices=ATTENTION, default="auto")
    parser.add_argument("-dev", "-devd", choices=("none",), default=None, help="no GPU")
    for flag, attribute in NUMBERS.items():
        parser.add_argument(flag, type=int, dest=attribute)
        if attribute.endswith("n_threads"):
            parser.set_defaults(**{attribute: os.cpu_count()})
    for flag, attribute in CACHE_TYPES.items():
        parser.add_argument(flag, type=functools.partial(_member, xllamacpp.ggml_type, "GGML_TYPE_"), dest=attribute)
    types = [name.removeprefix(SPEC_TYPE) for name in dir(xllamacpp.common_speculative_type) if SPEC_TYPE in name]
    parser.add_argument("--spec-type", choices=[name.lower().replace("_", "-") for name in types], default=None)
    parser.add_argument("--spec-draft-model", dest="speculative.draft.mparams.path")
    parser.add_argument("--spec-synth-rates", default="", help="acceptance rates by position, with commas")
    for method in METHODS:
        record = getattr(params.speculative, method)
        for name in dir(record):
            if type(getattr(record, name)) in (int, float) and name != "n_gpu_layers":
                flag = f"--spec-{method}-{name}".replace("_", "-")
                parser.add_argument(flag, type=type(getattr(record, name)), dest=f"speculative.{method}.{name}")
    return parser


def _member(enumeration: Any, prefix: str, text: str) -> Any:
    return getattr(enumeration, f"{prefix}{text.replace('-', '_').upper()}")


def parse(arguments: Sequence[str]) -> tuple[Any, argparse.Namespace]:
    """The parameters that `arguments` set and the arguments as parsed; ends the process where one is not known."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    options, unknown = parser_of(params).parse_known_args(arguments)
    if unknown:
        _end(REFUSED, f"error: invalid argument: {unknown[0]}: the package xllamacpp takes fewer than llama-server")
    for path, value in vars(options).items():
        parents, dot, name = path.rpartition(".")
        record = functools.reduce(getattr, parents.split("."), params) if dot else params
        if dot or path in (*NUMBERS.values(), *CACHE_TYPES.values()):
            setattr(record, name, value)
    params.hostnames, params.endpoint_metrics = [options.host], options.metrics
    params.flash_attn_type = _member(xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_", ATTENTION[options.fa])
    if options.dev is not None:
        params.n_gpu_layers = params.speculative.draft.n_gpu_layers = 0
    if options.spec_type is not None:
        params.speculative.types = [_member(xllamacpp.common_speculative_type, SPEC_TYPE, options.spec_type)]
    params.speculative.synth_rates = [float(rate) for rate in options.spec_synth_rates.split(",") if rate]
    return params, options


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
