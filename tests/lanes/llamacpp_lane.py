"""Asks the installed llama.cpp about argument lines: `common_params_parse`, the parser `llama-server` itself calls.

xllamacpp is llama.cpp as a Python module; it exports the parser's symbol, and its `CommonParams` holds the C++ record
inside the Python object. Each line is parsed in a process of its own, because the parser may end it; what the record
then holds is read back, so a wrong place in memory cannot pass. Question on stdin, answers as the last line of stdout.
"""

import ctypes
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

PARSER = "_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"
OBJECT_HEAD = 16  # bytes before the record: a reference count and a type
SERVER_EXAMPLE = 12  # `llama-server` in llama.cpp's list of programs
PROMPT = [5, 9, 7, 8] * 6


def parse(words: list[str]) -> tuple[Any, bool]:
    """The record that llama.cpp reads from `words`, and whether it took them; for some it ends the process instead."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    function = library[PARSER]
    function.restype = ctypes.c_bool
    function.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    record = xllamacpp.CommonParams()
    given = ["llama-server", *words]
    array = (ctypes.c_char_p * (len(given) + 1))(*[word.encode() for word in given], None)
    return record, bool(function(len(given), array, id(record) + OBJECT_HEAD, SERVER_EXAMPLE, None))


def read(record: Any) -> dict[str, Any]:
    """What is left in the record."""
    speculative = record.speculative
    draft, simple = speculative.draft, speculative.ngram_simple
    return {
        "target": record.model.path,
        "n_max": draft.n_max,
        "n_min": draft.n_min,
        "p_min": draft.p_min,
        "draft": draft.mparams.path,
        "type": [int(one) for one in speculative.types],
        "size_n": simple.size_n,
        "size_m": simple.size_m,
    }


def serve(record: Any) -> dict[str, int]:
    """Starts the server from the record, generates 40 tokens greedily, and counts what it drafted."""
    import xllamacpp

    server = xllamacpp.Server(record)
    body = {"prompt": PROMPT, "n_predict": 40, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    headers = {"Content-Type": "application/json"}
    address = server.listening_address
    request = urllib.request.Request(f"{address}/completion", data=json.dumps(body).encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counted = dict(line.split(" ", 1) for line in lines if line.startswith("llamacpp:spec_decode_num_"))
    return {
        name: int(float(counted[f"llamacpp:spec_decode_num_{name}_total"]))
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    }


def one(question: dict[str, Any]) -> None:
    own = ["-m", question["target"]]
    if question["serve"]:
        own += ["-c", "256", "-np", "1", "-t", "1", "--metrics", "--port", "0", "--host", "127.0.0.1"]
    record, taken = parse([*own, *question["words"]])
    answer: dict[str, Any] = {"accepted": taken, "said": "common_params_parse"}
    if taken:
        answer["read"] = read(record)
        if answer["read"]["target"] != question["target"]:
            answer = {"accepted": False, "said": "the record was not where it was looked for"}
        elif question["serve"]:
            answer["read"] |= serve(record)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()  # the server's threads may end the process without it


def judge(question: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The answer of a process of its own, or the last it said before it ended."""
    command = [sys.executable, "-P", __file__]
    asked = json.dumps({"target": question["target"], "serve": question["serve"], "words": words})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120, check=False)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {"accepted": False}
    if not answer["accepted"]:
        answer["said"] = errors[0] if errors else answer.get("said", f"ended with {done.returncode}")
    return dict(answer)


if __name__ == "__main__":
    one(json.load(sys.stdin))
