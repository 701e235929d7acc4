"""Stands in for `profiles/engines/vllm/worker.py`: the same lines, no vLLM. $FAKE_VLLM names what goes wrong.

A fault is `kind:command`. Tokens follow from the prompt; a draft has every other token accepted.
"""

import json
import os
import sys
import time

LACKS = {  # what a start with the method behind the colon ends with
    "lacks": {"error": "ValueError: Unsupported speculative method"},
    "crowds": {"error": "ValueError: No available memory for the cache blocks", "memory": True},
}


def main() -> None:
    fault, _, at = os.environ.get("FAKE_VLLM", "").partition(":")
    version = None if fault == "none" else os.environ.get("FAKE_VLLM_VERSION", "0.32.0+cpu")
    say({"vllm": version, "torch": "2.13.0+cpu"})
    length = lookup = 0
    for line in sys.stdin:
        question = json.loads(line)
        command = question.pop("command")
        if at == command:
            go_wrong(fault)
        if command == "about":
            say(json.loads(os.environ.get("FAKE_VLLM_DEVICE", '{"kind": "cpu"}')))
        elif command == "start":
            speculative = question["speculative"] or {}
            if fault in LACKS and speculative.get("method") == at:
                say(LACKS[fault])
                continue
            length = speculative.get("num_speculative_tokens", 0)
            facts = {"kv_tokens": 4096 - 1024 * bool(speculative), "concurrency": 8.0, "runner": 1}
            say({"in_place": fault != "fixed", "threads": int(os.environ.get("NUMBA_NUM_THREADS", "3")), **facts})
        elif command == "use":
            length = length if fault == "ignored" else question.get("length") or length
            lookup = (question.get("lookup") or [0])[-1]
            say({})
        elif command == "run":
            say(
                {"runs": [run(prompt, lookup or length, question["sampling"], fault) for prompt in question["prompts"]]}
            )
        elif command == "trace":
            say({"runs": [trace(prompt, length, question["sampling"], fault) for prompt in question["prompts"]]})
        elif command == "rounds":
            lengths = [visit["length"] or length for visit in question["visits"]]
            say({"seconds": [[0.01 + 0.001 * each] * 3 for each in lengths]})


def run(prompt: list[int], length: int, sampling: dict[str, int], fault: str) -> dict[str, object]:
    size = sampling["max_tokens"]
    tokens = [(sum(prompt) + place) % 50 for place in range(size)]
    if fault == "parts" and length:
        tokens[3] += 1
    logprob = float("nan") if fault == "nan" else -0.5
    return {
        "token_ids": tokens,
        "started_s": 1.0,
        "first_s": 1.5,
        "last_s": 3.5,
        "rounds": [[length, min(length, 1)]] * (size // 2 if length else size - 1),
        "widths": [length + 1] * (size // 2 if length else size - 1),
        "refills": 2,
        "threads": 1 if fault == "halved" and not length else 2,
        "ended": False,
        "logprobs": [(logprob, logprob, -2.0)] * size,
        "prompt_logprobs": [(-1.0, 1 + place % 2, -1.0) for place in range(1, len(prompt))],
    }


def trace(prompt: list[int], length: int, sampling: dict[str, int], fault: str) -> dict[str, object]:
    """Plain decoding; of every proposal the first token is right, or none with the fault `block`."""
    record = run(prompt, 0, sampling, fault)
    tokens: list[int] = record["token_ids"]  # type: ignore[assignment]
    right = [] if fault == "block" else [0]
    proposals = [
        (start, [token + (place not in right) for place, token in enumerate(tokens[start : start + length])])
        for start in range(1, len(tokens))
    ]
    if fault == "hidden":
        proposals = [(start, [-1] * len(proposal)) for start, proposal in proposals]
    return record | {"proposals": proposals}


def go_wrong(fault: str) -> None:
    if fault == "error":
        say({"error": "ValueError: the draft has another vocabulary\nthan the target"})
    elif fault == "full":
        say({"error": "ValueError: Free memory on device cuda:0 (9/79 GiB) on startup is less than desired GPU memory"})
    elif fault == "memory":
        say({"error": "OutOfMemoryError: no more", "memory": True})
    elif fault == "death":
        sys.stderr.write("RuntimeError: the engine core died\n")
        sys.exit(3)
    elif fault == "garbage":
        sys.stdout.write("Loading weights: 100%\n")
        sys.stdout.flush()
    elif fault == "hang":
        sys.stderr.write("ERROR waiting for a lock\n")
        time.sleep(600)


def say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
