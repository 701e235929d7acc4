"""The errors that draftpick raises; the command line prints their one line and exits with their code.

DraftpickError                    exit 1
├── InputError                    exit 2   the request cannot be done
│   ├── PromptError                        a prompt file or a prompt in it
│   ├── ModelError                         a model directory, its weights or its tokenizer
│   │   └── PairError                      target and draft do not fit together
│   └── PolicyError                        a policy file, or the router beside it
├── StoreError                    exit 2   the store cannot be opened, read or written
│   └── NewerStoreError                    written by a later draftpick
├── NotMeasuredError              exit 3   the evidence is not there
├── EngineError                   exit 4   the engine failed while it ran
│   ├── OutOfMemoryError                   memory ran out
│   └── BadNumbersError                    logits were not finite
└── RunInterruptedError           exit 130 Ctrl-C; what was measured is kept

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
