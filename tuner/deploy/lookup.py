"""Which setup to use for a target on this machine under this load, and how well that is known.

Reads policies, of a store or one file. Loads no torch, and SQLAlchemy for stores only.
"""

import shlex
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from profiles.builtin import BUILTIN, replace_mark
from profiles.hardware.device import ENGINE, Machine, drop_unknown
from profiles.records.core import Draft, Model
from profiles.records.draft_spec import MAX_BATCH, MAX_REQUESTS
from profiles.records.errors import InputError
from profiles.records.text import CHECKOUT_SCRIPT, command
from tuner.deploy.match import LEVELS, MEANINGS, Level, Match, match
from tuner.policy.policy import Answer, Choice, Policy, plain_answer

if TYPE_CHECKING:
    from store.evidence_store import EvidenceStore
    from tuner.export import Deployment

SERVING_ARGUMENTS = {  # by serving engine: how `run` measures on it
    "vllm": ("--engine", "vllm"),
    "llamacpp": ("--engine", "llamacpp"),
    "sglang": ("--engine", "server", "--kind", "sglang", "--launch", "COMMAND --port {port} {speculative}"),
}
SAME_DEVICE: tuple[Level, ...] = ("exact", "version")  # one such policy may answer what another does not cover


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What a look-up is for; None: the target tuned last, no known context, all domains, the temperature tuned last."""

    target: str | None = None
    batch_size: int = 1
    context_length: int | None = None
    domain: str | None = None
    temperature: float | None = None

    def plain_answer(self, rule: str) -> Answer:
        """Plain decoding, because nothing that was measured covers the query."""
        shape = (self.batch_size, self.context_length or 1)
        return plain_answer(shape, self.domain, self.temperature or 0.0, rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupResult:
    """An answer and how well its measurement matches the machine; `level` is `none` where nothing measured covers it.

    `policy` and its `match` are None where no policy is near enough. A choice is `proven` on an exact match only.
    `advice` is the command that would measure the query; None on an exact match, and where there is none.
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
        """One line on what keeps the match from being exact, and what to run; None on an exact match."""
        if self.level == "exact":
            return None
        differences = self.match.differences if self.match else ()
        causes = [str(difference) for difference in differences if difference.is_known]
        unknown = [difference.field for difference in differences if not difference.is_known]
        causes += [f"not known: {', '.join(unknown)}"] if unknown else []
        causes += [] if self.answer.matched else [self.answer.rule]
        remedy = f"to measure it there: {self.advice}" if self.advice else f"`{command('run')}` cannot measure that"
        return f"match is {self.level}: {MEANINGS[self.level]} ({'; '.join(causes)}); {remedy}"

    def deployment(self) -> "Deployment":
        """What an exporter needs: the choice, and the policy's others of its domain, temperature and context."""
        from tuner.export import Deployment

        choice, policy = self.answer.choice, self.policy
        rows = policy.choices if policy is not None and self.answer.matched else ()
        same = (choice.domain, choice.temperature, choice.context_length)
        rows = tuple(row for row in rows if (row.domain, row.temperature, row.context_length) == same)
        engine = policy.environment.engine if policy is not None else "nothing"
        return Deployment(target=self.target, choice=choice, rows=rows or (choice,), measured_on=engine)

    def to_json(self) -> dict[str, Any]:
        """The match as JSON values: level, differences, the machine that was measured, and advice."""
        differences = self.match.differences if self.match else ()
        return {
            "level": self.level,
            "meaning": MEANINGS[self.level],
            "differences": [{**asdict(row), "is_known": row.is_known} for row in differences],
            "measured_on": None if self.policy is None else asdict(self.policy.environment),
            "advice": self.advice,
        }


def lookup(evidence_store: "EvidenceStore", query: Query, here: Machine) -> LookupResult:
    """The choice for a query on the machine `here`, with its match; plain decoding where nothing measured covers it.

    1. The latest policy of each measured machine is ranked: match level, nearest bandwidth and memory, newest. A query
       without a temperature takes the one that the best of them tuned last.
    2. The best one answers by `Policy.look_up`. Where it does not cover the query, or was not decided there, others of
       the same device and engine answer. Beyond the largest measured batch or context: plain decoding.

    Raises: NotMeasuredError: the store does not know the target. PolicyError: a stored policy is damaged. StoreError.
    """
    from tuner.deploy import stored_policies

    targets = stored_policies.find_targets(evidence_store, query.target)
    ranked = stored_policies.rank(evidence_store, targets, here)
    best: LookupResult | None = None
    same_device = [stored for stored in ranked if stored.match.level in SAME_DEVICE]
    for stored in same_device or ranked[:1]:
        if best is not None and stored.target != best.target:
            continue
        policy = stored_policies.read_stored(evidence_store, stored)
        query = _with_temperature(query, policy)
        result = _answer(policy, query, stored.match)
        if best is None or result.answer.matched:
            best = result
        if result.answer.matched:
            break
    if best is None:
        devices = ", ".join(stored_policies.tuned_on(evidence_store, targets, "device"))
        name = targets[0].name
        rule = f"{name} was tuned only on {devices}" if devices else f"{name} was not tuned to the end"
        best = LookupResult(target=targets[0], answer=query.plain_answer(rule), level="none")
    return _with_advice(best, query, here)


