"""Turns a choice into what a serving engine takes; one small module per engine.

The text goes to stdout and the note to stderr, so that a deploy script can read the one and a person the other. How
the choice was made it must not know.
"""

import json
from dataclasses import asdict
from typing import Literal

from profiles.errors import InputError
from profiles.terms import Model
from tuner.export import transformers
from tuner.export.terms import Export
from tuner.policy import Choice

__all__ = ["FORMS", "Export", "Form", "emit"]

Form = Literal["json", "transformers"]
FORMS: tuple[Form, ...] = ("json", "transformers")


def emit(choice: Choice, *, target: Model, form: Form) -> Export:
    """The choice as a JSON document, or as Python for Hugging Face transformers. Raises InputError: unknown form."""
    if form == "json":
        return Export(text=json.dumps(asdict(choice), indent=2, allow_nan=False) + "\n")
    if form == "transformers":
        return transformers.emit(choice, target)
    raise InputError(f"format {form!r}: allowed are {', '.join(FORMS)}")
