"""The verb that loads a server which somebody else started, and says how fast it answers and what it accepts.

Nothing is kept: such a server is one setup, with which nothing can be compared.
"""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from profiles import builtin
from profiles.engines.serving.redaction import redacted
from profiles.records.core import Draft, Interval, Setup
from profiles.records.errors import InputError
from profiles.records.evidence import RoundCount, Sample
from tuner.cli import options
from tuner.cli.output import print_json, say

if TYPE_CHECKING:
    from profiles.engines.bench import Bench

AS_STARTED = Setup(draft=Draft(kind="native", method="as-started"), length=1)
BATCHES_PER_QUEUE = 4  # above one request in flight: one queue, of so many batches
Url = Annotated[str, typer.Option(help="The server: http://HOST:PORT.")]
Served = Annotated[str, typer.Option("--target", help="What it serves, for its tokenizer: a directory or .gguf file.")]
ServedKind = Annotated[str, typer.Option("--kind", help="What it is: vllm, sglang, llamacpp, trtllm or openai.")]
InFlight = Annotated[list[int] | None, typer.Option("--batch-size", help="Requests in flight; repeatable.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """The options of `tune.py load`."""

    url: Url
    target: Served
    kind: ServedKind = "vllm"
    batch_size: InFlight = None
    prompts: options.Prompts = None
    domain: options.Domain = None
    max_new_tokens: options.MaxNewTokens = 64
    json_only: options.JsonOnly = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a server did at one number of requests in flight; times in milliseconds, at the 50th and 95th percentile.

    `tok_per_s` is of one request. Acceptance is None where the server tells none, or does not draft.
    """

    batch_size: int
    num_requests: int
    tok_per_s: Interval
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    acceptance_rate: float | None
    acceptance_length: float | None


@options.of_record(LoadFlags)
def load(asked: LoadFlags) -> int:
    """Load a server that runs already: time to first token, time per token, and what it accepts of its drafts."""
    from profiles.engines import bench as bench_module
    from profiles.engines import workloads
    from tuner.forecast.queues import queues

    with closing(_bench(asked)) as bench:
        question = bench_module.Question(
            lengths=(1,),
            batch_sizes=tuple(dict.fromkeys(asked.batch_size or [1])),
            max_new_tokens=asked.max_new_tokens,
            engine="server",
        )
        loads, warnings = workloads.workloads(bench, question, asked.prompts or [builtin.ALL_PROMPTS], asked.domain)
        found = []
        for workload, prompts in loads:
            samples: list[Sample] = []
            for queue in queues(
                prompts,
                workload.batch_size,
                max_alone=len(prompts),
                num_queues=1,
                batches_per_queue=BATCHES_PER_QUEUE,
            ):
                samples += bench.engine.run_together(workload, queue, (AS_STARTED,), "load")
            found.append(_figures(workload.batch_size, samples))
            if not asked.json_only:
                say(_line(found[-1]))
    print_json({"url": redacted(asked.url), "warnings": warnings, "loads": [asdict(one) for one in found]})
    return 0


def _bench(asked: LoadFlags) -> "Bench":
    from profiles.engines.bench import Bench
    from profiles.engines.openai.engine import ServerEngine
    from profiles.engines.openai.launch import Launch
    from profiles.models import loader

    described = loader.describe(asked.target, dtype=None)
    launch = Launch(kind=asked.kind, log_folder=Path(), url=asked.url, running=AS_STARTED)
    assert AS_STARTED.draft is not None
    engine = ServerEngine(described.record, (AS_STARTED.draft,), launch, described.encode, "cpu")
    return Bench(engine=engine, loaded=(described,), close=engine.close)


def _figures(batch_size: int, samples: Sequence[Sample]) -> Figures:
    from profiles.acceptance.rates import acceptance_length, acceptance_rate, tpot_s
    from profiles.stats import rate_interval

    timed = [sample for sample in samples if sample.output_tokens > 1]
    if len(timed) < 2:
        raise InputError(f"{len(timed)} answers have a second token: at least 2 are needed to time them")
    rounds: Counter[RoundCount] = Counter()
    for sample in timed:
        rounds.update(sample.rounds)
    return Figures(
        batch_size=batch_size,
        num_requests=len(samples),
        tok_per_s=rate_interval([one.decode_s for one in timed], [one.output_tokens - 1 for one in timed]),
        ttft_ms=_percentiles([sample.ttft_s for sample in samples]),
        tpot_ms=_percentiles([tpot_s(sample) or math.nan for sample in timed]),
        acceptance_rate=acceptance_rate(rounds),
        acceptance_length=acceptance_length(rounds) if acceptance_rate(rounds) is not None else None,
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    import numpy

    median, slow = (float(value) * 1e3 for value in numpy.percentile(seconds, (50, 95)))
    return median, slow


def _line(one: Figures) -> str:
    rate = one.tok_per_s
    told = "acceptance is not told"
    if one.acceptance_rate is not None and one.acceptance_length is not None:
        told = f"{one.acceptance_rate:.2f} of the drafted tokens accepted, {one.acceptance_length:.2f} tokens a round"
    return (
        f"{one.batch_size} in flight, {one.num_requests} requests: {rate.estimate:.1f} [{rate.low:.1f}, "
        f"{rate.high:.1f}] tokens/s each; first token {one.ttft_ms[0]:.0f} ms (95 %: {one.ttft_ms[1]:.0f}), then "
        f"{one.tpot_ms[0]:.1f} ms a token (95 %: {one.tpot_ms[1]:.1f}); {told}"
    )
