"""Where a round's time goes on the family: matrix products and attention, and everything else, which is the host.

    python -m tests.benchmarks.rounds

Per setup the wall time of a round comes from undisturbed runs without a profiler, the time of products and attention
from torch's profiler in runs of their own; the rest is dispatch, small operations, sampling, bookkeeping. `outside` is
what is spent outside the models' forwards. On a GPU the device's own busy time takes the place of the products.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from profiles.engines.bench import Bench
from profiles.engines.torch import batch_model
from profiles.records.core import PLAIN, Prompt, Setup, Workload
from profiles.records.evidence import Sample
from tests.benchmarks.common import arguments, finish, load_family

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = ("flash_attention", "efficient_attention", "scaled_dot_product_attention_math")
DRAFTS = ("ngram", "builtin:draft-general", "ngram+builtin:draft-general")
LENGTH, REPEATS = 4, 5


def run(bench: Bench, workload: Workload, prompts: Sequence[Prompt], setup: Setup) -> list[Sample]:
    """One run of every prompt."""
    return [bench.engine.run_together(workload, (prompt,), (setup,), "bench")[0] for prompt in prompts]


def wall_s(decode: Callable[[], list[Sample]]) -> float:
    """Seconds of a round, the least of a few runs."""
    times = []
    for _ in range(REPEATS):
        samples = decode()
        times.append(sum(one.decode_s for one in samples) / sum(sum(one.rounds.values()) for one in samples))
    return min(times)


def device_s(decode: Callable[[], list[Sample]], on_gpu: bool) -> float:
    """Seconds of a request that products and attention take, or on a GPU all kernels, prefills included."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        decode()
    if on_gpu:
        return sum(event.self_device_time_total for event in profiler.key_averages()) * 1e-6
    busy = [
        event.self_cpu_time_total
        for event in profiler.key_averages()
        if event.key in PRODUCTS or any(name in event.key for name in ATTENTION)
    ]
    return float(sum(busy)) * 1e-6


def forward_s(decode: Callable[[], list[Sample]]) -> tuple[float, float]:
    """(seconds inside the models' steps, seconds of the whole), both with the prefills."""
    spent, real = [0.0], batch_model.RowModel.step

    def timed(self: batch_model.RowModel, *args: torch.Tensor, **more: int) -> torch.Tensor:
        started = time.perf_counter()
        logits = real(self, *args, **more)
        spent[0] += time.perf_counter() - started
        return logits

    batch_model.RowModel.step = timed  # type: ignore[method-assign,assignment]
    try:
        samples = decode()
    finally:
        batch_model.RowModel.step = real  # type: ignore[method-assign]
    return spent[0], sum(one.ttft_s + one.decode_s for one in samples)


def main() -> None:
    """A row per setup, then JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device")
    options = parser.parse_args()
    question = {"lengths": (LENGTH,), "max_new_tokens": 64, "temperature": options.temperature}
    bench, [(workload, prompts)] = load_family(DRAFTS, device=options.device, **question)
    chosen, on_gpu = prompts[:: len(prompts) // 6][:6], bench.engine.environment.cuda is not None
    found = []
    print(f"{'setup':46} {'round ms':>9} {'host share':>11} {'outside forwards':>17}")
    for setup in (PLAIN, *(Setup(draft=draft, length=LENGTH) for draft in bench.engine.drafts)):

        def decode(setup: Setup = setup) -> list[Sample]:
            return run(bench, workload, chosen, setup)

        samples = decode()
        whole_s = min(sum(one.ttft_s + one.decode_s for one in decode()) for _ in range(REPEATS))
        inside_s, timed_s = forward_s(decode)
        row = {
            "setup": setup.name,
            "round_ms": round(wall_s(decode) * 1e3, 3),
            "host_share": round(1.0 - device_s(decode, on_gpu) / whole_s, 4),
            "outside_share": round(1.0 - inside_s / timed_s, 4),
            "rounds": sum(sum(one.rounds.values()) for one in samples),
        }
        found.append(row)
        print(f"{setup.name:46} {row['round_ms']:9} {row['host_share']:11.1%} {row['outside_share']:17.1%}", flush=True)
    finish({"benchmark": "rounds", "device": bench.engine.environment.device, "setups": found})


if __name__ == "__main__":
    main()
