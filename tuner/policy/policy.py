"""What was decided for a target on a machine: one choice per operating point, the look-up rule, the JSON form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from profiles.records import codec
from profiles.records.core import PLAIN, Environment, Model, Setup
from profiles.records.errors import InputError, PolicyError, require
from profiles.records.files import write_atomically
from tuner.policy.estimates import Forecast, Measured
from tuner.policy.prior import Prior
from tuner.policy.query import MIXED, OperatingPoint, check_query, match_temperature

# 2 added alternatives and the machine's device figures, 3 the prior, 4 `out_of_time` and the names below; all are read
POLICY_VERSION = 4
MIN_DOMAIN_PROMPTS = 24  # from which on a domain has choices of its own
MEASURED_NAMES = {"num_partings": "num_divergences"}  # key of versions 1 to 3 -> key of version 4
_PRIOR_NAMES = {"kept": "acceptance", "times": "round_times"}
_PRIOR_NAMES |= {"hit": "propose_prob", "keep": "accept_probs", "per_round": "mean_tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The setup for one operating point, and why.

    `evidence` holds ids of stored evidence. Beside plain decoding, `forecast` and `measured` are those of the setup
    that failed to beat it. `proven`: paired runs showed a win. `alternatives`: for every draft that is forecast to beat
    plain decoding its best length, the best draft first; for an engine that cannot run the chosen setup. `out_of_time`:
    the run's budget ended before this point was decided, so it answers no look-up.

    Raises:
        InputError: a value is not allowed, or `proven` without a draft and its own `measured`.
    """

    batch_size: int
    context_length: int
    domain: str
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    setup: Setup
    reason: str
    evidence: tuple[str, ...] = ()
    forecast: Forecast | None = None
    measured: Measured | None = None
    proven: bool = False
    alternatives: tuple[Forecast, ...] = ()
    out_of_time: bool = False

    def __post_init__(self) -> None:
        check_query(self.batch_size, self.context_length, self.temperature)
        require(0.0 < self.top_p <= 1.0, f"top-p {self.top_p}: allowed are fractions above 0, up to 1")
        require(self.top_k >= 0, f"top-k {self.top_k}: allowed are 0 (off) and up")
        require(bool(self.domain), f"a choice without a domain: name one, or {MIXED!r} for all")
        require(bool(self.reason), "a choice without a reason: one sentence is needed")
        if self.proven:
            require(
                isinstance(self.figures, Measured),
                f"setup {self.setup.name!r} is called proven: only a drafting setup with its own measurement can be",
            )

    @property
    def point(self) -> OperatingPoint:
        """What the choice is for; a policy has one choice for each."""
        return OperatingPoint(self.batch_size, self.context_length, self.domain, self.temperature)

    @property
    def filtered_point(self) -> tuple[OperatingPoint, float, int]:
        """The point, and the top-p and top-k that its temperature was measured with."""
        return self.point, self.top_p, self.top_k

    @property
    def figures(self) -> Measured | Forecast | None:
        """Of the chosen setup itself: measured, else forecast; None for plain decoding."""
        rows = (self.measured, self.forecast) if self.setup.draft is not None else ()
        return next((row for row in rows if row is not None and row.setup == self.setup), None)

    @property
    def is_decided(self) -> bool:
        """Whether anything was measured or forecast for it before the run's budget ended."""
        has_figures = self.measured is not None or self.forecast is not None or bool(self.evidence)
        return has_figures and not self.out_of_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a policy says: `matched` is False where it falls back to plain decoding; `rule` says how it was found."""

    choice: Choice
    matched: bool
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The choices for a target in an environment, one per operating point.

    `created` is ISO 8601 in UTC. `prior`: what a selector starts from; None in policies of versions 1 and 2 and where
    no draft was forecast. All choices of one temperature share top-p and top-k, so that a query need not name them.

    Raises:
        InputError: two choices for one point, none over all domains, or another value not allowed.
    """

    version: int = POLICY_VERSION
    created: str
    target: Model
    environment: Environment
    choices: tuple[Choice, ...]
    prior: Prior | None = None

    def __post_init__(self) -> None:
        require(self.version == POLICY_VERSION, f"version {self.version}: this draftpick reads {POLICY_VERSION}")
        require(_is_utc(self.created), f"created {self.created!r}: a UTC time like 2026-01-31T12:00:00+00:00 is needed")
        require(any(choice.domain == MIXED for choice in self.choices), f"no choice of domain {MIXED!r}")
        points: set[OperatingPoint] = set()
        filters: dict[float, tuple[float, int]] = {}
        for choice in self.choices:
            point, *filter_ = choice.filtered_point
            require(point not in points, f"two choices for (batch, context, domain, temperature) = {tuple(point)}")
            points.add(point)
            shared = filters.setdefault(choice.temperature, (choice.top_p, choice.top_k))
            require(
                tuple(filter_) == shared,
                f"temperature {choice.temperature:g} with (top-p, top-k) = {tuple(filter_)} and {shared}",
            )

    @property
    def file_name(self) -> str:
        """The file a store keeps it in: one per target as it is run and machine, replaced by a later policy."""
        return f"policy-{self.target.run_digest[:12]}-{self.environment.digest[:8]}.json"

    @property
    def router_name(self) -> str:
        """The file of the router that was made with it (`tuner.router`)."""
        return self.file_name.removesuffix(".json") + ".router.json"

    @property
    def headline(self) -> Choice:
        """The choice over all domains at the first batch and context."""
        return next(choice for choice in self.choices if choice.domain == MIXED)

    @property
    def crossover_batch(self) -> int | None:
        """Of the headline's temperature; see `crossover_of`."""
        return crossover_of([row for row in self.choices if row.temperature == self.headline.temperature])

    def look_up(
        self,
        *,
        batch_size: int = 1,
        context_length: int | None = None,
        domain: str | None = None,
        temperature: float = 0.0,
    ) -> Answer:
        """The choice that holds for a request, or plain decoding where nothing measured covers it.

        1. The temperature (with the top-p and top-k it was measured with) must equal a measured one within 1e-6.
        2. The domain's own choices are asked first, then those over all domains (`domain` None: only these).
        3. Of them, the smallest measured batch at least as large as asked, because drafting pays less in a larger
           batch; at that batch, the shortest measured context at least as long as asked. Beyond the largest: plain.
           Between two measured contexts the answer is not `proven`: it may be another there.
        4. `context_length` None (not known) takes the longest measured context: acceptance falls with length.

        Raises:
            InputError: a value no measurement could have.
        """
        check_query(batch_size, context_length, temperature)
        measured = match_temperature({choice.temperature for choice in self.choices}, temperature)
        rows = [row for row in self.choices if row.temperature == measured]
        for source in dict.fromkeys((domain or MIXED, MIXED)):
            decided = [row for row in rows if row.domain == source and not row.out_of_time]
            choice = _covering(decided, batch_size, context_length)
            if choice is not None:
                rule = f"measured on {source} prompts at batch {choice.batch_size}, context {choice.context_length}"
                same_batch = [row.context_length for row in decided if row.batch_size == choice.batch_size]
                if context_length is not None and min(same_batch) < context_length < choice.context_length:
                    shorter = max(length for length in same_batch if length < context_length)
                    rule += f"; context {context_length} lies between it and {shorter}, so nothing is proven"
                    choice = replace(choice, proven=False)
                return Answer(choice=choice, matched=True, rule=rule)
        if measured is None:
            temperatures = ", ".join(f"{value:g}" for value in sorted({choice.temperature for choice in self.choices}))
            rule = f"temperature {temperature:g} was not measured, only {temperatures}"
        else:
            rows = [row for row in rows if row.domain in (domain, MIXED)]
            rule = _why_uncovered(rows, batch_size, context_length)
            rule = rule or f"domain {domain or MIXED!r} was not measured at temperature {measured:g}"
        context_length = context_length or self.headline.context_length
        return plain_answer((batch_size, context_length), domain, temperature, rule)


