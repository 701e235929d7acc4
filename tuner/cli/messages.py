"""What commands say of a finished run, the exit codes that are no errors, and the extras that commands need."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.run import FinishedRun

EXIT_NOT_PROVEN, EXIT_NOTHING_FEASIBLE, EXIT_INTERRUPTED = 5, 6, 130
EXTRA_MODULES = {  # by extra: the modules that come with it alone
    "report": ("jinja2",),
    "postgres": ("psycopg",),
    "vllm": ("vllm",),
    "llamacpp": ("xllamacpp",),
    "tune": (
        "accelerate", "alembic", "gguf", "httpx2", "huggingface_hub", "numpy", "optuna", "psutil", "pynvml",
        "safetensors", "scipy", "sklearn", "tokenizers", "torch", "transformers",
    ),
}  # fmt: skip


def missing_extra(command: str, error: ModuleNotFoundError) -> str | None:
    """One line that says which extra `command` needs; None where the module comes with none."""
    module = (error.name or "").split(".")[0]
    extra = next((extra for extra, modules in EXTRA_MODULES.items() if module in modules), None)
    return extra and f"`{command}` needs the extra: pip install 'draftpick[{extra}]'"


def prompt_notes(domains: Mapping[str, int]) -> Iterator[str]:
    """What cannot be proven with so many prompts by domain, and how many would do."""
    from tuner.pipeline.points import num_proof_prompts
    from tuner.policy.policy import MIN_DOMAIN_PROMPTS
    from tuner.search.proof import LOOKS, MIN_PROOF_PROMPTS

    total = sum(domains.values())
    needed, better = (
        next(count for count in itertools.count(total) if num_proof_prompts(count) >= least)
        for least in (MIN_PROOF_PROMPTS, LOOKS[0])
    )
    if needed > total:
        yield f"{total} prompts: nothing can be proven, {needed} are needed, better {better}"
    elif better > total:
        yield f"{total} prompts: only a large gain can be proven; {better} are better, {LOOKS[0]} of them for the proof"
    small = [f"{domain} ({count})" for domain, count in domains.items() if count < MIN_DOMAIN_PROMPTS]
    if small and len(domains) > 1:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        yield f"no choice of their own: {', '.join(small[:5])}{more}; a domain needs {MIN_DOMAIN_PROMPTS} prompts"


def run_summary(finished: "FinishedRun") -> Iterator[str]:
    """What was left out and why, what the run cost, and how quiet the machine was."""
    outcome, cost = finished.outcome, finished.cost
    names_by_cause: dict[tuple[str, str], list[str]] = {}
    for refused in finished.left_out:
        names_by_cause.setdefault((refused.reason, refused.detail), []).append(refused.name)
    for (reason, detail), (name, *others) in names_by_cause.items():
        more = f" and {len(others)} more" if others else ""
        yield f"infeasible: {name}{more} ({reason}): {detail}"
    decided = zip(outcome.points, outcome.choices, strict=True)
    yield from (f"{point.domain}: {point.stopped}" for point, choice in decided if point.stopped and not choice.proven)
    text = f"measured {cost['measured_seconds']:.0f} s, reused {cost['reused_units']} stored units"
    if outcome.grid_seconds_estimate is not None:
        num_setups = len(outcome.points[0].forecasts)
        text += f"; running all {num_setups} setups would take about {outcome.grid_seconds_estimate:.0f} s"
    yield text
    if starts := cost.get("engine_starts"):
        each_s, grid_starts = cost["starting_seconds"] / starts, cost["grid_starts"]
        yield f"engine started {starts} times, {each_s:.1f} s each; running all setups would take {grid_starts} starts"
    for draft, cache in cost.get("kv_cache", {}).items():
        if cache["kv_tokens"] is not None:
            facts = [f"{cache['kv_tokens']} tokens"]
            if cache["concurrency"] is not None:
                facts.append(f"{cache['concurrency']:.1f} requests of the longest context")
            yield f"KV cache, {draft}: {', '.join(facts)}; preempted {cache['preemptions'] or 0} times"
    measured = [choice.measured for choice in outcome.choices if choice.measured is not None]
    divergences = sum(proof.num_divergences for proof in measured)
    disturbed = sum(proof.num_disturbed for proof in measured)
    yield f"outputs that diverged at near-ties: {divergences}; pairs of runs disturbed by other programs: {disturbed}"
    yield f"policy: {finished.policy_path}"


def router_line(router: Mapping[str, Any]) -> str:
    """How a run's router came out, from its document (`tuner.router.router.train_and_save`)."""
    if router["path"] is None:
        return f"no router: {router['why_none']}"
    right = router["accuracy"]
    sure = "" if router["sure_accuracy"] is None else f", {router['sure_accuracy']:.1%} right of the others"
    return (
        f"router: {router['path']}; of {router['num_texts']} texts held out {right['estimate']:.1%} right "
        f"({right['low']:.1%} to {right['high']:.1%}), unsure of {router['unsure']:.1%}{sure}, "
        f"calibration error {router['calibration_error']['estimate']:.3f}"
    )
