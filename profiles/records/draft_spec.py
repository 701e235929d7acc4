"""Drafts, speculation lengths and ages as they are written on the command line.

Whether a draft's model exists and fits the target shows when it is loaded.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from profiles.records.core import DTYPES, VLLM_METHODS, Draft, DraftKind, Model
from profiles.records.errors import InputError, require
from profiles.records.files import absolute_name

MAX_LENGTH = 64
MAX_BATCH = 64  # rows that the torch engine decodes at a time
MAX_REQUESTS = 1024  # in flight at a server
HEADS = {"builtin:draft-eagle": "eagle"}  # built-in drafts that are no models by themselves, and their methods
NGRAM_DEFAULTS = {"max": 4, "min": 2}  # tokens
_RESERVED_OPTIONS = {"method", "model", "num_speculative_tokens"}
_AGE_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_AGE_S = 36500 * _AGE_UNITS_S["d"]  # further back the calendar ends
_ALLOWED = (
    "a model directory, .gguf file or hub id, ngram[:max=4,min=2], early-exit:LAYERS, eagle3:MODEL, mtp, native:METHOD "
    "or ngram+ before a model or method"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """A draft as the user wrote it; exactly the parameters of its kind are set."""

    kind: DraftKind
    path: str | None = None  # directory, GGUF file or hub id of the model, also of a composite or native draft
    max_match: int | None = None  # longest n-gram match in tokens
    min_match: int | None = None
    num_layers: int | None = None  # layers of the target that an early-exit draft runs
    method: str | None = None  # of a native draft, alone or in a composite: as a serving engine names it

    @property
    def name(self) -> str:
        """The name that `Draft.name` gives it."""
        model = None if self.path is None else Model(name=self.path, dtype=DTYPES[0], digest="", num_params=1)
        return self.draft(model).name

    def draft(self, model: Model | None) -> Draft:
        """The draft with this model."""
        fields = {name: value for name, value in asdict(self).items() if name != "path"}
        return Draft(model=model, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedDraft:
    """A draft that cannot be used, and why."""

    name: str
    reason: str
    detail: str

    @classmethod
    def from_error(cls, name: str, error: Exception) -> "RefusedDraft":
        return cls(name=name, reason=type(error).__name__, detail=str(error))


def parse_age(text: str) -> float:
    """Seconds from `90s`, `30m`, `12h` or `7d`. Raises InputError."""
    number, unit = text[:-1], text[-1:]
    age_s = int(number) * _AGE_UNITS_S.get(unit, 0.0) if number.isdecimal() and len(number) <= 10 else 0.0
    if not 0.0 < age_s <= _MAX_AGE_S:
        raise InputError(f"age {text!r}: allowed are whole numbers above 0 with s, m, h or d, like 12h, up to 36500d")
    return age_s


def parse_lengths(text: str) -> tuple[int, ...]:
    """Speculation lengths from `1-8`, `1,2,4`, `3` or a mixture, sorted and distinct. Raises InputError."""
    lengths: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low, high = (
            _whole_number(end, f"lengths {text!r}", "1-8, 1,2,4 or 3") for end in (first, last if dash else first)
        )
        if not 1 <= low <= high <= MAX_LENGTH:
            raise InputError(f"lengths {text!r}: {part.strip()!r} is not within 1 to {MAX_LENGTH}, smaller end first")
        lengths.update(range(low, high + 1))
    return tuple(sorted(lengths))


def parse_draft(text: str) -> DraftSpec:
    """The draft that `text` means.

    `ngram[:max=4,min=2]`, `early-exit:LAYERS`, a directory, GGUF file or hub id, or what only a serving engine has:
    `eagle3:MODEL`, `mtp` (and the other `VLLM_METHODS`, each with options as in `eagle3,key=value:MODEL`), or any
    method as `native:METHOD[+MODEL]`. `ngram[...]+DRAFT`: the other draft where the text offers no match. Raises
    InputError: none of these.
    """
    stripped = text.strip()
    if stripped in HEADS:
        stripped = f"{HEADS[stripped]}:{stripped}"
    if re.split("[,:]", stripped)[0] in VLLM_METHODS:
        stripped = f"native:{stripped.replace(':', '+', 1)}"
    head, plus, path = (part.strip() for part in stripped.partition("+"))
    kind, colon, rest = head.partition(":")
    if kind == "native" and colon:
        method = rest.strip()
        if not method or (plus and not path):
            raise InputError(f"draft {text!r}: METHOD:MODEL, native:METHOD or native:METHOD+MODEL is allowed")
        method_options(method)
        return DraftSpec(kind="native", method=method, path=absolute_name(path) or None)
    if kind == "ngram":
        ngram = _parse_ngram(text, head)
        if not plus:
            return ngram
        drafter = parse_draft(path)
        if drafter.kind not in ("model", "native"):
            raise InputError(f"draft {text!r}: behind the + a model or a method such as eagle:PATH is allowed")
        return replace(ngram, kind="composite", path=drafter.path, method=drafter.method)
    if kind == "early-exit":
        num_layers = _whole_number(rest + plus, f"draft {text!r}", "early-exit:LAYERS, for instance early-exit:4")
        return DraftSpec(kind="early_exit", num_layers=Draft(kind="early_exit", num_layers=num_layers).num_layers)
    require(bool(stripped), f"draft {text!r}: allowed are {_ALLOWED}")
    return DraftSpec(kind="model", path=absolute_name(stripped))


def with_composites(specs: Sequence[DraftSpec]) -> list[DraftSpec]:
    """The drafts, and for each draft model its composite with the default look-up."""
    ngram = parse_draft("ngram")
    composites = [replace(ngram, kind="composite", path=spec.path) for spec in specs if spec.kind == "model"]
    return list(dict.fromkeys([*specs, *composites]))


def method_options(method: str) -> tuple[str, dict[str, str]]:
    """Name and options of a native draft's method, such as `ngram-mod,n-match=24`. Raises InputError."""
    name, *options = (part.strip() for part in method.split(","))
    pairs = [option.partition("=") for option in options]
    if not name or any(not (key and equals and value) for key, equals, value in pairs):
        raise InputError(f"method {method!r}: a name is allowed, and options behind it like eagle3,key=value")
    return name, {key: value for key, _, value in pairs}


