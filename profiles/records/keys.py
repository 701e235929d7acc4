"""The digests under which evidence is stored and found."""

from collections.abc import Sequence

from profiles.records.core import Environment, Model, Prompt, Setup, Workload, digest_of

Key = tuple[str, ...]


def sampling_digest(workload: Workload, origin: str = "") -> str:
    """Identity of the output distribution and of whose arithmetic it is (`EngineCapabilities.origin`)."""
    return digest_of([workload.sampling_digest, origin]) if origin else workload.sampling_digest


def trace_point(workload: Workload, prompt: Prompt, origin: str = "") -> Key:
    """The key of a trace, beside the models."""
    return sampling_digest(workload, origin), prompt.digest


def queue_digest(prompt_digests: Sequence[str]) -> str:
    """Identity of the prompts of a unit in their order; a single one's is its own."""
    return prompt_digests[0] if len(prompt_digests) == 1 else digest_of(list(prompt_digests))


def run_point(workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str) -> Key:
    """The key of a unit of timed runs, beside target and machine; the order of prompts and setups matters."""
    queue = queue_digest([prompt.digest for prompt in prompts])
    return workload.timing_digest, queue, purpose, *(setup.digest for setup in setups)


def sampling_settings(workload: Workload) -> str | None:
    """The settings that choosing a token costs time by, part of the key of step times; None when greedy."""
    if workload.temperature == 0.0:
        return None
    return f"temperature {workload.temperature:g}, top-p {workload.top_p:g}, top-k {workload.top_k}"


def unit_digest(target: Model, environment: Environment, point: Key) -> str:
    """The id of a unit of timed runs, in the store and in a policy's evidence."""
    return digest_of([target.run_digest, environment.digest, *point])
