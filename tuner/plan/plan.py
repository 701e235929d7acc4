"""A plan: what every draft, length and batch would gain on hardware that is not at hand.

speed-up = tokens per round / (seconds of a round / seconds of a plain step). A plan measures and proves nothing.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.records.draft_spec import DraftSpec, parse_draft
from profiles.records.errors import InputError, NotMeasuredError
from tuner.plan import acceptance
from tuner.plan.acceptance import Acceptance, RoundMean, rate_of, tokens_per_round
from tuner.plan.shape import Shape, head_shape, read_data, read_shape
from tuner.plan.step_time import RoundParts, StepModel, read_engine, read_hardware

if TYPE_CHECKING:
    from store.evidence_store import EvidenceStore
    from tuner.plan.stored import MeasuredTimes

MOST_BATCH = 1024
_MEASURED_HALF_WIDTH = 0.2  # of log speed-up: rounds cost more than their steps, which only `run` calibrates
_HALF_RATE = 0.1  # that a stated acceptance rate leaves open
_UNCERTAIN = {"rows": 0.4, "draft": 0.4, "host": 0.6, "plain": 0.15}  # relative, of parts that the model estimates


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDraft:
    """A draft and what its steps read. `shape` None: drafting takes no step; `passes` a round, None: one a token."""

    spec: DraftSpec
    shape: Shape | None
    passes: float | None = None

    @property
    def kind(self) -> str:
        """As published tables call it: model, ngram, mtp, eagle3 ..."""
        method = self.spec.method or self.spec.kind
        return next((kind for kind in ("mtp", "eagle3", "dflash", "eagle") if kind in method), method)


def planned_draft(spec: DraftSpec, target: Shape, format_name: str | None) -> PlannedDraft:
    """What a draft costs. Raises ModelError, and InputError for a composite."""
    if spec.kind == "composite":
        raise InputError(f"draft {spec.name!r}: a plan takes its parts singly, the look-up and the model")
    if (spec.method or spec.kind).startswith(("ngram", "suffix")):
        return PlannedDraft(spec=spec, shape=None)
    if spec.num_layers is not None:
        return PlannedDraft(spec=spec, shape=target.first_layers(min(spec.num_layers, target.layers)))
    passes = 1.0 if "flash" in (spec.method or "") else None
    if spec.method is not None and not Path(spec.path or "").is_absolute():  # no file here, or none needed
        shape = head_shape(target, spec.method)
    else:
        shape = read_shape(str(spec.path), format_name)
    return PlannedDraft(spec=spec, shape=shape, passes=passes)


def features(parts: RoundParts, tree: bool = False) -> list[float]:
    """What the residual weighs: shares of a round's time beyond one row, of drafting, of the host; and a tree."""
    return [parts.rows / parts.total, parts.draft / parts.total, parts.host / parts.total, float(tree)]


def corrected_cost(parts: RoundParts, coefficients: Sequence[float], tree: bool = False) -> float:
    """Plain steps per round, corrected by the residual of published rows."""
    return parts.cost * math.exp(sum(map(math.prod, zip(coefficients, features(parts, tree), strict=True))))


