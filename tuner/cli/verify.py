"""The verb that proves an emitted command again: it starts exactly that, beside a plain server, and loads both.

Joins the look-up, the exporter and the server engine; how any of them works it must not know.
"""

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from profiles import builtin
from profiles.hardware import machine
from profiles.records.errors import InputError, NotMeasuredError
from store import location
from store.evidence_store import EvidenceStore
from tuner.cli import messages, options
from tuner.cli.output import print_json, say, say_aside
from tuner.deploy import lookup
from tuner.policy.query import MIXED

if TYPE_CHECKING:
    from tuner.deploy.verify import Verified
    from tuner.export import Deployment, Export

EXIT_NOT_CONFIRMED = 5
Launch = Annotated[
    str,
    typer.Option(
        help="The server's command, with {port} and {speculative} in it; {model} is the target's folder or file."
    ),
]
ServedForm = Annotated[str, typer.Option("--format", help="The engine that is started: vllm, sglang or llamacpp.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyFlags:
    """The options of `tune.py verify`."""

    launch: Launch
    form: ServedForm = "vllm"
    target: options.TunedTarget = None
    batch_size: options.AskedBatch = 1
    context: options.AskedContext = None
    domain: options.AskedDomain = None
    prompts: options.Prompts = None
    max_new_tokens: options.MaxNewTokens = 64
    engine_version: options.EngineVersion = None
    store: options.Store = None
    json_only: options.JsonOnly = False

    def __post_init__(self) -> None:
        """Raises InputError: a format that starts no server."""
        if self.form not in options.SERVER_KINDS:
            raise InputError(f"format {self.form!r}: allowed are {', '.join(options.SERVER_KINDS)}")


@options.of_record(VerifyFlags)
def verify(asked: VerifyFlags) -> int:
    """Start the command that `lookup --format` prints, beside a plain one, and prove the choice again under load."""
    from tuner import export

    question = lookup.Question(
        target=asked.target, batch_size=asked.batch_size, context_length=asked.context, domain=asked.domain
    )
    with EvidenceStore.open_read_only(location.existing_store(asked.store)) as evidence_store:
        found = lookup.lookup(evidence_store, question, machine.this_machine(messages.engine_asked(asked.form)))
    deployment = found.deployment()
    made = export.emit(deployment, asked.form, asked.engine_version)
    if made.setup is None or not made.text:
        raise NotMeasuredError(f"there is nothing to start: {made.note}")
    say_aside(f"emitted for {asked.form}: {made.text.strip()}", *([made.note] if made.note else []))
    rows = _measure(deployment, made, asked)
    others = [row.batch_size for row in deployment.batches if row.batch_size not in made.claims]
    if not asked.json_only:
        say(*(_line(row) for row in rows))
        say(*(f"{size} in flight: not covered, the emitted command is for other numbers" for size in others))
    confirmed = all(row.verdict == "confirmed" for row in rows)
    told = {"emitted": made.text.strip(), "confirmed": confirmed, "not_covered": others}
    print_json({**told, "concurrencies": [asdict(row) for row in rows]})
    return 0 if confirmed else EXIT_NOT_CONFIRMED


def _measure(deployment: "Deployment", made: "Export", asked: VerifyFlags) -> "Sequence[Verified]":
    """The emitted words against none, at the concurrencies that they are for, on the choice's domain's prompts."""
    from profiles.engines import bench as bench_module
    from profiles.engines import factory, workloads
    from tuner.deploy import verify as verifying

    choice, setup = deployment.choice, made.setup
    assert setup is not None  # plain decoding is never emitted
    assert setup.draft is not None
    spec = factory.EngineSpec(
        engine="server",
        kind=asked.form,
        launch=asked.launch,
        draft_args=tuple(shlex.split(made.text)),
        max_requests=max(made.claims),
    )
    target = deployment.target
    models = factory.ModelSpec(target=target.name, dtype=target.dtype, described=(setup.draft,))
    question = bench_module.Question(
        lengths=(setup.length,),
        contexts=(choice.context_length,),
        max_new_tokens=asked.max_new_tokens,
        temperature=choice.temperature,
        top_p=choice.top_p,
        top_k=choice.top_k,
        engine=spec.engine,
    )
    with closing(factory.open_bench(spec, models)) as bench:
        sources = asked.prompts or [builtin.ALL_PROMPTS]
        ((workload, prompts),), warnings = workloads.workloads(bench, question, sources)
        say_aside(*warnings)
        own = [prompt for prompt in prompts if choice.domain in (MIXED, prompt.domain)]
        return verifying.verify(bench.engine, setup, made.claims, own, workload)


def _line(row: "Verified") -> str:
    """A concurrency in one line."""
    speedup, end_to_end = row.measured.speedup, row.measured.end_to_end
    return (
        f"{row.concurrency} in flight: {row.verdict}; {row.claimed.name} there, the emitted command is "
        f"{speedup.estimate:.2f} [{speedup.low:.2f}, {speedup.high:.2f}] times plain decoding, "
        f"{end_to_end.estimate:.2f} end to end, {row.measured.num_prompts} prompts"
    )
