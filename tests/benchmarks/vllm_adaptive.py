"""A vLLM server that chooses k as it runs against servers of one k: `python -m tests.benchmarks.vllm_adaptive`.

On vLLM's CPU build (`python -m tests.lanes.vllm_env`), float32, greedy, with a draft model: traffic whose domain and
number of requests in flight change, phase by phase in all servers in turn, several passes. The fixed k and plain
decoding are servers of their own, with vLLM's own scheduler and no schedule; the best fixed k is the one with the most
tokens per second over all phases, known afterwards. Beside them a look-up alone, and mixed into the draft model.
Requests name no domain; every pass sends the same prompts. `python_us`: Python time of choosing and reporting a step.
`--policy FILE` is read, or measured on other prompts and written, which ends the call: choices are the best forecasts.
"""

import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from profiles.engines.vllm.config import VllmOptions
from profiles.engines.vllm.engine import VllmEngine
from profiles.engines.vllm.flags import LOOKUP_KEY
from profiles.models import loader
from profiles.prompts import read, tokenize
from profiles.records.core import LOOKUP_LENGTH, PLAIN, Draft, Workload
from tests.benchmarks.common import arguments, finish
from tests.lanes.places import RUNNING
from tests.support.vllm_client import QUIET, VllmClient, speculative
from tuner.export.vllm import SCHEDULER
from tuner.forecast.evidence import gather
from tuner.forecast.forecaster import Forecaster
from tuner.pipeline.build_prior import build_prior
from tuner.pipeline.decision import alternatives
from tuner.pipeline.points import PointDecision, PointPlan
from tuner.policy.policy import Choice, Policy, write
from tuner.policy.query import MIXED
from tuner.search.objective import candidates

PHASES = (("code", 1), ("prose", 1), ("copy", 1), ("copy", 4), ("prose", 4), ("code", 4))
CONTEXT = 256
ADAPTIVE, BASE = "adaptive", "plain"


def measured_policy(longest: int, count: int, max_new_tokens: int) -> Policy:
    """Forecasts from traces and round times on vLLM, of `count` prompts of each domain; nothing is proven."""
    target = loader.load("builtin:target", dtype="float32", device="cpu")
    draft = Draft(kind="model", model=loader.describe("builtin:draft-general", dtype="float32").record)
    lengths, domains = tuple(range(1, longest + 1)), sorted({domain for domain, _ in PHASES})
    prompts = {
        domain: tokenize(read(f"builtin:{domain}"), target.tokenizer, CONTEXT - max_new_tokens)[0][-count:]
        for domain in domains
    }
    pools = {MIXED: [prompt for pool in prompts.values() for prompt in pool], **prompts}
    points = []
    options = VllmOptions(python=str(RUNNING.python), max_length=longest, context_length=CONTEXT)
    with VllmEngine(target.record, (draft,), options) as engine:
        for batch_size in sorted({batch_size for _, batch_size in PHASES}):
            load = Workload(batch_size=batch_size, context_length=CONTEXT, max_new_tokens=max_new_tokens)
            evidence = gather(engine, load, pools[MIXED], lengths)
            forecaster = Forecaster(evidence, load, target.record.run_digest, 0)
            points += [
                PointDecision(
                    plan=PointPlan(workload=load, domain=domain, forecast_prompts=tuple(pool)),
                    evidence=evidence,
                    forecaster=forecaster,
                    forecasts=tuple(forecaster.forecast(setup, pool) for setup in candidates((draft,), lengths)),
                )
                for domain, pool in pools.items()
            ]
        environment = engine.environment
    return Policy(
        created=datetime.now(UTC).isoformat(),
        target=target.record,
        environment=environment,
        choices=tuple(_choice(point) for point in points),
        prior=build_prior(points, lengths),
    )


def _choice(point: PointDecision) -> Choice:
    """The best forecast by its low end; plain decoding where none beats it."""
    best = next(iter(alternatives(point.forecasts)), None)
    return Choice(
        batch_size=point.workload.batch_size,
        context_length=point.workload.context_length,
        domain=point.domain,
        temperature=point.workload.temperature,
        setup=PLAIN if best is None else best.setup,
        reason="The best forecast; nothing was run to prove it.",
        forecast=best,
    )


