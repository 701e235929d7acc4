"""Whether an emitted command holds: a server started with exactly its words against a plain one, under load.

In the engine (`ServerEngine`) one setup stands for the emitted words, whatever batch sizes they schedule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from profiles.engines.base import Engine
from profiles.records.core import Prompt, Setup, Workload
from profiles.records.errors import InputError
from tuner.forecast.queues import purpose_of, queues
from tuner.policy.estimates import Measured
from tuner.search import proof
from tuner.search.pairs import Pair, run_pairs

Verdict = Literal["confirmed", "not shown", "refuted"]
NUM_QUEUES, BATCHES_PER_QUEUE = 6, 4  # at a concurrency above 1
MOST_LOSS = 0.05  # where plain decoding is claimed, the emitted command may be this much slower: it still has a draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What the emitted command did at one concurrency, against plain decoding there.

    `claimed` is what the command says for it. `confirmed`: a drafting setup is proven faster again, a plain one is not
    slower than 5 %; `refuted`: the interval says the contrary.
    """

    concurrency: int
    claimed: Setup
    measured: Measured
    verdict: Verdict


def verify(
    engine: Engine, emitted: Setup, claims: Mapping[int, Setup], prompts: Sequence[Prompt], workload: Workload
) -> tuple[Verified, ...]:
    """Measures the emitted command at every concurrency in `claims`, smallest first, in paired queues.

    The order within a pair is drawn as the tuner's proof draws it, and Holm's step-down goes over all drafting claims.
    Raises InputError: no claims, or too few prompts; EngineError as the engine does.
    """
    if not claims or len(prompts) < 2:
        raise InputError(f"{len(claims)} concurrencies and {len(prompts)} prompts: at least 1 and 2 are needed")
    measured = {size: _measure(engine, emitted, prompts, replace(workload, batch_size=size)) for size in sorted(claims)}
    drafting = [size for size in measured if claims[size].draft is not None]
    proven = dict(zip(drafting, proof.prove([measured[size] for size in drafting]), strict=True))
    return tuple(
        Verified(
            concurrency=size,
            claimed=claims[size],
            measured=estimate,
            verdict=_verdict(estimate, claims[size], proven=proven.get(size, False)),
        )
        for size, estimate in measured.items()
    )


def _measure(engine: Engine, emitted: Setup, prompts: Sequence[Prompt], workload: Workload) -> Measured:
    pairs: list[Pair] = []
    sizes = {"max_alone": len(prompts), "num_queues": NUM_QUEUES, "batches_per_queue": BATCHES_PER_QUEUE}
    several = queues(prompts, workload.batch_size, **sizes)
    for number, queue in enumerate(several):
        pairs += run_pairs(engine, workload, queue, emitted, purpose_of("verify", workload, number))
    greedy = workload.temperature == 0.0
    measured, _ = proof.measure(proof.Design(setup=emitted, greedy=greedy, queue_size=len(several[0])), pairs)
    return measured


def _verdict(measured: Measured, claimed: Setup, *, proven: bool) -> Verdict:
    drafts = claimed.draft is not None
    least = 1.0 if drafts else 1.0 - MOST_LOSS
    if proven or (not drafts and measured.speedup.low >= least):
        return "confirmed"
    return "refuted" if measured.speedup.high < least else "not shown"