def log_scale(cost: float) -> float:
    """What log errors grow with: the share of a round that is no plain step."""
    return 0.15 + max(0.0, 1.0 - 1.0 / cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSetup:
    """A setup at a batch: speed-up with a 90 % interval, and what it rests on.

    Attributes:
        cost: Seconds of a round in plain steps.
        basis: `model`, or `measured` where the store has the step times.
        break_even: Rate per token at which the setup equals plain decoding; None: no rate does.
    """

    draft: str
    k: int
    batch_size: int
    domain: str
    speedup: float
    low: float
    high: float
    tok_per_s: float
    plain_tok_per_s: float
    tokens_per_round: float
    cost: float
    basis: str
    acceptance: str
    break_even: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanQuery:
    """What is planned; `acceptance`: `store`, `published`, a file, a rate, or that of each draft; no store is None."""

    target: str
    drafts: Sequence[str]
    hardware: str
    engine: str
    dtype: str | None = None
    batch_sizes: Sequence[int] = (1,)
    context: int = 1024
    lengths: Sequence[int] = tuple(range(1, 9))
    acceptance: str | Sequence[Acceptance] = "published"
    evidence_store: "EvidenceStore | None" = None


class Planner:
    """Forecasts of one query's target, hardware and engine. Raises InputError, also where the target does not fit."""

    def __init__(self, query: PlanQuery) -> None:
        hardware = read_hardware(query.hardware)
        self.query = query
        self.steps = StepModel(hardware=hardware, engine=read_engine(query.engine, hardware))
        self.target = read_shape(query.target, query.dtype)
        self.residual: Mapping[str, Any] = read_data("residual")
        if not 1 <= query.context <= 10_000_000 or not all(1 <= batch <= MOST_BATCH for batch in query.batch_sizes):
            sizes = ", ".join(map(str, query.batch_sizes))
            raise InputError(
                f"batch sizes {sizes}, context {query.context}: 1 to {MOST_BATCH} and 1 to 10000000 are allowed"
            )
        self.measured: Mapping[int, MeasuredTimes] = {}
        engine = self.steps.engine
        # engines are measured on one device, or with layers on several, which take turns
        if query.evidence_store is not None and (hardware.count == 1 or engine.parallel == "layers"):
            from tuner.plan import stored

            self.measured = stored.step_times(
                query.evidence_store, query.target, self.target.format, hardware.name, engine.name
            )
        self.check_memory(self.target)

    def needed_bytes(self, batch: int, *shapes: Shape) -> float:
        """Of weights and 16-bit caches."""
        return sum(shape.weight_bytes + batch * self.query.context * shape.cache * 2.0 for shape in shapes)

    def check_memory(self, *shapes: Shape) -> None:
        """Raises InputError: the models do not fit with the largest batch."""
        hardware, batch = self.steps.hardware, max(self.query.batch_sizes)
        needed, available = self.needed_bytes(batch, *shapes), hardware.memory * hardware.count
        if needed > available:
            names = " and ".join(f"{shape.name} in {shape.format}" for shape in shapes)
            raise InputError(
                f"hardware {hardware.name}x{hardware.count}: {names} and {batch} x {self.query.context} cached tokens "
                f"need {needed / 1e9:.0f} GB of {available / 1e9:.0f}; take more devices or a smaller dtype"
            )

    def accepted(self, draft: PlannedDraft) -> Sequence[Acceptance]:
        """By domain, from the one source of the query. Raises InputError, NotMeasuredError, StoreError."""
        query, name = self.query, draft.spec.name
        if not isinstance(query.acceptance, str):
            return [row for row in query.acceptance if row.draft == name]
        if query.acceptance == "store":
            from tuner.plan import stored

            if query.evidence_store is None:
                raise NotMeasuredError("acceptance 'store': name one with --store, or state a rate like 0.7")
            return stored.acceptance(query.evidence_store, query.target, name, query.lengths)
        if query.acceptance == "published":
            return [acceptance.published(query.target, name, draft.kind, query.lengths)]
        if re.fullmatch(r"\d*\.?\d+", query.acceptance):
            return [acceptance.assumed(float(query.acceptance), name, query.lengths)]
        return acceptance.from_file(Path(query.acceptance), name, query.lengths)

    def parts(self, draft: PlannedDraft, drafted: int, batch: int) -> RoundParts:
        """Of a round that drafts this many tokens; a model that drafts none takes no step."""
        shape, context = draft.shape, self.query.context
        return self.steps.round(self.target, shape, k=drafted, batch=batch, context=context, passes=draft.passes)

    def setup(self, draft: PlannedDraft, accepted: Acceptance, k: int, batch: int) -> PlannedSetup:
        """The forecast of one setup; measured step times win over the model."""
        mean = accepted.rounds[k]
        rounds = [(share, self.parts(draft, drafted, batch)) for drafted, share in mean.drafted.items()]
        cost = sum(share * corrected_cost(parts, self.residual["coefficients"]) for share, parts in rounds)
        plain_s, basis = rounds[0][1].plain, "model"
        half = self.residual["log_half_width"] * log_scale(cost)
        if measured := self.measured.get(batch):
            plain_s = measured.seconds["target"][1]
            seconds = [measured.round_s(draft.spec.name, drafted, draft.shape is not None) for drafted in mean.drafted]
            if None not in seconds:
                cost = math.fsum(map(math.prod, zip(seconds, mean.drafted.values(), strict=True))) / plain_s  # type: ignore[arg-type]
                half, basis = _MEASURED_HALF_WIDTH, "measured"
        return PlannedSetup(
            draft=draft.spec.name,
            k=k,
            batch_size=batch,
            domain=accepted.domain,
            speedup=mean.tokens / cost,
            low=mean.low / cost * math.exp(-half),
            high=mean.high / cost * math.exp(half),
            tok_per_s=batch / plain_s * mean.tokens / cost,
            plain_tok_per_s=batch / plain_s,
            tokens_per_round=mean.tokens,
            cost=cost,
            basis=basis,
            acceptance=accepted.kind,
            break_even=rate_of(cost, k) if 1.0 <= cost <= k + 1.0 else None,
        )

    def crossover(self, draft: PlannedDraft, accepted: Acceptance) -> tuple[int | None, int]:
        """The smallest batch, of powers of two, at which no length gains, if any; and the largest that was tried."""
        batch, memory = 1, self.steps.hardware.memory * self.steps.hardware.count
        while self.needed_bytes(batch, self.target) <= memory and batch <= MOST_BATCH:
            if all(self.setup(draft, accepted, k, batch).speedup <= 1.0 for k in accepted.rounds):
                return batch, batch
            batch *= 2
        return None, batch // 2

    def choice(self, rows: "Sequence[Planned]") -> dict[str, Any]:
        """The choice of one batch and domain, why, where its draft stops paying, and what would narrow it most."""
        best, draft, accepted = max(rows, key=lambda row: row[0].speedup)
        gains = best.speedup > 1.0
        crossover, tried = self.crossover(draft, accepted)
        return {
            "batch_size": best.batch_size,
            "domain": best.domain,
            "draft": best.draft if gains else None,
            "k": best.k if gains else 0,
            "reason": reason(best),
            "crossover_batch": crossover,
            "largest_batch_tried": tried,
            "narrow": narrowing(self.parts(draft, best.k, best.batch_size), best, accepted.rounds[best.k]),
        }

    def rests_on(self, accepted: Collection[Acceptance]) -> list[str]:
        """Where every figure is from, one line each."""
        hardware, residual = self.steps.hardware, self.residual
        times = [
            f"step times of batch {batch}: measured on {times.device}, context {times.context}; they win over the model"
            for batch, times in self.measured.items()
        ]
        model = (
            f"other step times: a model of {hardware.name} ({hardware.source}), {self.steps.engine.name}; corrected by "
            f"{residual['num_rows']} published speed-ups of {residual['num_sources']} sources; intervals cover 90 % of "
            "left-out rows, every source weighing the same: no guarantee for another source"
        )
        return [*dict.fromkeys(f"acceptance of {row.draft}: {row.source}" for row in accepted), *times, model]


Planned = tuple[PlannedSetup, PlannedDraft, Acceptance]


def make_plan(query: PlanQuery) -> dict[str, Any]:
    """The plan as JSON values.

    Raises:
        InputError: Also ModelError; a value that is not allowed, or a target that does not fit.
        NotMeasuredError: No draft can be planned.
    """
    planner = Planner(query)
    plans, left_out = [], []
    for text in query.drafts:
        name, at, format_name = text.rpartition("@")
        if not at or "/" in format_name:  # of a path
            name, format_name = text, ""
        try:
            draft = planned_draft(parse_draft(name), planner.target, format_name or query.dtype)
            if draft.shape is not None and draft.spec.path is not None:
                planner.check_memory(planner.target, draft.shape)
            plans += [(draft, accepted) for accepted in planner.accepted(draft)]
        except (InputError, NotMeasuredError) as error:
            if len(query.drafts) == 1:
                raise
            left_out.append({"draft": text, "reason": str(error)})
    if not plans:
        raise NotMeasuredError(f"drafts {', '.join(query.drafts)}: none can be planned; {left_out[0]['reason']}")
    points: dict[tuple[int, str], list[Planned]] = {}
    for batch in query.batch_sizes:
        for draft, accepted in plans:
            rows = [(planner.setup(draft, accepted, k, batch), draft, accepted) for k in accepted.rounds]
            points.setdefault((batch, accepted.domain), []).extend(rows)
    target, hardware, engine = planner.target, planner.steps.hardware, planner.steps.engine
    return {
        "status": "planned",
        "target": {"name": target.name, "format": target.format, "weight_bytes": round(target.weight_bytes)},
        "hardware": {"name": hardware.name, "count": hardware.count, "source": hardware.source},
        "engine": {"name": engine.name, "source": engine.source, "default_k": engine.default_k},
        "context": query.context,
        "rests_on": planner.rests_on([accepted for _, accepted in plans]),
        "left_out": left_out,
        "choices": [planner.choice(rows) for rows in points.values()],
        "setups": [_rounded(setup) for rows in points.values() for setup, _, _ in rows],
    }


def _rounded(setup: PlannedSetup) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(setup).items()}


