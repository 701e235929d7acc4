"""Tokens per round by speculation length: from a file, published values of the pair, or a stated rate.

Each forecast has one source, which it names. Lengths for which a source has no value follow from one rate per token by
E = (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from profiles.records.errors import InputError, NotMeasuredError
from tuner.plan.shape import model_key, read_data
from tuner.policy.query import MIXED


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMean:
    """Tokens that a round emits on average, with the range left open, and the shares of rounds by drafted tokens."""

    tokens: float
    low: float
    high: float
    drafted: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Rounds of one draft on one domain, by speculation length, and where that is from."""

    draft: str
    domain: str = MIXED
    kind: Literal["store", "file", "published", "assumed"]
    source: str
    rounds: Mapping[int, RoundMean]


def tokens_per_round(rate: float, length: float) -> float:
    """Mean tokens of a round that drafts `length` tokens, each accepted with probability `rate`."""
    return length + 1.0 if rate >= 1.0 else float((1.0 - rate ** (length + 1.0)) / (1.0 - rate))


def rate_of(tokens: float, length: float) -> float:
    """The rate per token at which rounds of `length` emit `tokens`, 0 to 1; the inverse of `tokens_per_round`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if tokens_per_round(middle, length) < tokens else (low, middle)
    return low


def _rounds(rates: Sequence[float], lengths: Sequence[int]) -> dict[int, RoundMean]:
    """At the median of `rates`, between the 5th and the 95th percentile."""
    low, *_, high = quantiles([*rates, *rates], n=20, method="inclusive")  # of one rate too
    rounds = {}
    for length in lengths:
        tokens = [tokens_per_round(rate, length) for rate in (low, median(rates), high)]
        rounds[length] = RoundMean(low=tokens[0], tokens=tokens[1], high=tokens[2], drafted={length: 1.0})
    return rounds


def assumed(rate: float, draft: str, lengths: Sequence[int]) -> Acceptance:
    """The rate that the user states. Raises InputError."""
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"acceptance {rate:g}: a rate per token is from 0 to 1")
    source = f"assumed: {rate:g} of the drafted tokens are accepted, whatever the text"
    return Acceptance(draft=draft, kind="assumed", source=source, rounds=_rounds([rate], lengths))


def from_file(path: Path, draft: str, lengths: Sequence[int]) -> list[Acceptance]:
    """By domain, from JSON `{draft: value}` or `{draft: {domain: value}}`; a value is a rate or shares by position.

    Shares by position: the share of rounds in which the first, the first two ... drafted tokens were all accepted.
    Raises InputError.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[draft]
        domains = value if isinstance(value, dict) else {MIXED: value}
        rounds = {domain: _file_rounds(each, lengths) for domain, each in domains.items()}
        if not any(rounds.values()):
            raise ValueError(f"{value} has no share for lengths of {min(lengths)} and more")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__} {error}; JSON like {{DRAFT: {{DOMAIN: 0.8}}}} with this draft is needed"
        raise InputError(f"acceptance {str(path)!r} of {draft!r}: {what}") from error
    source = f"file {path.name}"
    return [
        Acceptance(draft=draft, domain=name, kind="file", source=source, rounds=each)
        for name, each in rounds.items()
        if each
    ]


def _file_rounds(value: Any, lengths: Sequence[int]) -> dict[int, RoundMean]:
    shares = [float(each) for each in (value if isinstance(value, list) else [value])]
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(f"{value} is not within 0 to 1")
    if not isinstance(value, list):
        return _rounds(shares, lengths)
    means = {length: 1.0 + sum(shares[:length]) for length in lengths if length <= len(shares)}
    return {
        length: RoundMean(tokens=mean, low=mean, high=mean, drafted={length: 1.0}) for length, mean in means.items()
    }


def published(target: str, draft: str, kind: str, lengths: Sequence[int]) -> Acceptance:
    """Published lengths of the pair; else of drafts of this kind on this target; else on any target.

    Raises NotMeasuredError: nothing is published for this kind of draft.
    """
    of_kind = [row for row in read_data("published") if row["kind"] == kind]
    key = model_key(target)
    same_target = [row for row in of_kind if key is not None and model_key(row["target"]) == key]
    of_pair = [row for row in same_target if _plain_name(row["draft"]) == _plain_name(draft.rpartition("+")[2])]
    nearness = {
        "of this pair": of_pair,
        "of such drafts on this target": same_target,
        "of such drafts elsewhere": of_kind,
    }
    for relation, rows in nearness.items():
        if rows:
            rates = [row.get("rate") or rate_of(row["tokens"], row["k"]) for row in rows]
            spread = f"{min(rates):.2f} to {max(rates):.2f} a token, {len(rows)} values"
            source = f"published {relation}: {spread} ({', '.join(sorted({row['source'] for row in rows}))})"
            return Acceptance(draft=draft, kind="published", source=source, rounds=_rounds(rates, lengths))
    raise NotMeasuredError(f"acceptance of {draft}: none is published for this kind; state one, like --acceptance 0.7")


def _plain_name(name: str) -> str:
    return model_key(name) or name.rpartition("/")[2].lower()
