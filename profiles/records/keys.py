"""The identities under which evidence is kept and found again: digests, never names.

One place, so that a store, a recording and a policy mean the same unit. Knows nothing of where evidence lies.
"""

from profiles.records.core import Environment, Model, Prompt, Setup, Workload, digest_of

Key = tuple[str, ...]


def sampling_digest(workload: Workload, origin: str = "") -> str:
    """Identity of the output law and, beside our own engine, of whose arithmetic it is (`capabilities.origin`)."""
    return digest_of([workload.sampling_digest, origin]) if origin else workload.sampling_digest


def trace_point(workload: Workload, prompt: Prompt, origin: str = "") -> Key:
    """What a trace is a trace of, beside the models."""
    return sampling_digest(workload, origin), prompt.digest


def queue_digest(prompts: tuple[Prompt, ...]) -> str:
    """Identity of the prompts of a unit in their order; a single one's is its own."""
    digests = [prompt.digest for prompt in prompts]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def run_point(workload: Workload, prompts: tuple[Prompt, ...], setups: tuple[Setup, ...], purpose: str) -> Key:
    """What a unit of timed runs measured, beside target and machine; the order of prompts and setups matters."""
    return workload.timing_digest, queue_digest(prompts), purpose, *(setup.digest for setup in setups)


def unit_digest(target: Model, environment: Environment, point: Key) -> str:
    """Id of a unit of timed runs: `unit` in the store's samples and in a policy's evidence."""
    return digest_of([target.run_digest, environment.digest, *point])
