"""What a setup must not cost: memory, time to the first token, time per token of the slow requests.

A setup that breaks a limit is infeasible, with the figure, however fast it is. Arithmetic on records; where the
figures come from, and what happens to an infeasible setup, it must not know.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from profiles.acceptance.rates import tpot_s
from profiles.models.footprint import GIB
from profiles.records.core import Setup
from profiles.records.errors import InputError
from profiles.records.evidence import Infeasible, Sample

TAIL = 95.0  # the percentile over requests that latency limits hold for


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Most GiB, milliseconds to the first token and milliseconds per output token; None is no limit.

    Both latencies are 95th percentiles over requests. Raises InputError when a limit is not a finite number above 0.
    """

    max_memory_gib: float | None = None
    max_ttft_ms: float | None = None
    max_p95_tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("max-memory", self.max_memory_gib),
            ("max-ttft", self.max_ttft_ms),
            ("max-p95-tpot", self.max_p95_tpot_ms),
        ):
            if value is not None and not (value > 0.0 and math.isfinite(value)):
                raise InputError(f"{name} {value:g}: a finite number above 0 is needed")

    def memory_breach(self, setup: Setup, needed_bytes: int | None) -> Infeasible | None:
        """Whether weights and caches pass the limit; None of bytes is not known, and breaks nothing."""
        if self.max_memory_gib is None or needed_bytes is None or needed_bytes <= self.max_memory_gib * GIB:
            return None
        figure = f"it needs {needed_bytes / GIB:.3g} GiB; the limit is {self.max_memory_gib:.3g} GiB"
        return Infeasible(setup=setup, reason="max-memory", detail=figure)

    def latency_breach(self, setup: Setup, samples: Sequence[Sample]) -> Infeasible | None:
        """Whether real runs pass a latency limit."""
        waits = [1e3 * sample.ttft_s for sample in samples]
        paces = [1e3 * pace for sample in samples if (pace := tpot_s(sample)) is not None]
        for name, words, values, most in (
            ("max-ttft", "first token after", waits, self.max_ttft_ms),
            ("max-p95-tpot", "time per token", paces, self.max_p95_tpot_ms),
        ):
            tail = float(numpy.percentile(values, TAIL)) if values else 0.0
            if most is not None and tail > most:
                figure = f"{words} {tail:.3g} ms at the 95th percentile of {len(values)} runs"
                return Infeasible(setup=setup, reason=name, detail=f"{figure}; the limit is {most:.3g} ms")
        return None
