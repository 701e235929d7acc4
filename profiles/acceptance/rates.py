"""Acceptance and time per token, derived from counts of rounds and from samples."""

from collections.abc import Mapping

from profiles.records.evidence import RoundCount, Sample


def acceptance_rate(rounds: Mapping[RoundCount, float]) -> float | None:
    """Accepted / drafted tokens; None when nothing was drafted."""
    drafted = sum(proposed * count for (proposed, _), count in rounds.items())
    return _accepted(rounds) / drafted if drafted else None


def acceptance_length(rounds: Mapping[RoundCount, float]) -> float | None:
    """1 + accepted / rounds, the bonus token included; None when there was no round."""
    num_rounds = sum(rounds.values())
    return 1.0 + _accepted(rounds) / num_rounds if num_rounds else None


def _accepted(rounds: Mapping[RoundCount, float]) -> float:
    return sum(accepted * count for (_, accepted), count in rounds.items())


def acceptance_by_position(rounds: Mapping[RoundCount, float]) -> list[tuple[int, float, float]]:
    """(position from 1, rounds that proposed that far, share of those that accepted that far)."""
    rows = []
    for position in range(1, max((proposed for proposed, _ in rounds), default=0) + 1):
        reached = sum(count for (proposed, _), count in rounds.items() if proposed >= position)
        accepted = sum(count for (_, accepted), count in rounds.items() if accepted >= position)
        rows.append((position, reached, accepted / reached))
    return rows


def tpot_s(sample: Sample) -> float | None:
    """(end - first token) / (tokens - 1) in seconds; None for a run of one token."""
    return sample.decode_s / (sample.output_tokens - 1) if sample.output_tokens > 1 else None
