"""`bench-server`: how fast a running server answers, and what it accepts of its drafts. Nothing is stored."""

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from profiles import builtin
from profiles.engines.serving.redaction import redacted
from profiles.records.core import Draft, Interval, Setup
from profiles.records.errors import InputError
from profiles.records.evidence import RoundCount, Sample
from tuner.cli import options
from tuner.cli.output import print_json, print_lines

if TYPE_CHECKING:
    from profiles.engines.bench import Bench

AS_STARTED = Setup(draft=Draft(kind="native", method="as-started"), length=1)
BATCHES_PER_QUEUE = 4  # above one request in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFigures:
    """What a server did at one number of requests in flight; times in milliseconds, at the 50th and 95th percentile.

    `tok_per_s` is of one request. Acceptance is None where the server does not report it, or does not draft.
    """

    batch_size: int
    num_requests: int
    tok_per_s: Interval
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    acceptance_rate: float | None
    acceptance_length: float | None


def bench_server(
    url: options.Url,
    target: options.ServedTarget,
    kind: options.AnyKind = "vllm",
    batch_size: options.InFlight = None,
    prompts: options.Prompts = None,
    domain: options.Domain = None,
    max_new_tokens: options.MaxNewTokens = 64,
    json_only: options.JsonOnly = False,
) -> None:
    """Benchmark a running server: time to first token, time per token, and the acceptance of its drafts."""
    from profiles.engines import bench as bench_module
    from profiles.engines import workloads
    from tuner.forecast.queues import queues

    with closing(_connect(url, target, kind)) as bench:
        question = bench_module.Question(
            lengths=(1,),
            batch_sizes=tuple(dict.fromkeys(batch_size or [1])),
            max_new_tokens=max_new_tokens,
            engine="server",
        )
        loads, warnings = workloads.workloads(bench, question, prompts or [builtin.ALL_PROMPTS], domain)
        rows = []
        for workload, tokenized in loads:
            samples: list[Sample] = []
            for queue in queues(
                tokenized,
                workload.batch_size,
                max_alone=len(tokenized),
                num_queues=1,
                batches_per_queue=BATCHES_PER_QUEUE,
            ):
                samples += bench.engine.run_together(workload, queue, (AS_STARTED,), "load")
            rows.append(_figures(workload.batch_size, samples))
            if not json_only:
                print_lines(_line(rows[-1]))
    print_json({"url": redacted(url), "warnings": warnings, "loads": [asdict(row) for row in rows]})


def _connect(url: str, target: str, kind: str) -> "Bench":
    from profiles.engines.bench import Bench
    from profiles.engines.openai.engine import ServerEngine
    from profiles.engines.openai.launch import Launch
    from profiles.models import loader

    described = loader.describe(target, dtype=None)
    launch = Launch(kind=kind, log_folder=Path(), url=url, running=AS_STARTED)
    assert AS_STARTED.draft is not None
    engine = ServerEngine(described.record, (AS_STARTED.draft,), launch, described.encode, "cpu")
    return Bench(engine=engine, loaded=(described,), close=engine.close)


def _figures(batch_size: int, samples: Sequence[Sample]) -> ServerFigures:
    from profiles.acceptance.rates import acceptance_length, acceptance_rate, tpot_s
    from profiles.stats import rate_interval

    timed = [sample for sample in samples if sample.output_tokens > 1]
    if len(timed) < 2:
        raise InputError(f"{len(timed)} answers have a second token: at least 2 are needed to time them")
    rounds: Counter[RoundCount] = Counter()
    for sample in timed:
        rounds.update(sample.rounds)
    return ServerFigures(
        batch_size=batch_size,
        num_requests=len(samples),
        tok_per_s=rate_interval([sample.decode_s for sample in timed], [sample.output_tokens - 1 for sample in timed]),
        ttft_ms=_percentiles([sample.ttft_s for sample in samples]),
        tpot_ms=_percentiles([tpot_s(sample) or math.nan for sample in timed]),
        acceptance_rate=acceptance_rate(rounds),
        acceptance_length=acceptance_length(rounds) if acceptance_rate(rounds) is not None else None,
    )


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    import numpy

    median, slow = (float(value) * 1e3 for value in numpy.percentile(seconds, (50, 95)))
    return median, slow


def _line(row: ServerFigures) -> str:
    (ttft_ms, slow_ttft_ms), (tpot_ms, slow_tpot_ms) = row.ttft_ms, row.tpot_ms
    acceptance = "acceptance is not reported"
    if row.acceptance_rate is not None and row.acceptance_length is not None:
        acceptance = f"acceptance rate {row.acceptance_rate:.2f}, {row.acceptance_length:.2f} tokens per round"
    return (
        f"{row.batch_size} in flight, {row.num_requests} requests: {row.tok_per_s:.1f} tokens/s each; "
        f"first token {ttft_ms:.0f} ms (95th percentile {slow_ttft_ms:.0f}), "
        f"then {tpot_ms:.1f} ms per token (95th percentile {slow_tpot_ms:.1f}); {acceptance}"
    )
