"""What a policy can be asked, and when a measured temperature answers."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from profiles.records.core import GREEDY_BELOW
from profiles.records.errors import InputError

MIXED = "mixed"  # the domain of a choice made over the prompts of all domains
TEMPERATURE_TOLERANCE = 1e-6


class OperatingPoint(NamedTuple):
    """What a choice was measured at."""

    batch_size: int
    context_length: int
    domain: str
    temperature: float


def check_query(batch_size: int, context_length: int | None, temperature: float) -> None:
    """Raises InputError for an impossible batch size, context (None: not known) or temperature."""
    if not (isinstance(batch_size, int) and batch_size >= 1):
        raise InputError(f"batch size {batch_size!r}: whole numbers from 1 are allowed")
    if context_length is not None and not (isinstance(context_length, int) and context_length >= 1):
        raise InputError(f"context {context_length!r}: whole numbers from 1 are allowed")
    if not (math.isfinite(temperature) and 0.0 <= temperature <= 10.0):
        raise InputError(f"temperature {temperature}: allowed are 0 (greedy) to 10")


def match_temperature(measured: Iterable[float], temperature: float) -> float | None:
    """The measured temperature that equals the given one within the tolerance, or None; the lowest count as greedy."""
    temperature = temperature if temperature >= GREEDY_BELOW else 0.0
    return next((value for value in sorted(measured) if abs(value - temperature) <= TEMPERATURE_TOLERANCE), None)
