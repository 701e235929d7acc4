"""`verify`: prove an emitted command under load, with a server that is started with it and a plain one."""

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from profiles import builtin
from profiles.hardware import machine
from profiles.records.errors import NotMeasuredError
from tuner.cli import options
from tuner.cli.messages import EXIT_NOT_PROVEN
from tuner.cli.output import print_json, print_lines, print_notes
from tuner.deploy import lookup
from tuner.policy.query import MIXED

if TYPE_CHECKING:
    from tuner.deploy.verify import Verified
    from tuner.export import Deployment, Export


def verify(
    launch: options.VerifyLaunch,
    output_format: options.ServerFormat = "vllm",
    target: options.TunedTarget = None,
    batch_size: options.QueryBatchSize = 1,
    context: options.QueryContext = None,
    domain: options.QueryDomain = None,
    prompts: options.Prompts = None,
    max_new_tokens: options.MaxNewTokens = 64,
    engine_version: options.EngineVersion = None,
    store: options.Store = None,
    json_only: options.JsonOnly = False,
) -> int:
    """Verify the command that `lookup --format` prints: start it beside a plain one and prove the choice under load."""
    from store import location
    from store.evidence_store import EvidenceStore
    from tuner import export

    query = lookup.Query(target=target, batch_size=batch_size, context_length=context, domain=domain)
    with EvidenceStore.open_read_only(location.existing_store(store)) as evidence_store:
        result = lookup.lookup(evidence_store, query, machine.this_machine(output_format))
    deployment = result.deployment()
    emitted = export.emit(deployment, output_format, engine_version)
    command = emitted.text.strip()
    if emitted.setup is None or not command:
        raise NotMeasuredError(f"there is nothing to start: {emitted.note}")
    print_notes(f"emitted for {output_format}: {command}", *([emitted.note] if emitted.note else []))
    rows = _measure(
        deployment, emitted, launch=launch, kind=output_format, sources=prompts, max_new_tokens=max_new_tokens
    )
    not_covered = [row.batch_size for row in deployment.batches if row.batch_size not in emitted.claims]
    if not json_only:
        print_lines(*(_line(row) for row in rows))
        print_lines(*(f"{size} in flight: not covered by the emitted command" for size in not_covered))
    confirmed = all(row.verdict == "confirmed" for row in rows)
    document = {"emitted": command, "confirmed": confirmed, "not_covered": not_covered}
    print_json({**document, "concurrencies": [asdict(row) for row in rows]})
    return 0 if confirmed else EXIT_NOT_PROVEN


def _measure(
    deployment: "Deployment",
    emitted: "Export",
    *,
    launch: str,
    kind: str,
    sources: list[str] | None,
    max_new_tokens: int,
) -> "Sequence[Verified]":
    """The emitted command against a plain one, at the concurrencies it is for, on prompts of the choice's domain."""
    from profiles.engines import bench as bench_module
    from profiles.engines import factory, workloads
    from tuner.deploy.verify import verify as verify_claims

    choice, setup = deployment.choice, emitted.setup
    assert setup is not None  # plain decoding is never emitted
    assert setup.draft is not None
    spec = factory.EngineSpec(
        engine="server",
        kind=kind,
        launch=launch,
        draft_args=tuple(shlex.split(emitted.text)),
        max_requests=max(emitted.claims),
    )
    models = factory.ModelSpec(target=deployment.target.name, dtype=deployment.target.dtype, described=(setup.draft,))
    question = bench_module.Question(
        lengths=(setup.length,),
        contexts=(choice.context_length,),
        max_new_tokens=max_new_tokens,
        temperature=choice.temperature,
        top_p=choice.top_p,
        top_k=choice.top_k,
        engine=spec.engine,
    )
    with closing(factory.open_bench(spec, models)) as bench:
        ((workload, prompts),), warnings = workloads.workloads(bench, question, sources or [builtin.ALL_PROMPTS])
        print_notes(*warnings)
        of_domain = [prompt for prompt in prompts if choice.domain in (MIXED, prompt.domain)]
        return verify_claims(bench.engine, setup, emitted.claims, of_domain, workload)


def _line(row: "Verified") -> str:
    measured = row.measured
    return (
        f"{row.concurrency} in flight: {row.verdict}; the choice is {row.claimed.name}, the emitted command is "
        f"{measured.speedup:.2f} times as fast as plain decoding, {measured.end_to_end.estimate:.2f} end to end, "
        f"{measured.num_prompts} prompts"
    )
