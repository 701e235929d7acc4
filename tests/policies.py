"""Records the policy tests share: one target, one environment, and choices spelled by what differs."""

from profiles.terms import PLAIN, Draft, Environment, Interval, Model, Setup
from store.book import Book
from tuner.claims import Forecast, Measured
from tuner.policy import Choice, Policy
from tuner.question import MIXED

TARGET = Model(name="family/target", dtype="float32", digest="aa" * 16, num_params=4_000_000)
ENVIRONMENT = Environment(
    device="Example CPU",
    device_count=1,
    memory_bytes=8_000_000_000,
    driver=None,
    cuda=None,
    threads=2,
    torch="2.13.0",
    engine="torch",
    engine_version="0.1.0",
)
CODE_DRAFT = Draft(
    kind="model", model=Model(name="family/draft-code", dtype="float32", digest="bb" * 16, num_params=400_000)
)
NGRAM = Draft(kind="ngram", max_match=4, min_match=2)
EARLY_EXIT = Draft(kind="early_exit", num_layers=3)
CREATED = "2026-11-21T09:30:00+00:00"


def interval(estimate: float, reach: float = 0.05) -> Interval:
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach)


def measured(setup: Setup, speedup: float = 1.6) -> Measured:
    """Plain decoding at 100 tokens per second, the setup at `speedup` times that."""
    return Measured(
        setup=setup,
        speedup=interval(speedup),
        end_to_end=interval(speedup - 0.1),
        plain_tok_per_s=interval(100.0, 1.0),
        tok_per_s=interval(100.0 * speedup, 2.0),
        p_value=0.001,
        num_prompts=24,
        num_partings=0,
        num_disturbed=0,
    )


def forecast(setup: Setup, speedup: float = 1.5) -> Forecast:
    return Forecast(
        setup=setup, tok_per_s=interval(100.0 * speedup, 4.0), speedup=interval(speedup), acceptance_length=2.4
    )


def choice(setup: Setup = PLAIN, /, **changes: object) -> Choice:
    """A greedy choice over all domains at batch 1, context 512; proven when it drafts; `changes` are other fields."""
    values: dict[str, object] = {
        "batch_size": 1,
        "context_length": 512,
        "domain": MIXED,
        "temperature": 0.0,
        "setup": setup,
        "reason": f"{setup.name} was the fastest.",
        "evidence": ("proof:1",),
    }
    if setup.draft is not None:
        values |= {"forecast": forecast(setup), "measured": measured(setup), "proven": True}
    return Choice(**values | changes)  # type: ignore[arg-type]


def policy(*choices: Choice) -> Policy:
    return Policy(created=CREATED, target=TARGET, environment=ENVIRONMENT, choices=choices or (choice(),))


def save_policy(book: Book, json_text: str, target: Model, environment: Environment) -> None:
    """Saves a text as the latest policy, whatever it is."""
    book.replace_policy(target, environment, lambda _: json_text)
