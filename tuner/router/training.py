"""Makes a router from texts whose domains are known, and measures it on texts held out.

Logistic regression over hashed n-grams; temperature and threshold are set on folds that it did not learn from. The
store keeps digests of prompts, not their text, so a router is made while a run has them in hand; who calls it must not
matter here.
"""

from collections import Counter
from collections.abc import Iterable

import numpy
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array, hstack
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from profiles.records.core import Interval
from profiles.records.errors import InputError
from tuner.policy.policy import MIN_DOMAIN_PROMPTS
from tuner.router.router import READ_CHARACTERS, HeldOut, Router, features

NUM_FOLDS = 5
INVERSE_PENALTY = 10.0
# A router is sure where at most 5 % of the sure would be wrong and the text is no less clear than all but 5 % of those
# that it gets right: a text unlike any that it knows mostly is. Never where the rest together is half as probable.
MOST_WRONG, LEFT_UNSURE, LEAST_THRESHOLD = 0.05, 0.05, 2 / 3
NUM_BINS, RESAMPLES = 10, 1000


def train(labelled: Iterable[tuple[str, str]], seed: int = 0) -> Router:
    """A router of (text, domain) pairs, for the domains of at least 24 texts; `Router.domain` says which text to give.

    The same pairs in any order give the same router. Of texts that begin alike one counts, with the domain that comes
    first in the alphabet. Raises InputError: fewer than two such domains, or texts that do not tell them apart.
    """
    texts, domains, truth = _learnable(labelled)
    matrix = _matrix(texts)
    folds = list(StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(matrix, truth))
    scores = numpy.zeros((len(texts), len(domains)))
    for learned, tested in folds:
        scores[tested] = matrix[tested] @ _fitted(matrix[learned], truth[learned])
    temperature = _temperature(scores, truth)
    threshold = _threshold(softmax(scores / temperature, axis=1), truth)
    if threshold is None:
        right = (scores.argmax(1) == truth).mean()
        raise InputError(f"texts do not tell the domains {', '.join(domains)} apart: {right:.0%} held out were right")
    return Router(
        domains=domains,
        weights=_fitted(matrix, truth),
        temperature=temperature,
        threshold=threshold,
        held_out=_held_out(scores, truth, [tested for _, tested in folds], seed),
    )


def _learnable(labelled: Iterable[tuple[str, str]]) -> tuple[list[str], tuple[str, ...], numpy.ndarray]:
    """What is read of distinct texts, the domains' names, and each text's domain as a place in them."""
    by_text: dict[str, str] = {}
    for domain, text in sorted((domain, text) for text, domain in labelled):
        by_text.setdefault(text[:READ_CHARACTERS], domain)
    sizes = Counter(by_text.values())
    domains = tuple(domain for domain, size in sizes.items() if size >= MIN_DOMAIN_PROMPTS)
    if len(domains) < 2:
        found = ", ".join(f"{domain} {size}" for domain, size in sizes.items()) or "no texts"
        raise InputError(
            f"a router needs two domains of {MIN_DOMAIN_PROMPTS} different texts or more; there are: {found}"
        )
    pairs = [(text, domains.index(domain)) for text, domain in by_text.items() if domain in domains]
    return [text for text, _ in pairs], domains, numpy.array([place for _, place in pairs])


def _matrix(texts: list[str]) -> csr_array:
    return hstack(features(texts), format="csr")


def _fitted(matrix: csr_array, truth: numpy.ndarray) -> numpy.ndarray:
    """Weights (2 * NUM_HASHES, domains), float32.

    No intercept: a text of which nothing is known shall have equal probabilities, and how often domains are asked for
    in serving is not known either.
    """
    model = LogisticRegression(C=INVERSE_PENALTY, fit_intercept=False, max_iter=1000).fit(matrix, truth)
    weights = model.coef_ if len(model.coef_) > 1 else numpy.vstack([-model.coef_ / 2, model.coef_ / 2])  # of two
    return numpy.ascontiguousarray(weights.T, dtype=numpy.float32)


