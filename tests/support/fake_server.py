"""An OpenAI-compatible server without a model, run as a child by tests: `python tests/support/fake_server.py --port N`.

A token follows from the one before it alone; with `--speculative K` rounds of K drafted tokens accept a number that
follows from their place, and are recorded as vLLM records them. `--fault NAME` makes it fail in one way. Standard
library only.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VOCABULARY = 97
VERSION = "1.2.3"


def following(token: int) -> int:
    """The token that comes after `token`."""
    return (token * 7 + 11) % VOCABULARY


def accepted_at(place: int, length: int) -> int:
    """How many of `length` drafted tokens a round that starts at output token `place` accepts."""
    return place * 5 % (length + 1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    options: argparse.Namespace

    def do_GET(self) -> None:
        fault = self.options.fault
        if self.path == "/health":
            if fault == "health-hangs":
                time.sleep(1000)
            self.say({}, 500 if fault == "health-500" else 200)
        elif self.path == "/v1/models":
            self.say({"data": [{"id": "fake"}]})
        elif self.path == "/version":
            self.say({"version": VERSION})
        else:
            self.say({"error": {"message": f"nothing at {self.path}"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.options.fault
        if fault == "answers-400":
            self.say({"error": {"message": "this model's maximum context length is 8 tokens", "code": 400}}, 400)
        elif fault == "answers-html":
            self.send(b"<html>Welcome to nginx</html>", "text/html")
        elif fault == "dies-under-load":
            sys.stderr.write("RuntimeError: the engine loop died\n")
            sys.stderr.flush()
            os._exit(7)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number, event in enumerate(answer(body, self.options)):
                if number == 3 and self.misbehaves(fault):
                    return
                self.event(json.dumps(event))
            self.event("[DONE]")
            self.wfile.write(b"0\r\n\r\n")

    def misbehaves(self, fault: str) -> bool:
        """What goes wrong in the middle of a stream; True ends it there."""
        if fault == "stalls":
            time.sleep(1000)
        if fault == "garbage":
            self.event("{not json")
        if fault == "error-event":
            self.event(json.dumps({"error": {"message": "EngineCore encountered an issue"}}))
        if fault == "ends-early":
            self.wfile.write(b"0\r\n\r\n")
        if fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return fault in ("garbage", "error-event", "ends-early", "cut")

    def event(self, data: str) -> None:
        raw = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        self.wfile.flush()

    def say(self, value: Any, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), "application/json", status)

    def send(self, raw: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- its name in the base class
        """Says nothing."""


def answer(body: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The events of a completion, a round each."""
    ends = set(body.get("stop_token_ids") or ())
    last, emitted, drafted, accepted = body["prompt"][-1], 0, [], []
    most, length = min(body["max_tokens"], options.most), options.speculative
    finished = False
    time.sleep(options.step_s)
    while not finished:
        kept = 0
        if emitted and length:
            kept = accepted_at(emitted, length)
            drafted.append(length)
            accepted.append(kept)
        tokens = []
        while len(tokens) <= kept and not finished:
            last = following(last)
            tokens.append(last)
            finished = emitted + len(tokens) == most or last in ends
        emitted += len(tokens)
        yield {"choices": [choice(body, options, tokens, finished)]}
        time.sleep(options.step_s)
    last_event: dict[str, Any] = {"choices": [], "usage": {"completion_tokens": emitted}}
    if length and options.records:
        record = {"per_step_drafted": drafted, "per_step_accepted": accepted}
        last_event["metrics"] = {"speculative_decoding": record}
    yield last_event


def choice(body: dict[str, Any], options: argparse.Namespace, tokens: list[int], finished: bool) -> dict[str, Any]:
    reason = "length" if finished else None
    found: dict[str, Any] = {"index": 0, "token_ids": tokens, "finish_reason": reason}
    if body.get("logprobs"):
        own = -2.5 if options.skewed and options.speculative else -0.5
        tops = [{f"token_id:{token}": own, f"token_id:{following(token)}": own - 0.75} for token in tokens]
        found["logprobs"] = {"token_logprobs": [own] * len(tokens), "top_logprobs": tops}
    return found


def before_ready(fault: str) -> None:
    """What goes wrong before the server is up, and what it leaves behind."""
    if fault == "exits":
        sys.exit("INFO starting\nValueError: the draft has another vocabulary\nsee error above")
    if fault == "out-of-memory":
        sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9.00 GiB.\nRuntimeError: start failed")
    if fault == "silent":
        sys.exit(5)
    if fault == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "never-ready":
        sys.stderr.write("WARNING loading weights takes long\n")
        time.sleep(1000)
    if fault == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if fault in ("grandchild", "grandchild-and-exits"):
        idle = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(1000)"]
        child = subprocess.Popen(idle, start_new_session=True)
        sys.stderr.write(f"grandchild {child.pid}\n")
        if fault == "grandchild-and-exits":
            sys.exit("RuntimeError: worker failed")
    if fault == "huge-log":
        for _ in range(200):
            sys.stderr.write("x" * 50_000 + "\n")
        sys.exit("RuntimeError: after much talk")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fault", default="")
    parser.add_argument("--speculative", type=int, default=0)
    parser.add_argument("--most", type=int, default=1000, help="tokens after which every answer ends")
    as_vllm = {"dest": "speculative", "type": lambda text: json.loads(text)["num_speculative_tokens"]}
    parser.add_argument("--speculative-config", **as_vllm, help="as vLLM takes it; a schedule's longest draft")
    parser.add_argument("--per-request-spec-decode-metrics")
    parser.add_argument("--enable-per-request-metrics", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.001)
    parser.add_argument("--skewed", action="store_true", help="other log-probabilities with a draft than without")
    parser.add_argument("--api-key")
    parser.add_argument("--no-records", dest="records", action="store_false")
    parser.add_argument("--ignored", nargs=3)
    Handler.options = parser.parse_args()
    if Handler.options.api_key:
        sys.stderr.write(f"non-default args: {sys.argv[1:]} {vars(Handler.options)}\n")  # as vLLM does
    before_ready(Handler.options.fault)
    ThreadingHTTPServer.request_queue_size = 64
    server = ThreadingHTTPServer((Handler.options.host, Handler.options.port), Handler)
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
