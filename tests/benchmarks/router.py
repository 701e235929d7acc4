"""Is a request's domain told from its text, how fast, and what is that worth: `python -m tests.benchmarks.router`.

Of every prompt set the texts are cut into folds; each fold is routed by a router that was trained, as a run does it, on
the other folds. A keyword rule that a reader of the set would write stands beside it. For the prompts that ship, tokens
per second of a mixed stream follow from the forecast seconds of every setup on every prompt: each prompt runs the setup
that was best on the other folds' prompts of the domain that is told for it (unsure: of all domains). Spec-Bench's
questions are read from `--real` where that file is; their domains of fewer than 24 prompts show what becomes of text of
no known domain.
"""

import functools
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from profiles import builtin
from profiles import prompts as files
from profiles.records.core import Interval
from profiles.records.errors import InputError
from profiles.stats import calibration_interval, share_interval, speedup_interval
from store.cached_engine import CachedEngine
from store.evidence_store import EvidenceStore
from tests.benchmarks.common import LENGTHS, arguments, family, finish
from tuner.forecast.evidence import gather
from tuner.forecast.forecaster import Forecaster
from tuner.policy.policy import MIN_DOMAIN_PROMPTS
from tuner.router.router import train
from tuner.search.objective import candidates

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "spec_bench_odd.jsonl"
NUM_FOLDS = 5
TIMED_REPEATS = 5
MOST_DISTURBED = 0.1
# the first pattern that is found tells the domain; the last always is
SHIPPED_RULE = (
    ("copy", r"\A\W*(copy|repeat|replace|rewrite|rename|change|edit|correct|number|comment|sort)\b"),
    ("code", r"```|\bcode\b|^\s*(def|class|import|from|return|if|for)\b.*[:()=]|\bself\.|[{};]\s*$"),
    ("prose", ""),
)
REAL_RULE = (
    ("translation", r"\btranslat"),
    ("summarization", r"\bsummar"),
    ("math_reasoning", r"\bhow (many|much|long|old|far)\b.*\d|\d.*\bhow (many|much|long|old|far)\b"),
    ("rag", r"(?s).{600}"),
    ("qa", ""),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A set of texts of known domains, each in one of the folds; `others` are of domains too small to be learned."""

    name: str
    texts: tuple[str, ...]
    domains: tuple[str, ...]
    folds: tuple[int, ...]
    others: tuple[str, ...]
    rule: tuple[tuple[str, str], ...]

    def keyword(self, text: str) -> str:
        """The domain that the rule tells."""
        return next(domain for domain, pattern in self.rule if re.search(pattern, text, re.IGNORECASE | re.MULTILINE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the router of the other folds said of every text: a domain or None, the likeliest one, its probability."""

    domains: tuple[str | None, ...]
    likeliest: tuple[str, ...]
    confidences: tuple[float, ...]


def labelled(name: str, pairs: Sequence[tuple[str, str]], rule: tuple[tuple[str, str], ...]) -> Labelled:
    """Distinct (text, domain) pairs in folds that have their share of every domain."""
    distinct = list(dict(reversed(pairs)).items())[::-1]
    sizes = Counter(domain for _, domain in distinct)
    known = [(text, domain) for text, domain in distinct if sizes[domain] >= MIN_DOMAIN_PROMPTS]
    turn: Counter[str] = Counter()
    folds = [0] * len(known)
    for index in random.Random(0).sample(range(len(known)), len(known)):
        domain = known[index][1]
        folds[index] = turn[domain] % NUM_FOLDS
        turn[domain] += 1
    return Labelled(
        name=name,
        texts=tuple(text for text, _ in known),
        domains=tuple(domain for _, domain in known),
        folds=tuple(folds),
        others=tuple(text for text, domain in distinct if sizes[domain] < MIN_DOMAIN_PROMPTS),
        rule=rule,
    )


def route(found: Labelled) -> Told:
    """Every text by a router that never saw its fold. Raises InputError where none can be made."""
    told: dict[int, tuple[str | None, str, float]] = {}
    for fold in range(NUM_FOLDS):
        learned = [index for index, own in enumerate(found.folds) if own != fold]
        router = train([(found.texts[index], found.domains[index]) for index in learned])
        for index, own in enumerate(found.folds):
            if own == fold:
                chances = router.probabilities(found.texts[index])
                best = max(chances, key=lambda domain: chances[domain])
                told[index] = (router.domain(found.texts[index]), best, chances[best])
    domains, likeliest, confidences = zip(*(told[index] for index in range(len(found.texts))), strict=True)
    return Told(domains=domains, likeliest=likeliest, confidences=confidences)


def rounded(known: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(known).items()}


def grade(found: Labelled) -> tuple[dict[str, Any], Told | None]:
    """Accuracy, calibration and cost of a set's router beside the keyword rule; None where no router can be made."""
    rule_right = sum(found.keyword(text) == own for text, own in zip(found.texts, found.domains, strict=True))
    row: dict[str, Any] = {"num_texts": len(found.texts), "domains": dict(Counter(found.domains))}
    row["keyword_accuracy"] = rounded(share_interval(rule_right, len(found.texts)))
    try:
        told, router = route(found), train(list(zip(found.texts, found.domains, strict=True)))
    except InputError as error:
        print(f"{found.name}: {row['keyword_accuracy']['estimate']:.1%} by keywords; no router: {error}", flush=True)
        return {**row, "why_no_router": str(error)}, None
    right = numpy.array([one == own for one, own in zip(told.likeliest, found.domains, strict=True)])
    sure = numpy.array([one is not None for one in told.domains])
    row["accuracy"] = rounded(share_interval(int(right.sum()), len(right)))
    row["calibration_error"] = rounded(calibration_interval(numpy.array(told.confidences), right))
    row["unsure"] = round(1.0 - float(sure.mean()), 4)
    row["sure_accuracy"] = rounded(share_interval(int(right[sure].sum()), int(sure.sum()))) if sure.any() else None
    if found.others:
        row["others_routed"] = round(
            sum(router.domain(text) is not None for text in found.others) / len(found.others), 4
        )
    row["stored"] = asdict(router.held_out)
    row |= timed(router.domain, found.texts)
    sure_words = "" if row["sure_accuracy"] is None else f", {row['sure_accuracy']['estimate']:.1%} right of the sure"
    print(
        f"{found.name}: {row['accuracy']['estimate']:.1%} right, keywords {row['keyword_accuracy']['estimate']:.1%}; "
        f"unsure of {row['unsure']:.1%}{sure_words}; calibration error {row['calibration_error']['estimate']:.3f}; "
        f"{row['p50_us']:.0f} us a request (p99 {row['p99_us']:.0f})",
        flush=True,
    )
    return row, told


def timed(domain: Callable[[str], object], texts: Sequence[str]) -> dict[str, float]:
    """Microseconds of one request, median and 99th percentile over all texts."""
    seconds = []
    for _ in range(TIMED_REPEATS):
        for text in texts:
            started = time.perf_counter()
            domain(text)
            seconds.append(time.perf_counter() - started)
    p50, p99 = (float(value) * 1e6 for value in numpy.percentile(seconds, [50, 99]))
    return {"p50_us": round(p50, 1), "p99_us": round(p99, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Output tokens of each prompt, and forecast seconds (setups, prompts), plain decoding first.

    `disturbed`: share of the timings under them that other programs disturbed.
    """

    tokens: numpy.ndarray
    seconds: numpy.ndarray
    disturbed: float


def gathered(num_tokens: int, store: Path) -> tuple[Labelled, Priced]:
    """The prompts that ship, and what they take."""
    requests = files.read(builtin.ALL_PROMPTS)
    bench, workload, prompts = family(len(requests), num_tokens)
    with EvidenceStore.open(store) as evidence_store:
        evidence = gather(CachedEngine(bench.engine, evidence_store), workload, prompts, LENGTHS)
    timed_prompts = [prompt for prompt in prompts if len(evidence.traces[prompt.digest].token_ids) > 1]
    tokens = numpy.array([len(evidence.traces[prompt.digest].token_ids) - 1 for prompt in timed_prompts])
    forecaster = Forecaster(evidence, workload, bench.engine.target.run_digest)
    setups = candidates(evidence.drafts, LENGTHS)
    round_s = functools.cache(forecaster.round_s)
    seconds = [
        [
            sum(count * round_s(one, shape) for shape, count in forecaster.rounds(one, [prompt]).shapes.items())
            for prompt in timed_prompts
        ]
        for one in setups
    ]
    texts: dict[str, str] = {}
    for request in requests:
        (prompt,), _ = files.tokenize([request], bench.loaded[0].tokenizer, workload.context_length)
        texts[prompt.digest] = files.user_text(request)
    pairs = [(texts[prompt.digest], prompt.domain) for prompt in timed_prompts]
    timings = [*evidence.steps.values(), *(sample for _, sample in evidence.calibration)]
    disturbed = sum(one.disturbed for one in timings) / len(timings)
    priced = Priced(tokens=tokens, seconds=numpy.array(seconds), disturbed=disturbed)
    return labelled("shipped", pairs, SHIPPED_RULE), priced


def streams(found: Labelled, told: Told, priced: Priced) -> dict[str, Any]:
    """Tokens per second of a stream of all prompts by who tells the domain, and times as fast as the best single."""
    tokens, seconds = priced.tokens, priced.seconds
    folds, domains = numpy.array(found.folds), numpy.array(found.domains)

    def run(said: Sequence[str | None]) -> numpy.ndarray:
        """Each prompt's seconds with the setup that was fastest on the other folds' prompts of the domain told."""
        spent = numpy.zeros(len(tokens))
        for index, (fold, domain) in enumerate(zip(folds, said, strict=True)):
            others = (folds != fold) & ((domains == domain) if domain is not None else True)
            spent[index] = seconds[seconds[:, others].sum(1).argmin(), index]
        return spent

    ways = {
        "plain": seconds[0],
        "best_single": run([None] * len(tokens)),
        "keyword": run([found.keyword(text) for text in found.texts]),
        "routed": run(told.domains),
        "true_domain": run(found.domains),
        "best_per_prompt": seconds.min(0),
    }
    rows = {}
    if priced.disturbed > MOST_DISTURBED:
        print(
            f"{priced.disturbed:.0%} of the timings were disturbed by other programs: the rates below are worth nothing"
        )
    for name, spent in ways.items():
        gain, _ = speedup_interval(ways["best_single"].tolist(), tokens.tolist(), spent.tolist(), tokens.tolist())
        rows[name] = {"tok_per_s": round(float(tokens.sum() / spent.sum()), 1), "over_best_single": rounded(gain)}
        print(f"{name:16} {rows[name]['tok_per_s']:8.1f} tok/s, {gain.estimate:.3f} times the best single setup's "
              f"({gain.low:.3f} to {gain.high:.3f})", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Evidence, routers, streams, JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--store", type=Path, help="an evidence file to keep; without one a temporary one is made")
    parser.add_argument("--real", type=Path, default=REAL, help="Spec-Bench's questions as JSONL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, priced = gathered(options.tokens, options.store or Path(folder) / "e.db")
    # the first line of a prompt that ships says what to do, and is alike in all of a domain
    bare = [(text.partition("\n\n")[2], domain) for text, domain in zip(found.texts, found.domains, strict=True)]
    sets = [found, labelled("shipped without their first line", bare, SHIPPED_RULE)]
    if options.real.exists():
        real = [(files.user_text(request), request.domain) for request in files.read(str(options.real))]
        sets.append(labelled("Spec-Bench", real, REAL_RULE))
    graded = {one.name: grade(one) for one in sets}
    told = graded[found.name][1]
    finish(
        {
            "benchmark": "router",
            "sets": {name: row for name, (row, _) in graded.items()},
            "forecast_streams": None if told is None else streams(found, told, priced),
            "num_prompts": len(priced.tokens),
            "num_setups": len(priced.seconds),
            "disturbed_timings": round(priced.disturbed, 4),
        }
    )


if __name__ == "__main__":
    main()
