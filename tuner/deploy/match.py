"""How well a measurement fits the machine that asks: one of six levels, and every field that differs or is not known.

A field that differs and a field that is not known are told apart: what is not known may be equal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from profiles.hardware.device import ENGINE, Machine, family, on_gpu
from profiles.models.footprint import GIB
from profiles.records.text import printable

Level = Literal["exact", "version", "engine", "family", "capability", "none"]
LEVELS: tuple[Level, ...] = get_args(Level)
MEANINGS: Mapping[Level, str] = {
    "exact": "measured on this machine with this software",
    "version": "measured on this device and engine; versions differ or are not known",
    "engine": "measured on this device with another engine",
    "family": "measured on another device of this family, or on this one set up otherwise",
    "capability": "measured on another device of the same compute capability",
    "none": "nothing that was measured fits this machine and covers the question",
}
_VERSIONS = ("driver", "cuda", "torch", "engine_version")
_CHOSEN = ("threads", "torch")  # by a serving engine itself
_COMPARED = ("device", "engine", "memory_bytes", "device_count", "threads", *_VERSIONS)
# A driver keeps a few hundred MiB of a GPU's memory to itself, which not every way of asking counts.
_SAME_MEMORY = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A field in which the asking machine and the measured one are not known to be equal; None is not known."""

    field: str
    here: str | None
    there: str | None

    @property
    def is_known(self) -> bool:
        return self.here is not None and self.there is not None

    def __str__(self) -> str:
        ours, theirs = (value or "not known" for value in (self.here, self.there))
        return f"{self.field} is {ours}, measured on {theirs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """How well a measurement made `there` fits a question asked `here`.

    `unequal`: the fields that are not known to be equal. `distance` orders matches of one level: bandwidth, then
    memory, as log ratios, then the number of such fields.
    """

    level: Level
    unequal: tuple[str, ...]
    distance: tuple[float, float, int]
    here: Machine
    there: Machine

    @property
    def order(self) -> tuple[int, tuple[float, float, int]]:
        return LEVELS.index(self.level), self.distance

    @property
    def differences(self) -> tuple[Difference, ...]:
        here, there = self.here, self.there
        return tuple(Difference(field=name, here=_text(here, name), there=_text(there, name)) for name in self.unequal)


def match(here: Machine, there: Machine) -> Match:
    """The level of a measurement made `there` for a question asked `here`.

    The level is the worst that any field calls for. Versions (driver, CUDA, torch, engine): `version`, differing or not
    known. Memory (beyond 3 %), the number of devices, and on a processor the number of threads: `family` when they
    differ, `version` when they are not known. Main memory beside a processor, and threads beside a GPU, do not limit
    decoding: `version`. Another device: `family` where `device.family` agrees, `capability` where both compute
    capabilities are known and equal, else `none`; so too a device that is not known. A serving engine chooses threads
    and torch itself: asked for one, they count only where the asking machine states them.
    """
    chosen = _CHOSEN if here.get("engine", ENGINE) != ENGINE else ()
    compared = [field for field in _COMPARED if field in here or field not in chosen]
    unequal = tuple(field for field in compared if not _is_equal(field, here, there))
    if "engine" in unequal:  # versions of two engines say nothing of each other
        unequal = tuple(field for field in unequal if field != "engine_version")
    worst = max((LEVELS.index(_level_of(field, here, there)) for field in unequal), default=0)
    ratios = (_log_ratio(here, there, "memory_bandwidth_bytes_s"), _log_ratio(here, there, "memory_bytes"))
    return Match(level=LEVELS[worst], unequal=unequal, distance=(*ratios, len(unequal)), here=here, there=there)


def _is_equal(field: str, here: Machine, there: Machine) -> bool:
    if field not in here or field not in there:
        return False
    if field == "memory_bytes":
        return _log_ratio(here, there, field) <= _SAME_MEMORY
    return here[field] == there[field]


def _level_of(field: str, here: Machine, there: Machine) -> Level:
    """What a field that is not known to be equal limits the match to."""
    if field == "device":
        return _device_level(here, there)
    if field == "engine":
        return "engine"
    if field not in here or field not in there or field in _VERSIONS:
        return "version"
    idle = "threads" if on_gpu(there) else "memory_bytes"
    return "version" if field == idle else "family"


def _device_level(here: Machine, there: Machine) -> Level:
    if "device" not in here or "device" not in there:
        return "none"
    if family(str(here["device"])) == family(str(there["device"])):
        return "family"
    capability = here.get("compute_capability")
    return "capability" if capability is not None and capability == there.get("compute_capability") else "none"


def _log_ratio(here: Machine, there: Machine, field: str) -> float:
    """0 for equal numbers; what is not known is farther than anything known."""
    ours, theirs = here.get(field), there.get(field)
    if not isinstance(ours, int) or not isinstance(theirs, int):
        return math.inf
    return abs(math.log(ours / theirs))


def _text(machine: Machine, field: str) -> str | None:
    """A field's value for people; None where it is not known."""
    if field not in machine:
        return None
    value = machine[field]
    if value is None:
        return "none"
    if field == "memory_bytes" and isinstance(value, int):
        return f"{value / GIB:.0f} GiB"
    return printable(str(value))
