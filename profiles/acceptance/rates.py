"""Split from profiles.stats."""

from collections.abc import Mapping

from profiles.records.evidence import RoundCount, Sample


def acceptance_rate(rounds: Mapping[RoundCount, float]) -> float | None:
    """Accepted / drafted tokens; None when nothing was drafted."""
    drafted = sum(proposed * count for (proposed, _), count in rounds.items())
    accepted = sum(kept * count for (_, kept), count in rounds.items())
    return accepted / drafted if drafted else None


def acceptance_length(rounds: Mapping[RoundCount, float]) -> float | None:
    """1 + accepted / rounds, the target token included; None when there was no round."""
    num_rounds = sum(rounds.values())
    accepted = sum(kept * count for (_, kept), count in rounds.items())
    return 1.0 + accepted / num_rounds if num_rounds else None


def tested_acceptance(rounds: Mapping[RoundCount, float]) -> float | None:
    """Alpha: accepted / (accepted + rejected), where a round rejects at most one token; None when none was tested."""
    accepted = sum(kept * count for (_, kept), count in rounds.items())
    rejected = sum(count for (proposed, kept), count in rounds.items() if kept < proposed)
    return accepted / (accepted + rejected) if accepted + rejected else None


def acceptance_by_position(rounds: Mapping[RoundCount, float]) -> list[tuple[int, float, float]]:
    """(position from 1, rounds that proposed that far, share of those that kept that far)."""
    longest = max((proposed for proposed, _ in rounds), default=0)
    rows = []
    for position in range(1, longest + 1):
        tried = sum(count for (proposed, _), count in rounds.items() if proposed >= position)
        kept = sum(count for (_, accepted), count in rounds.items() if accepted >= position)
        rows.append((position, tried, kept / tried))
    return rows


def tpot_s(sample: Sample) -> float | None:
    """(end - first token) / (tokens - 1) in seconds; None for a run of one token."""
    return sample.decode_s / (sample.output_tokens - 1) if sample.output_tokens > 1 else None
