"""The domain of a request from its text: one scikit-learn pipeline, saved as numbers without any text."""

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array, hstack
from scipy.special import log_softmax, softmax
from sklearn import config_context
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from profiles.records import codec
from profiles.records.core import Interval, digest_of
from profiles.records.errors import InputError, PolicyError, require
from profiles.records.files import write_atomically
from profiles.records.text import command
from profiles.stats import calibration_interval, share_interval
from tuner.policy.policy import MIN_DOMAIN_PROMPTS

ROUTER_VERSION = 1  # of the file and of the features: other n-grams are another version
# Only the beginning of a text is read: the cost does not grow with its length, and the request mostly stands there.
READ_CHARACTERS, SPELLING_CHARACTERS = 1000, 100
NUM_HASHES = 1 << 13  # of either kind of n-gram
_WORD = r"\w+|[^\w\s]"
# binary: counts would let a long quotation outweigh what is asked about it
_WORD_HASHES = HashingVectorizer(token_pattern=_WORD, ngram_range=(1, 2), binary=True, n_features=NUM_HASHES)
_SPELLING = HashingVectorizer(analyzer="char", ngram_range=(2, 4), binary=True, n_features=NUM_HASHES)
# A router answers where at most 5 % of its answers are wrong, and leaves unsure what is less clear than all but 5 % of
# the texts it gets right: mostly text unlike any it knows. Never where the others together are half as probable.
MAX_WRONG, LEFT_UNSURE, MIN_THRESHOLD = 0.05, 0.05, 2 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Cross-validated figures; `sure_accuracy` is of the texts that are not `unsure`, None where there are none."""

    num_texts: int
    accuracy: Interval
    calibration_error: Interval
    unsure: float
    sure_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class Router:
    """A trained router and its file's content. Immutable, so threads may share it. Raises InputError.

    A score sums a domain's `weights` (2 * NUM_HASHES, domains; base64 of little-endian float32) over a text's n-grams.
    The softmax of scores over `temperature` gives probabilities; from `threshold` on the most probable domain answers.
    """

    version: int = ROUTER_VERSION
    domains: tuple[str, ...]
    temperature: float
    threshold: float
    held_out: HeldOut
    weights: str
    digest: str = ""

    def __post_init__(self) -> None:
        digest = digest_of({name: value for name, value in asdict(self).items() if name != "digest"})
        require(self.digest in ("", digest), f"it was damaged: its digest does not match; run `{command('run')}` again")
        object.__setattr__(self, "digest", digest)
        distinct = len(set(self.domains)) == len(self.domains) >= 2 and all(self.domains)
        require(distinct, f"domains {list(self.domains)}: two or more names that differ are needed")
        shape, needed = self._matrix.shape, (2 * NUM_HASHES, len(self.domains))
        finite = bool(numpy.isfinite(self._matrix).all())
        require(shape == needed and finite, f"weights of shape {shape}: finite ones of {needed} are needed")
        require(0.0 < self.temperature < math.inf, f"temperature {self.temperature}: a number above 0 is needed")
        require(0.5 < self.threshold <= 1.0, f"threshold {self.threshold}: allowed are fractions above 0.5, up to 1")

    @cached_property
    def _matrix(self) -> numpy.ndarray:
        return numpy.frombuffer(base64.b64decode(self.weights, validate=True), "<f4").reshape(-1, len(self.domains))

    def domain(self, text: str) -> str | None:
        """The domain to ask a selector with; None when the text does not tell, so that `mixed` answers.

        `text` is what the user wrote last, without chat template, system prompt or earlier turns.
        """
        probabilities = self.probabilities(text)
        best = max(probabilities, key=lambda domain: probabilities[domain])
        return best if probabilities[best] >= self.threshold else None

    def probabilities(self, text: str) -> dict[str, float]:
        """The calibrated probability of every domain; see `domain`. Raises InputError: not a string."""
        require(isinstance(text, str), f"text of type {type(text).__name__}: a string is needed")
        with config_context(skip_parameter_validation=True, assume_finite=True):  # a third of the time
            scores = (_features([text]) @ self._matrix)[0]
        return dict(zip(self.domains, softmax(scores / self.temperature).tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Replaces the file in one step; the same router gives the same bytes. Raises PolicyError."""
        try:
            write_atomically(path, f"{json.dumps(asdict(self), separators=(',', ':'))}\n".encode())
        except OSError as error:
            raise PolicyError(f"router file {path} cannot be written: {error.strerror}") from error


