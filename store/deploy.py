"""The deploy script's question: which setup for this target, on this machine, under this load, and how sure is that?

The policies of a target are ranked by how well the machines they were measured on fit the one that asks; the answer
carries the level. It only reads, and loads no torch.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import func, literal, select

from profiles.errors import NotMeasuredError, PolicyError
from profiles.recorded import model_from
from profiles.shipped import BUILTIN
from profiles.terms import Draft, Model
from profiles.traits import Machine, known
from store import tables
from store.book import Book
from tuner.export.terms import Deployment
from tuner.match import LEVELS, MEANINGS, Level, Match, match
from tuner.policy import Answer, Choice, Policy, check_asked, from_json, plain_answer

if TYPE_CHECKING:
    from store.transfer import Transferred

NOT_MEASURED = ("vllm", "sglang", "trtllm", "llamacpp")  # engines that are emitted for and not run on yet
SOFT = ("exact", "version")  # the same device and engine: one such policy may answer what another does not cover


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked; None is: the target tuned last, a context not known, all domains, the temperature tuned last."""

    target: str | None = None
    batch_size: int = 1
    context_length: int | None = None
    domain: str | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_asked(self.batch_size, self.context_length, self.temperature or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An answer and how well it fits; `level` is `none` where the answer is plain decoding for want of a measurement.

    `policy` is the one that was asked, with its `match`; None where no policy is near enough. `advice` is the command
    that would measure what was asked, None at an exact match and for an engine that cannot be measured on.
    `transferred` is offered where nothing measured on this device's family answers; it is not part of the answer.
    """

    answer: Answer
    level: Level
    target: Model
    policy: Policy | None = None
    match: Match | None = None
    advice: str | None = None
    transferred: "Transferred | None" = None

    def reaches(self, level: Level) -> bool:
        """Whether the match is as good as `level` or better."""
        return LEVELS.index(self.level) <= LEVELS.index(level)

    @property
    def caveat(self) -> str | None:
        """One line on what keeps the match from being exact, and the command that would mend it; None at an exact one.

        What differs is told apart from what is merely not known.
        """
        if self.level == "exact":
            return None
        differences = self.match.differences if self.match else ()
        unknown = ", ".join(one.field for one in differences if not one.is_known)
        told = [str(one) for one in differences if one.is_known]
        told += [f"not known: {unknown}"] if unknown else []
        told += [] if self.answer.matched else [self.answer.rule]
        mend = f"to measure it: {self.advice}" if self.advice else "draftpick cannot measure on that engine yet"
        return f"match is {self.level}: {MEANINGS[self.level]} ({'; '.join(told)}); {mend}"

    def with_transferred(self) -> Self:
        """The answer replaced by the transferred forecast's setup, which is not proven; itself where there is none."""
        lent = self.transferred
        if lent is None:
            return self
        choice = replace(self.answer.choice, setup=lent.setup, reason=lent.reason, forecast=lent.forecast)
        rule = f"a transferred forecast at batch {lent.batch_size}, context {lent.context_length}"
        return replace(self, answer=replace(self.answer, choice=choice, rule=rule))

    def deployment(self) -> Deployment:
        """What an exporter is asked: the choice, and the policy's others of its domain, temperature and context.

        Below an exact match nothing is called proven, because it was proven elsewhere.
        """
        policy = self.policy
        choices = (self.answer.choice, *(policy.choices if policy is not None and self.answer.matched else ()))
        if self.level != "exact":
            choices = tuple(replace(choice, proven=False) for choice in choices)
        asked, *others = choices
        where = (asked.domain, asked.temperature, asked.context_length)
        rows = tuple(row for row in others if (row.domain, row.temperature, row.context_length) == where)
        measured_on = policy.environment.engine if policy is not None else "nothing"
        return Deployment(target=self.target, choice=asked, rows=rows or (asked,), measured_on=measured_on)

    def to_json(self) -> dict[str, Any]:
        """The match as JSON values: level, differences, the machine that was measured, advice, and what is offered."""
        policy = self.policy
        return {
            "level": self.level,
            "meaning": MEANINGS[self.level],
            "differences": [
                {**asdict(one), "is_known": one.is_known} for one in (self.match.differences if self.match else ())
            ],
            "measured_on": None if policy is None else asdict(policy.environment),
            "advice": self.advice,
            "transferred": None if self.transferred is None else asdict(self.transferred),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """The latest policy of one machine, and how well that machine fits."""

    match: Match
    device: str
    policy_id: int


def lookup(book: Book, question: Question, here: Machine) -> Found:
    """The choice for a question asked on the machine `here`, with its match level; at worst plain decoding.

    1. The latest policy of each measured machine is ranked: match level, then nearest bandwidth and memory.
    2. The best one answers by `Policy.look_up`. Only where it does not cover the question, others of the same device
       and engine are asked. Beyond the largest measured batch or context: plain decoding.
    3. A question without a measured answer from this family of devices is offered a transferred forecast.

    Raises: NotMeasuredError: the store does not know the target. PolicyError: a stored policy is damaged. StoreError.
    """
    target = _target(book, question.target)
    ranked = sorted(_candidates(book, target, here), key=lambda one: one.match.order)
    found = _answered(book, target, question, ranked)
    if not found.reaches("exact") and here.get("engine") not in NOT_MEASURED:
        found = replace(found, advice=measuring_command(target, question, found.policy))
    if not found.reaches("family"):
        from store.transfer import transfer  # needs numpy, which the usual answer does not

        shape = (question.batch_size, question.context_length)
        found = replace(found, transferred=transfer(book, target, here, shape, question.temperature))
    return found


def _answered(book: Book, target: Model, question: Question, ranked: Sequence[_Candidate]) -> Found:
    """The first answer that covers the question, else the best machine's fallback to plain decoding."""
    fitting = [one for one in ranked if one.match.level != "none"]
    soft = [one for one in fitting if one.match.level in SOFT]
    first: Found | None = None
    for one in soft or fitting[:1]:
        text = _policy_text(book, one.policy_id)
        if first is not None and not _may_cover(text, question):
            continue  # a policy takes milliseconds to read
        policy = _read(book, text)
        temperature = policy.headline.temperature if question.temperature is None else question.temperature
        answer = policy.look_up(
            batch_size=question.batch_size,
            context_length=question.context_length,
            domain=question.domain,
            temperature=temperature,
        )
        level: Level = one.match.level if answer.matched else "none"
        found = Found(target=target, answer=answer, level=level, policy=policy, match=one.match)
        if answer.matched:
            return found
        first = first or found
    if first is not None:
        return first
    devices = ", ".join(dict.fromkeys(one.device for one in ranked))
    rule = f"{target.name} was tuned only on {devices}" if devices else f"{target.name} was not tuned to the end"
    shape = (question.batch_size, question.context_length or 1)
    answer = plain_answer(shape, question.domain, question.temperature or 0.0, rule)
    return Found(target=target, answer=answer, level="none", match=ranked[0].match if ranked else None)


def measuring_command(target: Model, question: Question, policy: Policy | None) -> str:
    """The command line that measures what was asked, with the drafts of `policy`; its prompts are not known here."""
    words = ["python", "tune.py", "run", "--target", target.name]
    if not target.name.startswith(BUILTIN):
        drafts = _drafts(policy.choices) if policy is not None else ()
        words += [word for draft in drafts for word in ("--draft", draft.name)]
    words += ["--batch-size", str(question.batch_size)] if question.batch_size > 1 else []
    words += ["--context", str(question.context_length)] if question.context_length is not None else []
    words += ["--temperature", f"{question.temperature:g}"] if question.temperature else []
    return shlex.join(words)


def _drafts(choices: Sequence[Choice]) -> tuple[Draft, ...]:
    """Every draft the choices name, of composites their parts, each once."""
    setups = [
        setup
        for choice in choices
        for setup in (
            choice.setup,
            *(one.setup for one in choice.alternatives),
            *(one.setup for one in (choice.forecast, choice.measured) if one is not None),
        )
    ]
    return tuple(dict.fromkeys(part for setup in setups if setup.draft is not None for part in setup.draft.parts))


def _target(book: Book, name: str | None) -> Model:
    """The target of this name, digest or run digest whose policy is the newest; without a name the one tuned last."""
    models = tables.models
    tuned = select(func.max(tables.policies.c.created_at)).where(tables.policies.c.target_key == models.c.key)
    query = select(models).order_by(tuned.scalar_subquery().desc().nulls_last())
    if name is not None:
        query = query.where(literal(name).in_([models.c.key, models.c.digest, models.c.name]))
    with book.reading() as connection:
        row = connection.execute(query.limit(1)).mappings().first()
    if row is None:
        asked = f"target {name!r}" if name is not None else "any target"
        raise NotMeasuredError(f"the store {book.place} does not know {asked}: run `tune.py run` first")
    return model_from({column: value for column, value in row.items() if column != "key"})


def _candidates(book: Book, target: Model, here: Machine) -> Iterator[_Candidate]:
    """The latest policy of every machine the target was tuned on."""
    policies, machines = tables.policies.c, tables.environments.c
    about = policies.target_key == target.run_digest
    newest = select(policies.environment_digest, func.max(policies.created_at).label("created_at")).where(about)
    newest_of = newest.group_by(policies.environment_digest).subquery()
    query = (
        select(func.max(policies.id), *machines)
        .join_from(tables.policies, newest_of, policies.environment_digest == newest_of.c.environment_digest)
        .join(tables.environments, machines.digest == newest_of.c.environment_digest)
        .where(about, policies.created_at == newest_of.c.created_at)
        .group_by(machines.digest)
    )
    names = [column.name for column in machines]
    with book.reading() as connection:
        for policy_id, *values in connection.execute(query):
            there = known(dict(zip(names, values, strict=True)))
            yield _Candidate(match=match(here, there), device=str(there["device"]), policy_id=policy_id)


def _policy_text(book: Book, policy_id: int) -> str:
    with book.reading() as connection:
        return str(connection.scalar(select(tables.policies.c.policy).where(tables.policies.c.id == policy_id)))


def _read(book: Book, text: str) -> Policy:
    try:
        return from_json(text)
    except PolicyError as error:
        raise PolicyError(f"the policy in store {book.place}: {error}") from error


def _may_cover(text: str, question: Question) -> bool:
    """Whether a policy has a batch and a context as large as asked; True for a damaged one, which is then told."""
    try:
        choices = json.loads(text)["choices"]
        largest = max(choice["batch_size"] for choice in choices)
        longest = max(choice["context_length"] for choice in choices)
        return bool(largest >= question.batch_size and longest >= (question.context_length or 1))
    except (LookupError, TypeError, ValueError, RecursionError):
        return True