def plain_answer(shape: tuple[int, int], domain: str | None, temperature: float, rule: str) -> Answer:
    """Plain decoding at (batch, context), because nothing that was measured covers the query, as `rule` says."""
    choice = Choice(
        batch_size=shape[0],
        context_length=shape[1],
        domain=domain or MIXED,
        temperature=temperature,
        setup=PLAIN,
        reason=f"Plain decoding, because {rule}.",
    )
    return Answer(choice=choice, matched=False, rule=rule)


def crossover_of(choices: Sequence[Choice]) -> int | None:
    """The smallest measured batch from which on plain decoding is the choice over all domains.

    None: a draft still wins at the largest, or nothing was decided there. With several contexts, plain decoding is the
    choice at all of them.
    """
    rows = [row for row in choices if row.domain == MIXED and row.is_decided]
    drafted = max((row.batch_size for row in rows if row.setup != PLAIN), default=0)
    return min((row.batch_size for row in rows if row.batch_size > drafted), default=None)


def _covering(rows: list[Choice], batch_size: int, context_length: int | None) -> Choice | None:
    """Smallest batch, then shortest context, that is at least what was asked; context None: the longest of them."""
    rows = [row for row in rows if row.batch_size >= batch_size]
    if context_length is None:
        context_length = max((row.context_length for row in rows), default=0)
    rows = [row for row in rows if row.context_length >= context_length]
    return min(rows, key=lambda row: (row.batch_size, row.context_length), default=None)