def engine_options(method: str) -> tuple[str, dict[str, int | str]]:
    """As `method_options`, for vLLM: `_` for `-`, numbers, true and false, and no option that is set elsewhere."""
    name, options = method_options(method)
    switches = {"true": True, "false": False}
    values = {
        key.replace("-", "_"): int(value) if value.isdecimal() else switches.get(value, value)
        for key, value in options.items()
    }
    if reserved := sorted(values.keys() & _RESERVED_OPTIONS):
        raise InputError(f"method {method!r}: option {reserved[0]} is set by draftpick itself")
    return name, values


def _parse_ngram(text: str, lookup: str) -> DraftSpec:
    """`lookup`, such as `ngram:max=4`, of the draft `text`."""
    _, colon, options = lookup.partition(":")
    values, seen = dict(NGRAM_DEFAULTS), set()
    for option in options.split(",") if colon else []:
        key, _, value = option.strip().partition("=")
        if key not in values or key in seen:
            raise InputError(f"draft {text!r}: {option.strip()!r} is not one of max=N and min=N, each at most once")
        seen.add(key)
        values[key] = _whole_number(value, f"draft {text!r}", f"{key}=N")
    draft = Draft(kind="ngram", max_match=values["max"], min_match=values["min"])
    return DraftSpec(kind="ngram", max_match=draft.max_match, min_match=draft.min_match)


def _whole_number(text: str, what: str, allowed: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InputError(f"{what}: {text!r} is not a whole number; allowed is {allowed}")
    return int(text)
