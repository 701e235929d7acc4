"""What steers the rounds of a decoding loop, and what it hears of them: a pick before each round, a report after it.

The seam between an engine and a selector (`profiles.protocol.Pilot`). The records are tuples, made twice a round, and
serving code imports them: this module loads next to nothing. A report is checked by whoever hears it.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from profiles.terms import Setup


class Pick(
    namedtuple(
        "Pick",
        ("setup", "covered", "batch_size", "context_length", "domain", "temperature", "probe", "score"),
        defaults=(False, None),
    )
):
    """The setup of the next round, for every row of the batch.

    `covered`: False where nothing measured covers the question, so plain decoding it is and nothing is learned.
    `batch_size`, `context_length`, `domain`, `temperature`: the measured point that it rests on. `probe`: the round is
    spent on finding out. `score`: an engine that can is asked to score this setup over text that is already there, once
    the round is done (see `Round.scored`); others take no notice.
    """

    __slots__ = ()
    setup: Setup
    covered: bool
    batch_size: int
    context_length: int
    domain: str
    temperature: float
    probe: bool
    score: Setup | None


class Round(namedtuple("Round", ("pick", "rows", "seconds", "scored"), defaults=(False,))):
    """How a round went.

    `rows`: (tokens proposed, of them accepted) of every row that took part. `seconds`: the whole round, drafting and
    catching up included. `scored`: `pick.score` was not run but scored over text that was there; each of `rows` is a
    round that it would have been, and `seconds` is what the scoring took.
    """

    __slots__ = ()
    pick: Pick
    rows: tuple[tuple[int, int], ...]
    seconds: float
    scored: bool
