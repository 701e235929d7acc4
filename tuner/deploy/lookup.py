"""The deploy script's question: which setup for this target, on this machine, under this load, and how sure is that?

The policies of a target are ranked by how well the machines they were measured on fit the one that asks; the answer
carries the level. It only reads, and loads no torch.
"""

import functools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Select, bindparam, func, select

from profiles.builtin import BUILTIN, IMPORTED_MARKS, replace_mark
from profiles.hardware.device import Machine, drop_unknown, on_gpu
from profiles.records.codec import model_from
from profiles.records.core import Draft, Model
from profiles.records.draft_spec import MAX_BATCH, MAX_REQUESTS
from profiles.records.errors import NotMeasuredError, PolicyError
from store import tables
from store.evidence_store import EvidenceStore, like_last_part
from tuner.deploy.match import LEVELS, MEANINGS, Level, Match, match
from tuner.policy.policy import Answer, Choice, Policy, from_json, plain_answer
from tuner.policy.query import check_query

if TYPE_CHECKING:
    from tuner.export import Deployment

# serving engines, and the words with which `tune.py run` measures on them
SERVING = {
    "vllm": ("--engine", "vllm"),
    "llamacpp": ("--engine", "llamacpp"),
    "sglang": ("--engine", "server", "--kind", "sglang", "--launch", "COMMAND --port {port} {speculative}"),
}
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
        check_query(self.batch_size, self.context_length, self.temperature or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An answer and how well it fits; `level` is `none` where the answer is plain decoding for want of a measurement.

    `policy` is the one that was asked, with its `match`; None where no policy is near enough. Below an exact match no
    choice is called proven: it was proven elsewhere. `advice` is the command that would measure what was asked, None at
    an exact match and where there is none.
    """

    answer: Answer
    level: Level
    target: Model
    policy: Policy | None = None
    match: Match | None = None
    advice: str | None = None

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
        mend = f"to measure it there: {self.advice}" if self.advice else "`tune.py run` cannot measure that"
        return f"match is {self.level}: {MEANINGS[self.level]} ({'; '.join(told)}); {mend}"

    def deployment(self) -> "Deployment":
        """What an exporter is asked: the choice, and the policy's others of its domain, temperature and context."""
        from tuner.export import Deployment  # and with it the exporters, which a look-up for people does not need

        policy, asked = self.policy, self.answer.choice
        where = (asked.domain, asked.temperature, asked.context_length)
        others = policy.choices if policy is not None and self.answer.matched else ()
        rows = tuple(row for row in others if (row.domain, row.temperature, row.context_length) == where)
        measured_on = policy.environment.engine if policy is not None else "nothing"
        return Deployment(
            target=self.target,
            choice=asked,
            rows=rows or (asked,),
            measured_on=measured_on,
        )

    def to_json(self) -> dict[str, Any]:
        """The match as JSON values: level, differences, the machine that was measured, and advice."""
        return {
            "level": self.level,
            "meaning": MEANINGS[self.level],
            "differences": [
                {**asdict(one), "is_known": one.is_known} for one in (self.match.differences if self.match else ())
            ],
            "measured_on": None if self.policy is None else asdict(self.policy.environment),
            "advice": self.advice,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """The latest policy of a target on one machine, and how well that machine fits."""

    target: Model
    match: Match
    policy_id: int


def lookup(evidence_store: EvidenceStore, question: Question, here: Machine) -> Found:
    """The choice for a question asked on the machine `here`, with its match level; at worst plain decoding.

    1. The latest policy of each measured machine is ranked: match level, nearest bandwidth and memory, newest. A
       question without a temperature is asked at the one the best of them tuned last.
    2. The best one answers by `Policy.look_up`. Only where it does not cover the question, or was not decided there,
       others of the same device and engine are asked. Beyond the largest measured batch or context: plain decoding.

    Raises: NotMeasuredError: the store does not know the target. PolicyError: a stored policy is damaged. StoreError.
    """
    models = _targets(evidence_store, question.target)
    ranked = _ranked(evidence_store, models, here)
    found = _answered(evidence_store, question, ranked) or _nothing(evidence_store, models, question)
    if found.level != "exact":
        choice = replace(found.answer.choice, proven=False)
        found = replace(found, answer=replace(found.answer, choice=choice))
        words = SERVING.get(str(here.get("engine")), ())
        if question.batch_size <= (MAX_REQUESTS if words else MAX_BATCH):
            found = replace(found, advice=measuring_command(found, question, words))
    return found


def _answered(evidence_store: EvidenceStore, question: Question, ranked: Sequence[_Candidate]) -> Found | None:
    """The first answer that covers the question, else the best machine's fallback to plain decoding."""
    soft = [one for one in ranked if one.match.level in SOFT]
    first: Found | None = None
    for one in soft or ranked[:1]:
        text = _policy_text(evidence_store, one.policy_id)
        if first is not None and (one.target != first.target or not _may_cover(text, question)):
            continue  # reading policies takes most of a look-up's time
        policy = read_policy(evidence_store, text)
        if question.temperature is None:
            question = replace(question, temperature=policy.headline.temperature)
        answer = policy.look_up(
            batch_size=question.batch_size,
            context_length=question.context_length,
            domain=question.domain,
            temperature=question.temperature or 0.0,
        )
        if answer.matched and not answer.choice.is_decided:
            answer = replace(answer, matched=False, rule="the run ended before this was decided")
        level: Level = one.match.level if answer.matched else "none"
        found = Found(target=one.target, answer=answer, level=level, policy=policy, match=one.match)
        if answer.matched:
            return found
        first = first or found
    return first


def _nothing(evidence_store: EvidenceStore, targets: Sequence[Model], question: Question) -> Found:
    """Plain decoding, because no policy of the target is from a machine that fits."""
    target, devices = targets[0], ", ".join(_tuned_on(evidence_store, targets))
    rule = f"{target.name} was tuned only on {devices}" if devices else f"{target.name} was not tuned to the end"
    shape = (question.batch_size, question.context_length or 1)
    answer = plain_answer(shape, question.domain, question.temperature or 0.0, rule)
    return Found(target=target, answer=answer, level="none")


def measuring_command(found: Found, question: Question, engine: Sequence[str] = ()) -> str:
    """The command line that measures what was asked, with the drafts and the law of sampling of the policy.

    `engine`: the words for another engine than ours, which takes look-ups and draft models alone.

    Which prompts that was does not stand in a policy: theirs must be named again, but for the family that ships.
    """
    target = replace_mark(found.target.name, "PATH/TO/")
    words = ["python", "tune.py", "run", *engine, "--target", target, "--dtype", found.target.dtype]
    if not found.target.name.startswith(BUILTIN):
        drafts = _drafts(found.policy.choices) if found.policy is not None else ()
        words += [word for draft in drafts for word in ("--draft", replace_mark(draft.name, "PATH/TO/"))]
        words += ["--prompts", "PROMPTS.jsonl"]
    choice, policy = found.answer.choice, found.policy
    if policy is not None and policy.headline.temperature == choice.temperature:
        choice = policy.headline  # which has its top-p and top-k too
    asked = {
        "--batch-size": question.batch_size if question.batch_size > 1 else None,
        "--context": question.context_length,
        "--temperature": choice.temperature or None,
        "--top-p": choice.top_p if choice.top_p < 1.0 else None,
        "--top-k": choice.top_k or None,
    }
    words += [word for flag, value in asked.items() if value is not None for word in (flag, f"{value:g}")]
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
    return tuple(dict.fromkeys(part for setup in setups if setup.draft is not None for part in setup.draft.components))


@functools.cache
def _targets_query() -> Select[Any]:
    """Targets by name or digest, the one tuned last first; a statement is made once, because that takes time too."""
    models = tables.models
    tuned = select(func.max(tables.policies.c.id)).where(tables.policies.c.target_key == models.c.key)
    named = bindparam("name").in_([models.c.key, models.c.digest, models.c.name])
    marked = models.c.name.in_([bindparam("imported"), bindparam("imported_before"), bindparam("path")])
    last_part = models.c.name.like(bindparam("last_part"), escape="\\")
    return (
        select(models)
        .where(bindparam("any_name") | named | marked | last_part)
        .order_by(tuned.scalar_subquery().desc().nulls_last())
    )


def _targets(evidence_store: EvidenceStore, name: str | None) -> list[Model]:
    """The targets of this name, digest or run digest, the one tuned last first; without a name only that one."""
    imported, imported_before = (f"{mark}{Path(name or '').name}" for mark in IMPORTED_MARKS)
    given = {"name": name, "any_name": name is None, "imported": imported, "imported_before": imported_before}
    given |= {"path": os.path.abspath(name or ""), "last_part": like_last_part(name or "")}
    with evidence_store.reading() as connection:
        rows = connection.execute(_targets_query(), given).mappings().all()
    if not rows:
        asked = f"target {name!r}" if name is not None else "any target"
        raise NotMeasuredError(f"the store {evidence_store.name} does not know {asked}: run `tune.py run` first")
    found = [model_from({column: value for column, value in row.items() if column != "key"}) for row in rows]
    return found if name is not None else found[:1]


@functools.cache
def _latest_query() -> Select[Any]:
    """The latest policy of every target in `keys` on every machine of a device, or of a compute capability, or all."""
    policies, machines = tables.policies.c, tables.environments.c
    capability = machines.compute_capability
    return (
        select(policies.target_key, policies.id, *machines)
        .join_from(tables.policies, tables.environments)
        .where(
            tables.IS_NEWEST_POLICY,
            policies.target_key.in_(bindparam("keys", expanding=True)),
            (machines.device == bindparam("device"))
            | bindparam("every")
            | (bindparam("on_gpu") & ((capability == bindparam("capability")) | capability.is_(None))),
        )
    )


def _ranked(evidence_store: EvidenceStore, targets: Sequence[Model], here: Machine) -> list[_Candidate]:
    """The latest policy of every machine the targets were tuned on that fits, the best match first.

    Of many machines only those are read that may fit: of this device, and on a GPU of its compute capability.
    """
    by_key = {target.run_digest: target for target in targets}
    names = [column.name for column in tables.environments.c]
    capability = here.get("compute_capability")
    given = {
        "keys": list(by_key),
        "device": str(here.get("device")),
        "on_gpu": capability is not None,
        "every": capability is None and on_gpu(here),
        "capability": str(capability),
    }
    found = []
    with evidence_store.reading() as connection:
        for key, policy_id, *values in connection.execute(_latest_query(), given):
            fit = match(here, drop_unknown(dict(zip(names, values, strict=True))))
            if fit.level != "none":
                target = by_key[key]
                found.append(_Candidate(target=target, match=fit, policy_id=policy_id))
    found.sort(key=lambda one: one.policy_id, reverse=True)
    return sorted(found, key=lambda one: one.match.order)


def _tuned_on(evidence_store: EvidenceStore, targets: Sequence[Model]) -> list[str]:
    """The devices on which the targets were tuned."""
    keys = [target.run_digest for target in targets]
    query = select(tables.environments.c.device).join(tables.policies).where(tables.policies.c.target_key.in_(keys))
    with evidence_store.reading() as connection:
        return list(connection.scalars(query.distinct().order_by(tables.environments.c.device)))


def _policy_text(evidence_store: EvidenceStore, policy_id: int) -> str:
    with evidence_store.reading() as connection:
        return str(connection.scalar(select(tables.policies.c.policy).where(tables.policies.c.id == policy_id)))


def read_policy(evidence_store: EvidenceStore, text: str) -> Policy:
    """A policy that the book keeps. Raises PolicyError, naming the store."""
    try:
        return from_json(text)
    except PolicyError as error:
        raise PolicyError(f"the policy in store {evidence_store.name}: {error}") from error


def _may_cover(text: str, question: Question) -> bool:
    """Whether a policy may have a batch and a context as large as asked, told without decoding it."""
    asked = {"batch_size": question.batch_size, "context_length": question.context_length or 1}
    return all(
        any(int(found) >= least for found in re.findall(rf'"{name}": *([0-9]{{1,18}})', text))
        for name, least in asked.items()
    )
