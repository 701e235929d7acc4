"""What disturbs a timing on a CPU and on the host of a GPU."""

import functools

import psutil
import pytest

from profiles.timing.clock import OtherLoad, max_other_cores


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
        load = OtherLoad(
            now=functools.partial(next, clock),
            machine_s=functools.partial(next, machine),
            process_s=lambda: 0.0,
            max_cores=max_other_cores(devices),
        )
        with load:
            pass
        assert load.disturbed == disturbed
