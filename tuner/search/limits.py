"""Limits that a setup must keep: memory, time to the first token, time per token of slow requests."""

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
    """A setup over a limit is infeasible, however fast it is; None is no limit.

    Both latencies are 95th percentiles over requests.

    Raises:
        InputError: a limit is not a finite number above 0.
    """

    max_memory_gib: float | None = None
    max_ttft_ms: float | None = None
    max_p95_tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (
            ("max-memory", self.max_memory_gib),
            ("max-ttft", self.max_ttft_ms),
            ("max-p95-tpot", self.max_p95_tpot_ms),
        ):
            if limit is not None and not (limit > 0.0 and math.isfinite(limit)):
                raise InputError(f"{name} {limit:g}: a finite number above 0 is needed")

    def memory_breach(self, setup: Setup, needed_bytes: int | None) -> Infeasible | None:
        """Whether weights and caches exceed the limit; unknown needs (None) do not."""
        if self.max_memory_gib is None or needed_bytes is None or needed_bytes <= self.max_memory_gib * GIB:
            return None
        detail = f"it needs {needed_bytes / GIB:.3g} GiB; the limit is {self.max_memory_gib:.3g} GiB"
        return Infeasible(setup=setup, reason="max-memory", detail=detail)

    def latency_breach(self, setup: Setup, samples: Sequence[Sample]) -> Infeasible | None:
        """Whether real runs exceed a latency limit."""
        ttft_ms = [1e3 * sample.ttft_s for sample in samples]
        tpot_ms = [1e3 * seconds for sample in samples if (seconds := tpot_s(sample)) is not None]
        for reason, subject, values, limit in (
            ("max-ttft", "first token after", ttft_ms, self.max_ttft_ms),
            ("max-p95-tpot", "time per token", tpot_ms, self.max_p95_tpot_ms),
        ):
            tail = float(numpy.percentile(values, TAIL)) if values else 0.0
            if limit is not None and tail > limit:
                figure = f"{subject} {tail:.3g} ms at the 95th percentile of {len(values)} runs"
                return Infeasible(setup=setup, reason=reason, detail=f"{figure}; the limit is {limit:.3g} ms")
        return None
