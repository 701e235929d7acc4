"""What a policy can be asked, and which of its measured points covers the question.

Shared by the policy's own look-up and by the selector, which must load next to nothing: no record is known here.
"""

from __future__ import annotations

import math

from profiles.records.errors import InputError

TYPE_CHECKING = False  # that of `typing`, which is not worth its import in serving code
if TYPE_CHECKING:
    from collections.abc import Iterable

MIXED = "mixed"  # the domain of a choice made over the prompts of all domains
TEMPERATURE_TOLERANCE = 1e-6
Point = tuple[int, int, str, float]  # batch size, context length, domain, temperature that were measured together


def check_asked(batch_size: int, context_length: int | None, temperature: float) -> None:
    """Raises InputError when a batch, a context (None: not known) or a temperature is impossible."""
    if not (isinstance(batch_size, int) and batch_size >= 1):
        raise InputError(f"batch size {batch_size!r}: whole numbers from 1 are allowed")
    if context_length is not None and not (isinstance(context_length, int) and context_length >= 1):
        raise InputError(f"context {context_length!r}: whole numbers from 1 are allowed")
    if not (math.isfinite(temperature) and 0.0 <= temperature <= 10.0):
        raise InputError(f"temperature {temperature}: allowed are 0 (greedy) to 10")


def match_temperature(measured: Iterable[float], asked: float) -> float | None:
    """The measured temperature that equals the asked one within the tolerance, or None."""
    return next((one for one in sorted(measured) if abs(one - asked) <= TEMPERATURE_TOLERANCE), None)
