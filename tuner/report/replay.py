"""What a selector would have made of a run's own prompts: replayed on its evidence, for the report's timeline.

Domain after domain at every batch that was measured, up and down again, beside plain decoding and the best single
setup. Nothing is decoded, so it shows how a selector behaves and not how fast the machine is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from profiles.records.core import PLAIN, Prompt, Setup
from profiles.records.errors import NotMeasuredError
from tests.benchmarks import traffic
from tests.benchmarks.simulator import Fixed, Played, Record, Simulator, World
from tests.benchmarks.traffic import Phase, Stream
from tuner.pipeline.points import PointDecision
from tuner.policy.policy import Choice, Policy
from tuner.policy.prior import Prior
from tuner.report.data import Span, Timeline
from tuner.report.timeline import smoothed
from tuner.selector.selector import Selector

REQUESTS = 8  # of a phase at batch 1; in a batch as many full ones as make no fewer, but at least two
MOST_ROUNDS = 16  # that are drawn as one
MOST_TOKENS = 64  # of an output, so that a replay takes seconds
HOPEFUL = 5  # setups of each anchor that may be the best single one


def replayed(anchors: Sequence[PointDecision], policy: Policy) -> Timeline | None:
    """The timeline of a stream made of the anchors of the first temperature; None where nothing was forecast.

    The requests are the prompts that the forecasts rest on: the policy was made from them. Drafts that were only run
    cannot be replayed: where one was chosen the best of the others stands in.
    """
    known = [anchor for anchor in anchors if anchor.grounds is not None and anchor.forecasts]
    known = [anchor for anchor in known if anchor.workload.temperature == known[0].workload.temperature]
    if not known or policy.prior is None:
        return None
    simulator, stream = _simulator(known), _stream(known)
    try:
        steered = simulator.serve(stream, Selector(_replayable(policy, policy.prior)))
        rates = {setup: simulator.serve(stream, Fixed(setup)).tok_per_s for setup in _hopeful(known, policy.prior)}
        best = max(rates, key=lambda setup: rates[setup])
        single, plain = (simulator.serve(stream, Fixed(setup)) for setup in (best, PLAIN))
    except NotMeasuredError:  # evidence of an earlier draftpick lacks what a replay needs
        return None
    return Timeline(
        spans=tuple(_stretches(steered)),
        plain=smoothed(list(_stretches(plain))),
        best_single=smoothed(list(_stretches(single))),
        best_single_name=best.name,
    )


def _replayable(policy: Policy, prior: Prior) -> Policy:
    """The policy with setups of the prior's drafts alone."""

    def of(choice: Choice) -> Choice:
        setups = (choice.setup, *(one.setup for one in choice.alternatives))
        setup = next((setup for setup in setups if setup == PLAIN or setup.draft in prior.drafts), PLAIN)
        return choice if setup == choice.setup else replace(choice, setup=setup, proven=False)

    return replace(policy, choices=tuple(of(choice) for choice in policy.choices))


def _simulator(known: Sequence[PointDecision]) -> Simulator:
    grounds = {anchor.workload.batch_size: anchor.grounds for anchor in reversed(known)}
    first = known[0].grounds
    assert first is not None
    forecasters = {size: one.forecaster for size, one in grounds.items() if one is not None}
    return Simulator(World(workload=known[0].workload, evidence=first.evidence, forecasters=forecasters))


def _stream(known: Sequence[PointDecision]) -> Stream:
    """Every domain in turn at every batch, the smallest first, and back again."""
    prompts = [one for one in _served(known) if _has_rounds(known[0], one)]
    domains = tuple(dict.fromkeys(prompt.domain for prompt in prompts))
    sizes = sorted({anchor.workload.batch_size for anchor in known})
    phases = [
        Phase(num_requests=max(REQUESTS, 2 * size), domains=(domain,), concurrency=size, most_tokens=MOST_TOKENS)
        for size in (*sizes, *reversed(sizes[:-1]))
        for domain in domains
    ]
    return traffic.stream_of("timeline", phases, prompts, seed=0)


def _has_rounds(first: PointDecision, prompt: Prompt) -> bool:
    assert first.grounds is not None
    return len(first.grounds.evidence.traces[prompt.digest].token_ids) > 1


def _served(known: Sequence[PointDecision]) -> list[Prompt]:
    """Prompts of the first workload that have a trace."""
    own = [anchor for anchor in known if anchor.workload == known[0].workload]
    return list({prompt.digest: prompt for anchor in own for prompt in anchor.forecast_pool}.values())


def _hopeful(known: Iterable[PointDecision], prior: Prior) -> set[Setup]:
    """Plain decoding and the best forecasts of every anchor, of the prior's drafts that ran at every load."""
    everywhere = set.intersection({*prior.drafts}, *({one.setup.draft for one in anchor.forecasts} for anchor in known))
    own = [[one.setup for one in anchor.forecasts if one.setup.draft in everywhere] for anchor in known]
    return {PLAIN, *(setup for setups in own for setup in setups[:HOPEFUL])}


def _stretches(record: Record) -> Iterator[Span]:
    """Rounds alike in a row as one, sixteen at most, so that the speed within a long stretch is seen."""

    def kind(numbered: tuple[int, Played]) -> tuple[object, ...]:
        number, one = numbered
        return one.setup, one.num_rows, one.domain, number // MOST_ROUNDS

    start_s = 0.0
    for _, group in groupby(enumerate(record.rounds), key=kind):
        together = [one for _, one in group]
        one, seconds = together[0], sum(each.seconds for each in together)
        draft = one.setup.draft
        yield Span(
            start_s=start_s,
            seconds=seconds,
            draft_name=PLAIN.name if draft is None else draft.name,
            length=one.setup.length,
            batch_size=one.num_rows,
            tokens=sum(each.tokens for each in together),
            domain=one.domain,
        )
        start_s += seconds
