"""What vLLM computes on, as its worker tells: another Python than this one, whose torch may know no GPU.

Starts nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from profiles.hardware import fingerprint, nvml
from profiles.hardware.nvml import device_handle
from profiles.records.core import Environment

CPU = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmDevice:
    """The kind of device as vLLM names it; of a GPU also what an `Environment` says of one, and its UUID."""

    kind: str
    name: str | None = None
    count: int = 1
    memory_bytes: int = 0
    capability: str | None = None
    cuda: str | None = None
    uuid: str | None = None

    @classmethod
    def told(cls, answer: Mapping[str, Any]) -> Self:
        """From the worker's answer to `about`."""
        return cls(**{name: value for name, value in answer.items() if value is not None})

    @property
    def on_cpu(self) -> bool:
        return self.kind == CPU

    @property
    def watched(self) -> tuple[str, ...]:
        """The GPUs to watch while something is timed."""
        return () if self.on_cpu else (self.uuid or "cuda:0",)

    def fingerprint(self) -> Environment:
        """As `environment.fingerprint`, of this device."""
        here = fingerprint.fingerprint(CPU)
        if self.on_cpu:
            return here
        [watched] = self.watched
        driver = nvml.driver_version()  # and with it NVML is started, of which the handle is asked
        return replace(
            here,
            device=self.name or self.kind,
            device_count=self.count,
            memory_bytes=nvml.round_to_gib(self.memory_bytes),
            driver=driver,
            cuda=self.cuda,
            compute_capability=self.capability,
            memory_bandwidth_bytes_s=nvml.memory_bandwidth(device_handle(watched)),
        )
