"""How a user spells drafts and speculation lengths on the command line, and what is meant by it.

A model draft is only a path or a hub id here; whether it exists or fits the target is found out when it is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiles.records.core import Draft, DraftKind
from profiles.records.errors import InputError

MAX_LENGTH = 64
MAX_BATCH = 64  # rows the torch engine decodes at a time
MAX_REQUESTS = 1024  # in flight at a server
AGE_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MAX_AGE_S = 36500 * AGE_UNITS_S["d"]  # further back the calendar ends
NATIVE = "native:"  # before what only a serving engine can draft with
TAKEN = {"method", "model", "num_speculative_tokens"}
NGRAM_DEFAULTS = {"max": 4, "min": 2}  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSpec:
    """A draft as the user spelled it, before any model is loaded; exactly the parameters of its kind are set.

    `path`: directory, GGUF file or hub id of a model draft, or of the model in a composite or native one. `max_match`
    and `min_match`: tokens of an n-gram match. `num_layers`: the target's first layers that an early-exit draft runs.
    `method`: of a native draft, as the serving engine names it.
    """

    kind: DraftKind
    path: str | None = None
    max_match: int | None = None
    min_match: int | None = None
    num_layers: int | None = None
    method: str | None = None

    @property
    def name(self) -> str:
        """The spelling, as `Draft.name` gives it."""
        if self.num_layers is not None:
            return f"early-exit:{self.num_layers}"
        match = f"ngram:max={self.max_match},min={self.min_match}" if self.max_match is not None else None
        own = match if self.method is None else f"{NATIVE}{self.method}"
        return "+".join(part for part in (own, self.path) if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedDraft:
    """A draft that was named but cannot be used, and why."""

    name: str
    reason: str
    detail: str

    @classmethod
    def from_error(cls, name: str, error: Exception) -> "RefusedDraft":
        return cls(name=name, reason=type(error).__name__, detail=str(error))


def parse_age(text: str) -> float:
    """Seconds from `90s`, `30m`, `12h` or `7d`. Raises InputError."""
    number, unit = text[:-1], text[-1:]
    age_s = int(number) * AGE_UNITS_S.get(unit, 0.0) if number.isdecimal() and len(number) <= 10 else 0.0
    if not 0.0 < age_s <= MAX_AGE_S:
        allowed = "whole numbers above 0 with s, m, h or d behind them, like 12h, up to 36500d"
        raise InputError(f"age {text!r}: allowed are {allowed}")
    return age_s


def parse_lengths(text: str) -> tuple[int, ...]:
    """Speculation lengths from `1-8`, `1,2,4`, `3` or a mixture, sorted and distinct. Raises InputError."""
    lengths: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low = _whole_number(first, f"lengths {text!r}", "1-8, 1,2,4 or 3")
        high = _whole_number(last, f"lengths {text!r}", "1-8, 1,2,4 or 3") if dash else low
        if not 1 <= low <= high <= MAX_LENGTH:
            raise InputError(f"lengths {text!r}: {part.strip()!r} is not within 1 to {MAX_LENGTH}, smaller end first")
        lengths.update(range(low, high + 1))
    return tuple(sorted(lengths))


def parse_draft(text: str) -> DraftSpec:
    """The draft a user means. Raises InputError.

    `ngram[:max=4,min=2]`, `early-exit:LAYERS`, a path or hub id, or `ngram[...]+PATH`: both, the model where the text
    offers no match. `native:METHOD[+PATH]` is what only a serving engine has, as it names it.
    """
    if text.strip().startswith(NATIVE):
        method, plus, path = text.strip().removeprefix(NATIVE).partition("+")
        if not method.strip() or (plus and not path.strip()):
            raise InputError(f"draft {text!r}: native:METHOD or native:METHOD+PATH is allowed")
        method_options(method)
        return DraftSpec(kind="native", method=method.strip(), path=path.strip() or None)
    ngram, plus, path = text.strip().partition("+")
    if plus and ngram.partition(":")[0] == "ngram":
        match = _parse_ngram(text, ngram.partition(":")[2] or None)
        if parse_draft(path).kind != "model":
            raise InputError(f"draft {text!r}: behind the + a path or hub id of a draft model is allowed")
        return replace(match, kind="composite", path=path.strip())
    word, colon, rest = text.strip().partition(":")
    if word == "ngram":
        return _parse_ngram(text, rest if colon else None)
    if word == "early-exit":
        num_layers = _whole_number(rest, f"draft {text!r}", "early-exit:LAYERS, for instance early-exit:4")
        draft = Draft(kind="early_exit", num_layers=num_layers)
        return DraftSpec(kind="early_exit", num_layers=draft.num_layers)
    if not text.strip():
        allowed = "a path, a hub id, ngram[:max=4,min=2], early-exit:LAYERS or ngram+PATH"
        raise InputError(f"draft {text!r}: {allowed} is allowed")
    return DraftSpec(kind="model", path=text.strip())


def with_composites(specs: Sequence[DraftSpec]) -> list[DraftSpec]:
    """The drafts asked for, and for each draft model its composite with the default look-up."""
    ngram = parse_draft("ngram")
    composites = [replace(ngram, kind="composite", path=spec.path) for spec in specs if spec.kind == "model"]
    return list(dict.fromkeys([*specs, *composites]))


def method_options(method: str) -> tuple[str, dict[str, str]]:
    """The name and the options of a native draft's method: `ngram-mod,n-match=24`. Raises InputError."""
    name, *options = (part.strip() for part in method.split(","))
    pairs = [option.partition("=") for option in options]
    if not name or any(not (key and equals and value) for key, equals, value in pairs):
        raise InputError(f"method {method!r}: a name is allowed, and options behind it like eagle3,key=value")
    return name, {key: value for key, _, value in pairs}


def engine_options(method: str) -> tuple[str, dict[str, int | str]]:
    """As `method_options`, as vLLM's configuration takes them: `_` for `-`, and digits as numbers. Raises InputError.

    What says which method, which model or how many tokens is no option: it would take the measured one's place.
    """
    name, options = method_options(method)
    found = {key.replace("-", "_"): int(value) if value.isdecimal() else value for key, value in options.items()}
    if taken := sorted(found.keys() & TAKEN):
        raise InputError(f"method {method!r}: option {taken[0]} is set by draftpick itself")
    return name, found


def _parse_ngram(text: str, options: str | None) -> DraftSpec:
    values = dict(NGRAM_DEFAULTS)
    seen: set[str] = set()
    for option in [] if options is None else options.split(","):
        key, _, value = option.strip().partition("=")
        if key not in values or key in seen:
            raise InputError(f"draft {text!r}: {option.strip()!r} is not one of max=N and min=N, each at most once")
        seen.add(key)
        values[key] = _whole_number(value, f"draft {text!r}", f"{key}=N")
    draft = Draft(kind="ngram", max_match=values["max"], min_match=values["min"])
    return DraftSpec(kind="ngram", max_match=draft.max_match, min_match=draft.min_match)


def _whole_number(text: str, asked: str, allowed: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InputError(f"{asked}: {text!r} is not a whole number; allowed is {allowed}")
    return int(text)
