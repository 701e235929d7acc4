"""The sweep of step times ends, also where every step takes long, and says how far it is."""

import itertools
import logging

import pytest

from profiles.engines.torch.step_times import CYCLES, MIN_CYCLES, time_steps
from profiles.timing.clock import Clock
from tests.support.toys import TableModel


@pytest.mark.parametrize(
    ("reading_s", "least", "most"), [(0.1, CYCLES, CYCLES), (1.0, 10, 20), (20.0, MIN_CYCLES, MIN_CYCLES)]
)
def test_a_long_sweep_has_fewer_cycles(
    reading_s: float, least: int, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a busy program it took 14 minutes instead of 80 s, without a line; two minutes are enough for medians."""
    readings = itertools.count()
    clock = Clock("cpu", now=lambda: reading_s * next(readings))
    with caplog.at_level(logging.INFO, logger="profiles"):
        times = time_steps(
            {"t": TableModel(seed=1, vocabulary=100).rows(1)}, clock, target="t", context_length=8, max_length=2
        )
    assert all(least <= len(samples) <= most for samples in times["t"].samples_s.values())
    lines = [record.getMessage() for record in caplog.records]
    assert bool(lines) == (reading_s > 0.1)
    assert all(line.startswith("step times: cycle ") and line.endswith(" s left") for line in lines)
