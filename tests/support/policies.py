"""Records the policy tests share: one target, one environment, and choices spelled by what differs."""

from dataclasses import replace

from profiles.records.core import PLAIN, Draft, Environment, Interval, Model, Setup
from store.evidence_store import EvidenceStore
from tests.support.fakes import MACHINE
from tuner.policy.estimates import Forecast, Measured
from tuner.policy.policy import Choice, Policy
from tuner.policy.prior import DraftAcceptance, Prior, RoundTimes
from tuner.policy.query import MIXED

TARGET = Model(name="family/target", dtype="float32", digest="aa" * 16, num_params=4_000_000)
ENVIRONMENT = replace(MACHINE, device="Example CPU", memory_bytes=8_000_000_000, engine="torch", engine_version="0.1.0")
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
        num_divergences=0,
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


def save_policy(evidence_store: EvidenceStore, json_text: str, target: Model, environment: Environment) -> None:
    """Saves a text as the latest policy, whatever it is."""
    evidence_store.replace_policy(target, environment, lambda _: json_text)


def acceptance(
    draft: int, accept_prob: float, *, propose_prob: float = 1.0, domain: str = MIXED, longest: int = 8
) -> DraftAcceptance:
    """A draft of which every position is accepted with the same probability."""
    mean_tokens, reached = [1.0], propose_prob
    for _ in range(longest):
        reached *= accept_prob
        mean_tokens.append(mean_tokens[-1] + reached)
    return DraftAcceptance(
        draft=draft,
        domain=domain,
        temperature=0.0,
        propose_prob=propose_prob,
        accept_probs=(accept_prob,) * longest,
        mean_tokens=tuple(mean_tokens[1:]),
        num_rounds=500.0,
    )


def round_times(draft: int | None, step_s: float, *, batch_size: int = 1, longest: int = 8) -> RoundTimes:
    """A plain round takes 10 ms, each proposed token `step_s` more."""
    return RoundTimes(
        draft=draft,
        batch_size=batch_size,
        context_length=512,
        temperature=0.0,
        max_length=0 if draft is None else longest,
        seconds=(0.01,) if draft is None else tuple(0.01 + step_s * proposed for proposed in range(longest + 1)),
        catch_up_s=0.0 if draft is None or step_s < 0.002 else 0.0001,
    )


def learning_policy() -> Policy:
    """Look-up k=8 at batch 1, a model at k=2 on code, plain decoding at batch 8, and a prior.

    The look-up proposes in half the rounds and has an acceptance probability of 0.8; a proposed token takes 1 ms. The
    model has 0.6 (0.8 on code) and takes 3 ms. At batch 8 a proposed token takes 8 ms.
    """
    prior = Prior(
        drafts=(NGRAM, CODE_DRAFT),
        lengths=tuple(range(1, 9)),
        acceptance=(
            acceptance(0, 0.8, propose_prob=0.5),
            acceptance(1, 0.6),
            acceptance(0, 0.4, propose_prob=0.5, domain="code"),
            acceptance(1, 0.8, domain="code"),
        ),
        round_times=(
            round_times(None, 0.0),
            round_times(0, 0.001),
            round_times(1, 0.003),
            round_times(None, 0.0, batch_size=8),
            round_times(0, 0.008, batch_size=8),
            round_times(1, 0.008, batch_size=8),
        ),
    )
    rows = (
        choice(Setup(draft=NGRAM, length=8)),
        choice(Setup(draft=CODE_DRAFT, length=2), domain="code"),
        choice(PLAIN, batch_size=8),
    )
    return replace(policy(*rows), prior=prior)
