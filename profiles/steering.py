"""What decides the setup of every round, and what it hears of how the round went.

The seam between an engine and a selector: an engine asks a `Pilot` before each round and reports after it. Serving code
imports this, so it loads next to nothing; the records are tuples, because they are made twice a round. A report is
checked by whoever hears it.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from profiles.terms import Setup


class Pick(NamedTuple):
    """The setup of the next round, for every row of the batch.

    `covered`: False where nothing measured covers the question, so plain decoding it is and nothing is learned.
    `batch_size`, `context_length`, `domain`, `temperature`: the measured point that it rests on. `probe`: the round is
    spent on finding out. `score`: an engine that can is asked to score this setup over text that is already there, once
    the round is done (see `Round.scored`); others take no notice.
    """

    setup: "Setup"
    covered: bool
    batch_size: int
    context_length: int
    domain: str
    temperature: float
    probe: bool = False
    score: "Setup | None" = None


class Round(NamedTuple):
    """How a round went.

    `rows`: (tokens proposed, of them accepted) of every row that took part. `seconds`: the whole round, drafting and
    catching up included. `scored`: `pick.score` was not run but scored over text that was there; each of `rows` is a
    round that it would have been, and `seconds` is what the scoring took.
    """

    pick: Pick
    rows: tuple[tuple[int, int], ...]
    seconds: float
    scored: bool = False


class Pilot(Protocol):
    """Decides every round; `tuner.selector.Selector` is one, `tuner.simulator` and benchmarks have others."""

    def choose(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> Pick:
        """The setup to decode the next round with; of requests of several domains in a batch, `domain` is None."""
        ...

    def observe(self, report: Round) -> bool:
        """Hears how a round went; False: the report is impossible and was refused."""
        ...