def lookup_policy(policy: Policy, query: Query, here: Machine) -> LookupResult:
    """As `lookup`, from one policy; a policy of another kind of device answers with plain decoding.

    Raises InputError: the policy is of another target.
    """
    target = policy.target
    if query.target not in (None, target.name, target.digest, target.run_digest):
        raise InputError(f"target {query.target!r}: the policy is of {target.name!r}, digest {target.digest[:8]}")
    query = _with_temperature(query, policy)
    fit = match(here, drop_unknown(asdict(policy.environment)))
    if fit.level == "none":
        rule = f"{target.name} was tuned only on {policy.environment.device}"
        return _with_advice(LookupResult(target=target, answer=query.plain_answer(rule), level="none"), query, here)
    return _with_advice(_answer(policy, query, fit), query, here)


def _with_temperature(query: Query, policy: Policy) -> Query:
    return query if query.temperature is not None else replace(query, temperature=policy.headline.temperature)


def _answer(policy: Policy, query: Query, fit: Match) -> LookupResult:
    answer = policy.look_up(
        batch_size=query.batch_size,
        context_length=query.context_length,
        domain=query.domain,
        temperature=query.temperature or 0.0,
    )
    if answer.matched and not answer.choice.is_decided:
        answer = replace(answer, matched=False, rule="the run ended before this was decided")
    level: Level = fit.level if answer.matched else "none"
    return LookupResult(target=policy.target, answer=answer, level=level, policy=policy, match=fit)


def _with_advice(result: LookupResult, query: Query, here: Machine) -> LookupResult:
    """Below an exact match: nothing is proven, and the command that would measure the query."""
    if result.level == "exact":
        return result
    choice = replace(result.answer.choice, proven=False)
    result = replace(result, answer=replace(result.answer, choice=choice))
    engine = str(here.get("engine"))
    if query.batch_size > (MAX_REQUESTS if engine in SERVING_ARGUMENTS else MAX_BATCH):
        return result
    return replace(result, advice=measuring_command(result, query, engine))


def measuring_command(result: LookupResult, query: Query, engine: str = ENGINE) -> str:
    """The command line that measures the query on `engine`, with the drafts and the sampling of the policy.

    A policy does not name its prompts: except for builtin:target, they must be given.
    """
    program = ["python", CHECKOUT_SCRIPT] if command() == CHECKOUT_SCRIPT else [command()]
    arguments = [*program, "run", *SERVING_ARGUMENTS.get(engine, ())]
    arguments += ["--target", replace_mark(result.target.name, "PATH/TO/"), "--dtype", result.target.dtype]
    policy, choice = result.policy, result.answer.choice
    if not result.target.name.startswith(BUILTIN):
        for draft in _drafts(policy.choices) if policy is not None else ():
            arguments += ["--draft", replace_mark(draft.name, "PATH/TO/")]
        arguments += ["--prompts", "PROMPTS.jsonl"]
    if policy is not None and policy.headline.temperature == choice.temperature:
        choice = policy.headline  # which has its top-p and top-k too
    values = {
        "--batch-size": query.batch_size if query.batch_size > 1 else None,
        "--context": query.context_length,
        "--temperature": choice.temperature or None,
        "--top-p": choice.top_p if choice.top_p < 1.0 else None,
        "--top-k": choice.top_k or None,
    }
    for option, value in values.items():
        arguments += [] if value is None else [option, f"{value:g}"]
    return shlex.join(arguments)


def _drafts(choices: tuple[Choice, ...]) -> tuple[Draft, ...]:
    """Every draft that the choices name, composites as their components, each once."""
    named = [row for choice in choices for row in (choice, *choice.alternatives, choice.forecast, choice.measured)]
    drafts = [row.setup.draft for row in named if row is not None and row.setup.draft is not None]
    return tuple(dict.fromkeys(component for draft in drafts for component in draft.components))
