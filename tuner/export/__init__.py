"""Writes a choice in the form that a serving engine takes.

The text goes to stdout and the note to stderr, so that a script reads one and a person the other.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from profiles.engines import rules
from profiles.engines.llamacpp import flags as llamacpp_flags
from profiles.engines.releases import EngineRelease, release_of
from profiles.records.core import Model, Setup
from profiles.records.errors import InputError
from tuner.export import servers, transformers, trtllm, vllm
from tuner.export.select import Deployment, Export, Pick, label_of, pick
from tuner.policy.policy import Policy

__all__ = ["FORMS", "Deployment", "Export", "Form", "emit"]

Form = Literal["json", "llamacpp", "sglang", "transformers", "trtllm", "vllm"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """How a pick is written for an engine, and what speaks against a setup."""

    write: Callable[[Pick], Export]
    objection: Callable[[Deployment, Setup, EngineRelease], str | None]


def _for_target(
    objection: Callable[[Model, Setup, EngineRelease], str | None],
) -> Callable[[Deployment, Setup, EngineRelease], str | None]:
    return lambda deployment, setup, release: objection(deployment.target, setup, release)


EXPORTERS = {
    "llamacpp": Exporter(write=servers.write_llamacpp, objection=_for_target(llamacpp_flags.objection)),
    "sglang": Exporter(write=servers.write_sglang, objection=_for_target(rules.objection)),
    "transformers": Exporter(write=transformers.write, objection=transformers.objection),
    "trtllm": Exporter(write=trtllm.write, objection=trtllm.objection),
    "vllm": Exporter(write=vllm.write, objection=vllm.objection),
}


def emit(deployment: Deployment, form: str, version: str | None = None, *, adaptive: Policy | None = None) -> Export:
    """The best setup that the engine can be told, in the form of its `version`; or the choice as a JSON document.

    `version` None: the installed engine's, without one the newest known, which the note says. `adaptive`: the policy
    that the engine follows as it runs. Raises InputError: an unknown form, a version that is none, `adaptive` for an
    engine that cannot.
    """
    if adaptive is not None and form != "vllm":
        raise InputError(f"--adaptive with format {form!r}: only vllm takes a scheduler that chooses as it runs")
    if form == "json":
        choice = deployment.choice
        text = json.dumps(asdict(choice), indent=2, allow_nan=False) + "\n"
        label = label_of(deployment, deployment.engine, choice.setup)
        return Export(text=text, setup=choice.setup, label=label)
    if form not in EXPORTERS:
        raise InputError(f"format {form!r}: allowed are {', '.join(FORMS)}")
    exporter = EXPORTERS[form]
    release = llamacpp_flags.release_of_build(version) if form == "llamacpp" else release_of(form, version)
    if release.objection is not None:
        return Export(text="", note=release.objection)

    def objection(setup: Setup) -> str | None:
        reason = exporter.objection(deployment, setup, release)
        if reason is None and adaptive is not None:
            return vllm.adaptive_objection(adaptive, setup, release)
        return reason

    picked = pick(deployment, release, objection)
    if isinstance(picked, Export):
        return picked
    return exporter.write(picked) if adaptive is None else vllm.write_adaptive(picked, adaptive)
