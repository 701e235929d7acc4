"""Makes a run's router, writes it beside the policy and says how it came out, or why there is none.

Joins training and the file for whoever runs a tuning; what text is, and where the policy is, it is told.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from profiles.records.errors import InputError
from tuner.router.router import Router
from tuner.router.training import train


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A router and its file, or `why_none`."""

    router: Router | None
    path: Path
    why_none: str = ""

    @property
    def line(self) -> str:
        """One line for people."""
        if self.router is None:
            return f"no router: {self.why_none}"
        known = self.router.held_out
        right, off = known.accuracy, known.calibration_error
        sure = "" if known.sure_accuracy is None else f", {known.sure_accuracy:.1%} right of the others"
        return (
            f"router: {self.path}; of {known.num_texts} texts held out {right.estimate:.1%} right ({right.low:.1%} to "
            f"{right.high:.1%}), unsure of {known.unsure:.1%}{sure}, calibration error {off.estimate:.3f}"
        )

    def to_json(self) -> dict[str, Any]:
        """For a program: `path` is None without a router, and `why_none` says why."""
        if self.router is None:
            return {"path": None, "why_none": self.why_none}
        figures = {"threshold": self.router.threshold, "temperature": self.router.temperature}
        return {"path": str(self.path), "domains": self.router.domains, **figures, **asdict(self.router.held_out)}


def keep(labelled: Iterable[tuple[str, str]], path: Path, seed: int) -> Outcome:
    """Trains on (text, domain) pairs and writes the router to `path`; an earlier one stays where none can be made.

    Raises PolicyError: the file cannot be written.
    """
    try:
        router = train(labelled, seed)
    except InputError as error:
        return Outcome(router=None, path=path, why_none=str(error))
    router.save(path)
    return Outcome(router=router, path=path)
