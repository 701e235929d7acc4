"""Tells a request's domain from its text, or says that it is not sure.

A linear model over hashed n-grams, kept as one JSON file of weights without a word of the text it was trained on.
Serving code imports this; how the weights came about it must not know.
"""

import base64
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
from scipy.special import softmax
from sklearn import config_context
from sklearn.feature_extraction.text import HashingVectorizer

from profiles.records.codec import decode_version
from profiles.records.core import Interval, digest_of
from profiles.records.errors import InputError, PolicyError, require
from profiles.records.files import write_atomically

ROUTER_VERSION = 1  # of the file and of what is made of a text: other n-grams are another version
# Of a text only its beginning is read, so that a request costs the same however long it is. What is asked mostly stands
# at the very beginning, and spelling there tells languages and code apart.
READ_CHARACTERS, OPENING_CHARACTERS = 1000, 100
NUM_HASHES = 1 << 13  # of either kind of n-gram
_WORD = r"\w+|[^\w\s]"
# which n-grams, not how often: a long quotation would drown what is asked about it
_WORDS = HashingVectorizer(token_pattern=_WORD, ngram_range=(1, 2), binary=True, n_features=NUM_HASHES)
_SPELLING = HashingVectorizer(analyzer="char", ngram_range=(2, 4), binary=True, n_features=NUM_HASHES)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """How a router did on texts that it had not learned from, by cross-validation.

    `accuracy`: share whose most probable domain was the right one. `calibration_error`: mean distance of the stated
    probability from the share that was right (`training.calibration_error`). `unsure`: share that no domain was told
    for; `sure_accuracy`: of the others, None where there are none.
    """

    num_texts: int
    accuracy: Interval
    calibration_error: Interval
    unsure: float
    sure_accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Router:
    """Answers from `weights` (2 * NUM_HASHES, domains), float32; it never changes, so threads may share it.

    A domain's score is the sum of its weights over a text's n-grams; scores over `temperature` make probabilities, and
    from `threshold` on the most probable domain is told. Raises InputError: an impossible value.
    """

    domains: tuple[str, ...]
    weights: numpy.ndarray
    temperature: float
    threshold: float
    held_out: HeldOut

    def __post_init__(self) -> None:
        distinct = len(set(self.domains)) == len(self.domains) >= 2 and all(self.domains)
        require(distinct, f"domains {list(self.domains)}: two or more names that differ are needed")
        wanted = (2 * NUM_HASHES, len(self.domains))
        good = self.weights.shape == wanted and bool(numpy.isfinite(self.weights).all())
        require(good, f"weights of shape {self.weights.shape}: finite ones of {wanted} are needed")
        good = math.isfinite(self.temperature) and self.temperature > 0.0
        require(good, f"temperature {self.temperature}: a number above 0 is needed")
        require(0.5 < self.threshold <= 1.0, f"threshold {self.threshold}: allowed are fractions above 0.5, up to 1")

    def domain(self, text: str) -> str | None:
        """The domain that a selector is asked with; None where the text does not tell, so that `mixed` answers.

        `text` is what the user wrote last, without the chat template, a system prompt or earlier turns; its first 1,000
        characters are read. Raises InputError: not a string.
        """
        found = self._probabilities(text)
        best = int(found.argmax())
        return self.domains[best] if found[best] >= self.threshold else None

    def probabilities(self, text: str) -> dict[str, float]:
        """The calibrated probability of every domain, if it is one of them; see `domain`."""
        return dict(zip(self.domains, self._probabilities(text).tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Replaces the file in one step; the same router gives the same bytes. Raises PolicyError."""
        kept = _File(
            domains=self.domains,
            temperature=self.temperature,
            threshold=self.threshold,
            held_out=self.held_out,
            weights=base64.b64encode(self.weights.astype("<f4").tobytes()).decode(),
        )
        document = {**asdict(kept), "digest": kept.own_digest}
        try:
            write_atomically(Path(path), (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise PolicyError(f"router file {path} cannot be written: {error.strerror}") from error

    def _probabilities(self, text: str) -> numpy.ndarray:
        if not isinstance(text, str):
            raise InputError(f"text of type {type(text).__name__}: a string is needed")
        with config_context(skip_parameter_validation=True, assume_finite=True):  # checks that the text cannot fail
            words, spelling = features([text])
        scores = words @ self.weights[:NUM_HASHES] + spelling @ self.weights[NUM_HASHES:]
        found: numpy.ndarray = softmax(scores[0] / self.temperature)
        return found


def load(path: str | Path) -> Router:
    """The router in a file. Raises PolicyError, naming the file, when it cannot be read, is damaged or newer."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        kept: _File = decode_version(_File, raw, "router", ROUTER_VERSION)
        require(kept.digest == kept.own_digest, "it was damaged: its digest is another; run `tune.py run` again")
        weights = numpy.frombuffer(base64.b64decode(kept.weights, validate=True), dtype="<f4")
        return Router(
            domains=kept.domains,
            weights=weights.reshape(-1, max(1, len(kept.domains))),
            temperature=kept.temperature,
            threshold=kept.threshold,
            held_out=kept.held_out,
        )
    except OSError as error:
        raise PolicyError(f"router file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # InputError is one; no UTF-8, no JSON and no base64 are others
        raise PolicyError(f"router file {path}: {error}") from error


def features(texts: list[str]) -> tuple[Any, Any]:
    """Hashed word and spelling n-grams, two sparse matrices (texts, NUM_HASHES) with rows of length 1 or 0."""
    read = [text[:READ_CHARACTERS].encode(errors="replace").decode() for text in texts]  # half a surrogate pair
    return _WORDS.transform(read), _SPELLING.transform([text[:OPENING_CHARACTERS] for text in read])


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A router's file; `weights` are base64 of little-endian float32."""

    version: int = ROUTER_VERSION
    domains: tuple[str, ...]
    temperature: float
    threshold: float
    held_out: HeldOut
    weights: str
    digest: str = ""

    @property
    def own_digest(self) -> str:
        return digest_of({name: value for name, value in asdict(self).items() if name != "digest"})
