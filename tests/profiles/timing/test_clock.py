"""What disturbs a timing on a CPU and on the host of a GPU."""

import functools
import logging
import os
import sys
from collections.abc import Iterator

import psutil
import pytest

from profiles.timing import clock
from profiles.timing.clock import Disturbance, Patience, max_other_cores, quietest


@pytest.mark.parametrize(
    ("devices", "cores", "allowed"), [((), 128, 0.35), (("cuda:0",), 128, 32.0), (("cuda:0",), 1, 0.35)]
)
def test_emulated_hosts_of_gpus_are_seldom_idle(
    devices: tuple[str, ...], cores: int, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of a GPU host's cores may be busy; a CPU's timing shares its cores with nobody."""
    monkeypatch.setattr(psutil, "cpu_count", lambda: cores)
    assert max_other_cores(devices) == allowed
    for used, disturbed in ((allowed - 0.1, False), (allowed + 0.1, True)):
        clock, machine = iter((0.0, 1.0)), iter((0.0, used))
        load = Disturbance(
            now=functools.partial(next, clock),
            machine_s=functools.partial(next, machine),
            process_s=lambda: 0.0,
            max_cores=max_other_cores(devices),
        )
        with load:
            pass
        assert load.disturbed == disturbed


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A machine that is busy all the time; the seconds that each measurement takes are to be appended."""
    now_s = [0.0]
    monkeypatch.setattr(clock, "MAX_REPEATS", 2)
    monkeypatch.setattr(Disturbance, "disturbed", True)
    monkeypatch.setattr(clock.time, "monotonic", lambda: sum(now_s))
    monkeypatch.setattr(clock, "_PAUSE_S", 0.0)
    monkeypatch.setattr(clock, "other_programs", lambda *_, **__: "other programs use 1.0 of 2 cores")
    return now_s


@pytest.mark.parametrize(("seconds", "measured"), [(80.0, [1, 1, 1]), (25.0, [3, 1, 1]), (1.0, [3] * 20)])
def test_repeating_in_vain_ends(busy: list[float], seconds: float, measured: list[int]) -> None:
    """A sweep of 80 s is timed once, not three times; short units three times each, until that has cost a minute."""
    patience, counts = Patience(), []
    for _ in measured:
        before = len(busy)
        _, disturbed = quietest(lambda: busy.append(seconds), patience=patience)
        assert disturbed
        counts.append(len(busy) - before)
    assert counts == measured


def test_what_disturbs_is_named_every_half_minute(busy: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """One line, however many units are disturbed meanwhile."""
    patience = Patience()
    with caplog.at_level(logging.WARNING):
        for _ in range(7):
            quietest(lambda: busy.append(10.0), patience=patience)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("other programs use ")
    assert lines[0].endswith("cores: what is timed meanwhile is labelled disturbed")
    assert len(lines) == 1 + (sum(busy) - 10.0) // 30.0


def test_a_machine_that_is_busy_at_the_start_is_not_waited_for(
    busy: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, OpenMP's threads sleep instead of spinning, and everything is measured once and labelled."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    patience = Patience()
    assert patience.check_start() == (
        "other programs use 1.0 of 2 cores: timings are labelled disturbed and prove nothing; run again "
        "when they have ended"
    )
    assert os.environ.pop("OMP_WAIT_POLICY") == "passive"
    monkeypatch.setattr(Disturbance, "disturbed", False)
    assert quietest(lambda: busy.append(1.0), patience=patience)[1]
    monkeypatch.setattr(clock, "other_programs", lambda *_, **__: None)
    assert Patience().check_start() is None
    assert not quietest(lambda: busy.append(1.0), patience=Patience())[1]
