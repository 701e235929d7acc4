"""`llama-server` over the package xllamacpp: this module, run with `python -m`, serves until stopped.

The arguments go to llama.cpp's own parser, `common_params_parse`, which the package exports; `CommonParams` holds the
C++ record inside the Python object. So a line means here what it means to the binary, and one it refuses ends this too.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

PARSER = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
OBJECT_HEAD = 16  # bytes before the record: a reference count and a type
PROGRAM = 12  # the place of `llama-server` in llama.cpp's list of programs
REFUSED = 2


def parse(words: list[str]) -> tuple[Any, bool]:
    """The record that llama.cpp reads from `words`, and whether it took them; for some it ends the process instead."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    function = library[PARSER]
    function.restype = ctypes.c_bool
    function.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    record = xllamacpp.CommonParams()
    given = ["llama-server", *words]
    array = (ctypes.c_char_p * (len(given) + 1))(*[word.encode() for word in given], None)
    return record, bool(function(len(given), array, id(record) + OBJECT_HEAD, PROGRAM, None))


def main(words: list[str]) -> None:
    """Serves until SIGINT or SIGTERM."""
    import xllamacpp

    record, taken = parse(words)
    if not taken:
        _end(REFUSED, "error: llama.cpp refused the arguments")
    if "-m" in words and record.model.path != words[words.index("-m") + 1]:
        _end(REFUSED, "error: this build of xllamacpp keeps its arguments elsewhere; use a llama-server binary")
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the server's threads, which inherit it
    try:
        server = xllamacpp.Server(record)
    except Exception as error:  # whatever the binding makes of what llama.cpp throws
        _end(1, f"error: {' '.join(str(error).split())}")
    sys.stderr.write(f"listening on {server.listening_address}\n")
    sys.stderr.flush()
    signal.sigwait(signals)
    _end(0, "stopped")  # nothing is written that could be lost, and taking the server down may take seconds


def _end(code: int, words: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{words}\n")
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
