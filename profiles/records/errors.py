"""Every error draftpick raises on purpose; the command line prints its one line and exits with its code.

DraftpickError                    exit 1
├── InputError                    exit 2   what was asked for cannot be done as asked
│   ├── PromptError                        a prompt file or a prompt in it
│   ├── ModelError                         a model directory, its weights or its tokenizer
│   │   └── PairError                      target and draft do not fit together
│   └── PolicyError                        a policy file, or the router beside it
├── StoreError                    exit 2   the store cannot be opened, read or written
│   └── NewerStoreError                    written by a later draftpick
├── NotMeasuredError              exit 3   the evidence asked for is not there
├── EngineError                   exit 4   the engine failed while it ran
│   ├── OutOfMemoryError                   memory ran out
│   └── BadNumbersError                    logits were not finite
└── RunInterruptedError           exit 130 Ctrl-C; what was measured is kept

A message says what was asked, the value, what is allowed and, where there is one, the next step. One line.
"""


class DraftpickError(Exception):
    """Base of all; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(DraftpickError, ValueError):
    """Something the caller gave is wrong or not allowed."""

    exit_code = 2


class PromptError(InputError):
    """A prompt file cannot be read, or holds a prompt that cannot be used."""


class ModelError(InputError):
    """A model cannot be loaded or does not allow what was asked."""


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
    """The evidence asked for was never measured."""

    exit_code = 3


class MatchError(DraftpickError):
    """What was found fits the asking machine less well than was required."""

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
    """What records check their values with. Raises InputError."""
    if not condition:
        raise InputError(message)
