"""Which setup an export is of: the choice where the engine can be told it, else the best forecast setup that it can."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from profiles.engines.releases import EngineRelease
from profiles.records.core import PLAIN, Draft, Model, Setup
from profiles.records.text import printable
from tuner.policy.policy import Choice

Objection = Callable[[Setup], str | None]  # why an engine cannot be told a setup, or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The choice to export, and the choices beside it.

    `rows`: all choices of the policy with the same domain, temperature and context, one per measured batch; a schedule
    is made of them. `measured_on`: the policy's engine.
    """

    target: Model
    choice: Choice
    rows: tuple[Choice, ...]
    measured_on: str

    @property
    def engine(self) -> str:
        """The engine's short name: `torch` for `draftpick-torch`."""
        return self.measured_on.removeprefix("draftpick-")

    @property
    def batches(self) -> tuple[Choice, ...]:
        """One choice per measured batch, the smallest first; the choice itself at its own batch."""
        rows = {row.batch_size: row for row in self.rows} | {self.choice.batch_size: self.choice}
        return tuple(rows[batch] for batch in sorted(rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """`text` is ready for a file, empty where nothing can or need be set; `note` says why, or a caveat.

    `setup`: what the text sets at the choice's batch. `label`: `proven` only where that setup was proven on this very
    engine, `measured on ENGINE` where it was timed, else `forecast on ENGINE`; empty with an empty text. `claims`: what
    the text sets at each measured batch that it is for.
    """

    text: str
    note: str | None = None
    setup: Setup | None = None
    label: str = ""
    claims: Mapping[int, Setup] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """The setup to export and notes for the user; `objection` is that of the engine's release."""

    deployment: Deployment
    release: EngineRelease
    setup: Setup
    notes: tuple[str, ...]
    objection: Objection

    @property
    def draft(self) -> Draft:
        """What is never exported is plain decoding."""
        assert self.setup.draft is not None
        return self.setup.draft

    def export(self, text: str, notes: Sequence[str], claims: Mapping[int, Setup] | None = None) -> Export:
        """The pick in an engine's form; `claims` None: of one length for the batches around the choice."""
        setup = self.setup
        if claims is None:
            claims = {row.batch_size: setup for row in _around(self.deployment, setup)[1]}
        return Export(
            text=text,
            note="; ".join([*self.notes, *notes]) or None,
            setup=setup,
            label=label_of(self.deployment, self.release.engine, setup),
            claims=claims,
        )


def pick(deployment: Deployment, release: EngineRelease, objection: Objection) -> Pick | Export:
    """The choice, or the first alternative without an objection; an empty export where there is none."""
    choice, notes = deployment.choice, [] if release.note is None else [release.note]
    if choice.setup.draft is None:
        return Export(
            text="", note=f"nothing to set for {release.title}: plain decoding is the choice. {choice.reason}"
        )
    skipped = []
    for setup in dict.fromkeys((choice.setup, *(forecast.setup for forecast in choice.alternatives))):
        reason = objection(setup)
        if reason is not None:
            skipped.append(f"{setup.name} is left out: {reason}")
            continue
        if setup != choice.setup:
            instead = f"the best forecast setup {release.name} takes, not proven by runs"
            notes += [*skipped, f"{setup.name} is emitted instead: {instead}"]
        return Pick(deployment=deployment, release=release, setup=setup, notes=tuple(notes), objection=objection)
    return Export(text="", note="; ".join([*notes, f"nothing to set for {release.title}", *skipped]))


def one_length_note(pick: Pick, limit: str) -> str:
    """For an engine that keeps one length: the batches it was decided for, and the `limit` that keeps to them.

    A batch is decided by the smallest measured one that is at least as large.
    """
    before, inside, after = _around(pick.deployment, pick.setup)
    last = inside[-1].batch_size
    span = f"{before[-1].batch_size + 1} to {last}, smaller ones otherwise" if before else f"up to {last}"
    beyond = f"{after[0].setup.name} was decided" if after else "nothing was measured"
    return f"k={pick.setup.length} is for batches {span}; from {last + 1} on {beyond}: keep {limit} at or under {last}"


def _around(deployment: Deployment, setup: Setup) -> tuple[Sequence[Choice], ...]:
    """The measured batches before, in and after the stretch around the choice's batch that a setup was decided for."""
    rows, chosen = deployment.batches, deployment.choice
    index = next(index for index, row in enumerate(rows) if row.batch_size == chosen.batch_size)
    others = [i for i, row in enumerate(rows) if row.setup not in (setup, chosen.setup)]
    first = max((other + 1 for other in others if other < index), default=0)
    end = min((other for other in others if other > index), default=len(rows))
    return rows[:first], rows[first:end], rows[end:]


def label_of(deployment: Deployment, form: str, setup: Setup) -> str:
    """How sure a setup is; a choice measured on one engine is never proven on another."""
    choice = deployment.choice
    if not choice.is_decided:
        return "not measured"
    # paired runs time plain decoding beside their setup
    is_measured = choice.measured is not None and setup in (choice.measured.setup, PLAIN)
    if setup != choice.setup or not is_measured:
        return f"forecast on {deployment.engine}"
    return "proven" if choice.proven and deployment.engine == form else f"measured on {deployment.engine}"


def comment(text: str) -> str:
    """One line whatever a name holds: a line break would end the comment."""
    return "# " + " ".join(printable(text).split())


def title(pick: Pick) -> str:
    choice, label = pick.deployment.choice, label_of(pick.deployment, pick.release.engine, pick.setup)
    point = f"{choice.domain} prompts, batch {choice.batch_size}, context up to {choice.context_length}"
    return comment(f"{pick.setup.name} for {point} ({label})")


def look_up_notes(pick: Pick) -> list[str]:
    """For engines whose look-ups have a largest match only."""
    shortest = pick.draft.min_match
    if pick.draft.kind != "ngram" or shortest == 1:
        return []
    measured = f"the choice was measured with matches of {shortest} or more"
    return [f"{pick.release.title} also looks up single tokens; {measured}"]


def sampling_notes(pick: Pick) -> list[str]:
    """For engines that accept sampled drafts by a rule of their own."""
    if pick.draft.kind == "ngram" or pick.deployment.choice.temperature == 0.0:
        return []
    rule = f"{pick.release.title}'s rule may differ"
    return [f"the choice was measured with rejection sampling of sampled drafts; {rule}"]