def _why_uncovered(rows: list[Choice], batch_size: int, context_length: int | None) -> str:
    """Why none of the rows answers; empty when there are none."""
    if not rows:
        return ""
    undecided = _covering(rows, batch_size, context_length)
    if undecided is not None:
        at = f"{undecided.domain} prompts at batch {undecided.batch_size}, context {undecided.context_length}"
        return f"the run's budget ended before {at} were decided"
    largest = max(row.batch_size for row in rows)
    if batch_size > largest:
        return f"batch size {batch_size} is beyond the largest measured, {largest}"
    longest = max(row.context_length for row in rows if row.batch_size >= batch_size)
    return f"context {context_length} is beyond the longest measured at this batch size, {longest}"


def _is_utc(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def read(path: str | Path) -> Policy:
    """The policy in a file. Raises PolicyError, naming the file, when it cannot be read or is not valid."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"policy file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # PolicyError is one; bytes that are no UTF-8 are another
        raise PolicyError(f"policy file {path}: {error}") from error


def write(path: str | Path, policy: Policy) -> None:
    """Replaces the file in one step: a reader sees the old policy or the new one. Raises PolicyError."""
    try:
        write_atomically(Path(path), to_json(policy).encode())
    except OSError as error:
        raise PolicyError(f"policy file {path} cannot be written: {error.strerror}") from error


def to_json(policy: Policy) -> str:
    """Compact JSON with every field in the order of its record; ends with a newline. Raises PolicyError."""
    try:
        return codec.to_json(policy) + "\n"
    except InputError as error:
        raise PolicyError(str(error)) from error


def from_json(text: str) -> Policy:
    """The policy in `text`, of version 1 to 4. Raises PolicyError, naming the field and why it is wrong."""
    try:
        raw = codec.parse_json(text, "policy")
        if isinstance(raw, dict) and raw.get("version") in (1, 2, 3):
            raw = rename_keys(raw, {**MEASURED_NAMES, **_PRIOR_NAMES})
        return codec.from_builtins(Policy, raw, "policy", newest_version=POLICY_VERSION)
    except InputError as error:
        raise PolicyError(str(error)) from error


def rename_keys(raw: Any, names: Mapping[str, str | None]) -> Any:
    """A JSON value whose keys have their new names; a key whose name is None is dropped."""
    if isinstance(raw, dict):
        renamed = {names.get(key, key): rename_keys(value, names) for key, value in raw.items()}
        return {key: value for key, value in renamed.items() if key is not None}
    return [rename_keys(value, names) for value in raw] if isinstance(raw, list) else raw