def _temperature(scores: numpy.ndarray, truth: numpy.ndarray) -> float:
    """The one number by which scores are divided that makes the truth most likely (Guo et al. 2017).

    Temperature scaling, because it has one parameter, which a few dozen texts settle, and keeps the order of domains;
    isotonic regression needs about a thousand texts, Platt's has two parameters for each domain. One text that could be
    of any domain is counted too, so that no error among n texts is not taken for no error ever (after Platt 1999).
    """
    num_texts, num_domains = scores.shape
    targets = numpy.full(scores.shape, 1.0 / num_domains)
    targets[numpy.arange(num_texts), truth] += num_texts
    targets /= num_texts + 1.0

    def surprise(log_temperature: float) -> float:
        return -float((targets * log_softmax(scores / numpy.exp(log_temperature), axis=1)).sum())

    return float(numpy.exp(minimize_scalar(surprise, bounds=(-6.0, 6.0), method="bounded").x))


def _threshold(probabilities: numpy.ndarray, truth: numpy.ndarray) -> float | None:
    """The least probability to be sure at (see the constants); None where none leaves few enough wrong."""
    confidences, right = probabilities.max(1), probabilities.argmax(1) == truth
    order = numpy.argsort(-confidences, kind="stable")
    wrong_share = numpy.cumsum(~right[order]) / numpy.arange(1, len(order) + 1)
    allowed = confidences[order][wrong_share <= MOST_WRONG]
    if len(allowed) == 0:
        return None
    return max(LEAST_THRESHOLD, float(allowed.min()), float(numpy.quantile(confidences[right], LEFT_UNSURE)))


def _held_out(scores: numpy.ndarray, truth: numpy.ndarray, folds: list[numpy.ndarray], seed: int) -> HeldOut:
    """Every fold by the temperature and threshold of the other folds, so that none is judged by what it set."""
    probabilities = numpy.zeros_like(scores)
    sure = numpy.zeros(len(truth), dtype=bool)
    for tested in folds:
        others = numpy.setdiff1d(numpy.arange(len(truth)), tested)
        temperature = _temperature(scores[others], truth[others])
        probabilities[tested] = softmax(scores[tested] / temperature, axis=1)
        threshold = _threshold(softmax(scores[others] / temperature, axis=1), truth[others])
        sure[tested] = threshold is not None and probabilities[tested].max(1) >= threshold
    confidences, right = probabilities.max(1), probabilities.argmax(1) == truth
    return HeldOut(
        num_texts=len(truth),
        accuracy=share_interval(int(right.sum()), len(right)),
        calibration_error=calibration_interval(confidences, right, seed),
        unsure=float(1.0 - sure.mean()),
        sure_accuracy=float(right[sure].mean()) if sure.any() else None,
    )


def share_interval(count: int, total: int) -> Interval:
    """A share with Wilson's 95 % interval."""
    found = binomtest(count, total).proportion_ci(method="wilson")
    share = count / total
    return Interval(estimate=share, low=min(share, float(found.low)), high=max(share, float(found.high)))


def calibration_error(confidences: numpy.ndarray, right: numpy.ndarray) -> float:
    """Expected calibration error: |share right - mean confidence| over ten equal bins, weighted by their sizes.

    Luck alone makes it larger than 0, by the more the fewer texts there are.
    """
    bins = numpy.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = numpy.bincount(bins, weights=right - confidences, minlength=NUM_BINS)
    return float(numpy.abs(gaps).sum() / len(right))


def calibration_interval(confidences: numpy.ndarray, right: numpy.ndarray, seed: int = 0) -> Interval:
    """The calibration error with 95 % percentiles over resampled texts."""
    rng = numpy.random.default_rng(seed)
    estimate = calibration_error(confidences, right)
    picks = rng.integers(0, len(right), (RESAMPLES, len(right)))
    draws = [calibration_error(confidences[pick], right[pick]) for pick in picks]
    low, high = (float(value) for value in numpy.percentile(draws, [2.5, 97.5]))
    return Interval(estimate=estimate, low=min(low, estimate), high=max(high, estimate))