def queues(count: int, max_new_tokens: int) -> dict[str, list[list[int]]]:
    """Token ids of prompts by domain."""
    target = loader.load("builtin:target", dtype="float32", device="cpu")
    by_domain = {}
    for domain, _ in PHASES:
        prompts, _ = tokenize(read(f"builtin:{domain}"), target.tokenizer, CONTEXT - max_new_tokens)
        by_domain[domain] = [list(prompt.token_ids) for prompt in prompts[:count]]
    return by_domain


def main() -> None:
    """A row per server and phase, then JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--policy", type=Path, required=True, help="file to read, or to measure and write")
    parser.add_argument("--prompts", type=int, default=8, help="in each phase")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--fixed", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args()
    os.environ.update(QUIET)
    if not options.policy.exists():
        write(options.policy, measured_policy(max(options.fixed), options.prompts, options.max_new_tokens))
        return
    prompts = queues(options.prompts, options.max_new_tokens)
    folder = Path(tempfile.mkdtemp())
    steps = folder / "steps.jsonl"
    variables = {"DRAFTPICK_POLICY": str(options.policy.resolve()), "DRAFTPICK_STEPS": str(steps)}
    config = speculative(max(options.fixed), scheduled=True)
    arms = {ADAPTIVE: {"scheduler_cls": SCHEDULER, "speculative_config": config}, BASE: {}}
    arms |= {f"k={k}": {"speculative_config": speculative(k, scheduled=False)} for k in options.fixed}
    lookup = {
        "method": "ngram",
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
        "num_speculative_tokens": LOOKUP_LENGTH,
    }
    arms["look-up"] = {"speculative_config": lookup}
    arms["mixed k=3"] = {
        "scheduler_cls": "profiles.engines.vllm.lookup_scheduler.LookupScheduler",
        "additional_config": {LOOKUP_KEY: [4, 2, 3]},
        "speculative_config": speculative(LOOKUP_LENGTH, scheduled=True),
    }
    seconds: dict[str, list[float]] = {name: [0.0] * len(PHASES) for name in arms}
    texts: dict[tuple[str, int], list[list[int]]] = {}
    num_differ = 0
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(VllmClient(folder, engine, variables=variables)) for name, engine in arms.items()
        }
        for server in servers.values():  # starts it
            server.decode(prompts["code"][:4], 4, 8)
        for number in range(options.passes):
            for index, phase in enumerate(PHASES):
                for name in (list(servers), list(reversed(servers)))[number % 2]:
                    answer = servers[name].decode(prompts[phase[0]], phase[1], options.max_new_tokens)
                    seconds[name][index] += answer["seconds"]
                    num_differ += texts.setdefault(phase, answer["tokens"]) != answer["tokens"]
    tokens = options.passes * options.prompts * options.max_new_tokens
    rates = {name: [round(tokens / value, 1) for value in row] for name, row in seconds.items()}
    overall = {name: len(PHASES) * tokens / sum(row) for name, row in seconds.items()}
    best = max((name for name in arms if name.startswith("k=")), key=lambda name: overall[name])
    for name, row in rates.items():
        print(f"{name:>10}", *(f"{value:8.1f}" for value in row), f"{overall[name]:8.1f}")
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    python_us = sorted(line["python_us"] for line in lines if line["rows"])
    finish(
        {
            "benchmark": "vllm_adaptive",
            "phases": [f"{domain} {batch_size}" for domain, batch_size in PHASES],
            "tok_per_s": rates,
            "best_fixed": best,
            "over_best_fixed": round(overall[ADAPTIVE] / overall[best], 3),
            "over_best_fixed_by_phase": [round(a / b, 3) for a, b in zip(rates[ADAPTIVE], rates[best], strict=True)],
            "over_best_of_phase": [
                round(rate / max(rates[name][index] for name in rates if name.startswith("k=")), 3)
                for index, rate in enumerate(rates[ADAPTIVE])
            ],
            "over_plain": round(overall[ADAPTIVE] / overall[BASE], 3),
            "queues_that_differ": num_differ,
            "python_us": {
                "median": round(statistics.median(python_us), 1),
                "p99": round(python_us[int(0.99 * len(python_us))], 1),
            },
        }
    )


if __name__ == "__main__":
    main()
