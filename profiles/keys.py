"""The identities under which evidence is kept and found again: digests, never names.

One place, so that a store, a recording and a policy mean the same unit. Knows nothing of where evidence lies.
"""

from profiles.terms import Environment, Model, Prompt, Setup, Workload, digest_of

Key = tuple[str, ...]


def trace_point(workload: Workload, prompt: Prompt) -> Key:
    """What a trace is a trace of, beside the models."""
    return workload.sampling_digest, prompt.digest


def run_point(workload: Workload, prompt: Prompt, setups: tuple[Setup, ...], occasion: str) -> Key:
    """What a unit of timed runs measured, beside target and machine; the order of the setups matters."""
    return workload.anchor_digest, prompt.digest, occasion, *(setup.digest for setup in setups)


def unit_digest(target: Model, environment: Environment, point: Key) -> str:
    """Id of a unit of timed runs: `unit` in the store's samples and in a policy's evidence."""
    return digest_of([target.run_digest, environment.digest, *point])