def reason(best: PlannedSetup) -> str:
    """One sentence on a choice, `best` being the fastest setup with a draft."""
    name = f"{best.draft} k={best.k}"
    if best.speedup > 1.0:
        certain = (
            "its whole interval is a gain" if best.low > 1.0 else "its interval includes a loss: measure before use"
        )
        return f"{name}: {best.speedup:.2f}x [{best.low:.2f}, {best.high:.2f}], {certain}"
    needed = "no acceptance rate" if best.break_even is None else f"only an acceptance rate over {best.break_even:.2f}"
    return (
        f"plain decoding: the best draft, {name}, gives {best.speedup:.2f}x; a round costs {best.cost:.2f} plain steps "
        f"and emits {best.tokens_per_round:.2f} tokens; {needed} would gain"
    )


def narrowing(parts: RoundParts, best: PlannedSetup, mean: RoundMean) -> list[dict[str, Any]]:
    """The three figures that would narrow the interval most, and the relative range that each leaves open."""
    low, high, total = mean.low, mean.high, parts.total
    if best.acceptance == "assumed":
        rate = rate_of(mean.tokens, best.k)
        low = tokens_per_round(max(0.0, rate - _HALF_RATE), best.k)
        high = tokens_per_round(min(1.0, rate + _HALF_RATE), best.k)
    ranges = {f"tokens per round of {best.draft} on your prompts, now {mean.tokens:.2f}": math.log(high / low)}
    if best.basis == "model":
        shares = {
            "rows": (f"a target step over {best.k + 1} tokens a sequence", parts.verify, parts.rows / total),
            "draft": (f"drafting {best.k} tokens", parts.draft, parts.draft / total),
            "host": ("a round beside its steps", parts.host, parts.host / total),
            "plain": ("a plain step", parts.plain, 1.0),
        }
        for part, (name, seconds, share) in shares.items():
            ranges[f"ms of {name}, now {seconds * 1e3:.3g}"] = 2.0 * _UNCERTAIN[part] * share
    widest = sorted(ranges.items(), key=lambda item: -item[1])[:3]
    return [{"figure": figure, "open": round(width, 3)} for figure, width in widest if width > 0.0]
