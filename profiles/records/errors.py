"""The errors that draftpick raises; the command line prints their one line and exits with their code.

A message names what was given, why it is wrong and what to do, in one line.
"""


class DraftpickError(Exception):
    """Base of all; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(DraftpickError, ValueError):
    """An input is wrong or not allowed."""

    exit_code = 2


class PromptError(InputError):
    """A prompt file cannot be read, or holds a prompt that cannot be used."""


class ModelError(InputError):
    """A model cannot be loaded or used."""


class PairError(ModelError):
    """A draft cannot serve this target."""


class PolicyError(InputError):
    """A policy file, or the router beside it, cannot be read or is not valid."""


class StoreError(DraftpickError):
    """The store cannot be opened, read or written."""

    exit_code = 2


class NewerStoreError(StoreError):
    """The store was written by a later version than this one understands."""


class NotMeasuredError(DraftpickError, LookupError):
    """The evidence was never measured."""

    exit_code = 3


class MatchError(DraftpickError):
    """The best match fits this machine less well than required."""

    exit_code = 7


class EngineError(DraftpickError, RuntimeError):
    """The engine failed while it ran; nothing of the failed unit is kept as a number."""

    exit_code = 4


class OutOfMemoryError(EngineError):
    """The device ran out of memory."""


class BadNumbersError(EngineError):
    """Logits were NaN or infinite."""


class RunInterruptedError(DraftpickError):
    """The user stopped a run; every finished unit is kept."""

    exit_code = 130


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
