"""What an export is asked for and what it hands back; on its own, because all engines' modules share it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from profiles.records.core import Model, Setup
from tuner.policy.policy import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The answer to one question, and what else was decided beside it.

    `rows` are all choices of the policy with the answer's domain, temperature and context, one per measured batch; what
    a schedule is made of. `measured_on` is the policy's engine. `transferred`: the setup is forecast from the evidence
    of another machine, and no label may say more.
    """

    target: Model
    choice: Choice
    rows: tuple[Choice, ...]
    measured_on: str
    transferred: bool = False

    @property
    def where(self) -> str:
        """The engine as people write it: `torch` for our own."""
        return self.measured_on.removeprefix("draftpick-")

    @property
    def batches(self) -> tuple[Choice, ...]:
        """One choice per measured batch, the smallest first; the answer itself at its own batch."""
        rows = {row.batch_size: row for row in self.rows} | {self.choice.batch_size: self.choice}
        return tuple(rows[batch] for batch in sorted(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """`text` is ready for a file, empty where the engine cannot or need not be told; `note` says why, or a caveat.

    `setup` is what the text says, at the answer's batch. `label` is `proven` only where that setup was proven on this
    very engine, `measured on ENGINE` where it was timed, else `forecast on ENGINE`; empty with an empty text. `claims`:
    the measured batches that the text is for, and what each decodes with there.
    """

    text: str
    note: str | None = None
    setup: Setup | None = None
    label: str = ""
    claims: Mapping[int, Setup] = field(default_factory=dict)