def load(path: str | Path) -> Router:
    """The router in a file. Raises PolicyError, naming the file, when it cannot be read, is damaged or newer."""
    try:
        return codec.from_json(Router, Path(path).read_bytes(), "router", newest_version=ROUTER_VERSION)
    except OSError as error:
        raise PolicyError(f"router file {path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise PolicyError(f"router file {path}: {error}") from error


def train(labelled: Iterable[tuple[str, str]], seed: int = 0) -> Router:
    """A router of (text, domain) pairs, for the domains of at least 24 texts; `Router.domain` says which text to give.

    The same pairs in any order give the same router. Of texts that begin alike one counts, with the domain that comes
    first in the alphabet. Raises InputError: fewer than two such domains, or texts that do not tell them apart.
    """
    by_text: dict[str, str] = {}
    for domain, text in sorted((domain, text) for text, domain in labelled):
        by_text.setdefault(text[:READ_CHARACTERS], domain)
    sizes = Counter(by_text.values())
    domains = tuple(domain for domain, size in sizes.items() if size >= MIN_DOMAIN_PROMPTS)
    counts = ", ".join(f"{domain} {size}" for domain, size in sizes.items()) or "no texts"
    needed = f"a router needs two domains of {MIN_DOMAIN_PROMPTS} different texts or more"
    require(len(domains) >= 2, f"{needed}; there are: {counts}")
    texts = [text for text, domain in by_text.items() if domain in domains]
    truth = numpy.array([domains.index(by_text[text]) for text in texts])
    # No intercept: an empty text shall have equal probabilities; how often domains are requested is not known.
    classifier = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
    pipeline = make_pipeline(FunctionTransformer(_features), classifier)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = _per_domain(cross_val_predict(pipeline, texts, truth, cv=folds, method="decision_function"))
    temperature = _fit_temperature(scores, truth)
    confidences, right = softmax(scores / temperature, axis=1).max(1), scores.argmax(1) == truth
    order = numpy.argsort(-confidences, kind="stable")
    wrong_share = numpy.cumsum(~right[order]) / numpy.arange(1, len(order) + 1)
    allowed = confidences[order][wrong_share <= MAX_WRONG]
    apart = f"texts do not tell the domains {', '.join(domains)} apart: {right.mean():.0%} held out were right"
    require(len(allowed) > 0, apart)
    threshold = max(MIN_THRESHOLD, allowed.min(), numpy.quantile(confidences[right], LEFT_UNSURE))
    sure = confidences >= threshold
    pipeline.fit(texts, truth)
    return Router(
        domains=domains,
        temperature=temperature,
        threshold=float(threshold),
        held_out=HeldOut(
            num_texts=len(texts),
            accuracy=share_interval(int(right.sum()), len(right)),
            calibration_error=calibration_interval(confidences, right, seed),
            unsure=float(1.0 - sure.mean()),
            sure_accuracy=float(right[sure].mean()) if sure.any() else None,
        ),
        weights=base64.b64encode(_per_domain(classifier.coef_.T).astype("<f4").tobytes()).decode(),
    )


def train_and_save(labelled: Iterable[tuple[str, str]], path: Path, seed: int) -> dict[str, object]:
    """Writes a trained router; its figures as a JSON document. `path` is None and `why_none` says why there is none.

    An earlier file stays where no router can be trained. Raises PolicyError: the file cannot be written.
    """
    try:
        router = train(labelled, seed)
    except InputError as error:
        return {"path": None, "why_none": str(error)}
    router.save(path)
    figures = {"domains": router.domains, "threshold": router.threshold, "temperature": router.temperature}
    return {"path": str(path), **figures, **asdict(router.held_out)}


def _features(texts: list[str]) -> csr_array:
    """Hashed n-grams of words and of spelling: (texts, 2 * NUM_HASHES)."""
    beginnings = [text[:READ_CHARACTERS].encode(errors="replace").decode() for text in texts]  # lone surrogates
    spelling = _SPELLING.transform([text[:SPELLING_CHARACTERS] for text in beginnings])
    return hstack((_WORD_HASHES.transform(beginnings), spelling), format="csr")


def _per_domain(scores: numpy.ndarray) -> numpy.ndarray:
    """Scores or weights with a column per domain: of two domains scikit-learn has one, second less first."""
    return scores if scores.ndim == 2 and scores.shape[1] > 1 else numpy.column_stack((-scores / 2, scores / 2))


def _fit_temperature(scores: numpy.ndarray, truth: numpy.ndarray) -> float:
    """The number that scores are divided by to make the truth most likely (Guo et al. 2017), smoothed as by Platt."""
    # one text of any domain is added: no error among n texts does not mean no error ever
    targets = numpy.full(scores.shape, 1.0 / scores.shape[1])
    targets[numpy.arange(len(truth)), truth] += len(truth)

    def cross_entropy(log_temperature: float) -> float:
        return -float((targets * log_softmax(scores / math.exp(log_temperature), axis=1)).sum())

    return math.exp(minimize_scalar(cross_entropy, bounds=(-6.0, 6.0), method="bounded").x)
