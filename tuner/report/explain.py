"""Why this setup and not another, at one operating point: where a round's time goes and what it must yield."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rich.table import Table

from profiles.records.core import PLAIN, Interval
from profiles.records.errors import require
from tuner.plan.acceptance import rate_of
from tuner.report.data import Candidate, PointFigures
from tuner.report.tables import figures_table

MOST_ROWS = 12
ROUND_COLUMNS = ("tokens", "needed", "draft", "verify", "overhead")  # tokens, and milliseconds, of a mean round


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A candidate's mean round against plain decoding, by forecast.

    `break_even_length`: tokens a round must yield to be as fast as plain decoding. `break_even_acceptance`: the
    acceptance of every single token that yields them when each round drafts k tokens, None when none does;
    `acceptance` is what the candidate's own acceptance length comes to in the same way. Of a draft that was only run
    nothing is known of its rounds' time: None. `why_not` is empty for what was chosen.
    """

    setup_name: str
    state: str
    speedup: Interval
    measured: Interval | None
    race_speedup: float | None
    tok_per_s: Interval
    acceptance_length: float
    acceptance: float | None
    draft_s: float | None
    verify_s: float | None
    overhead_s: float | None
    round_s: float | None
    break_even_length: float | None
    break_even_acceptance: float | None
    why_not: str = ""

    @property
    def best_known(self) -> float:
        """The speed-up over plain decoding: measured, else of the race, else forecast."""
        if self.measured is not None:
            return self.measured.estimate
        return self.speedup.estimate if self.race_speedup is None else self.race_speedup


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answer for one operating point; `accounts`: the choice, the rival, then the rest, fastest first.

    `rival` is the setup asked about, else the runner-up; None where plain decoding is the only candidate.
    """

    domain: str
    batch_size: int
    context_length: int
    temperature: float
    chosen: str
    proven: bool
    reason: str
    plain_s_per_token: float
    rival: str | None
    accounts: tuple[Account, ...]


def explain(figures: PointFigures, instead: str | None = None) -> Explanation:
    """Why the choice of an operating point and not `instead` (None: the runner-up).

    The runner-up has the best known speed-up of those that could have been chosen. Candidates that failed before they
    had a forecast have no round to explain. Raises InputError for a setup that is no candidate, or is the choice
    itself, and where nothing was forecast.
    """
    choice, accounts = figures.choice, accounts_of(figures)
    chosen_name, domain = choice.setup.name, f"domain {choice.domain!r}"
    require(bool(accounts), f"{domain}: {figures.stopped or 'nothing was forecast'}; run again")
    allowed = ", ".join(accounts)
    for name in (chosen_name, chosen_name if instead is None else instead):
        require(name in accounts, f"setup {name!r} is no candidate for {domain}; allowed are {allowed}")
    require(instead != chosen_name, f"setup {instead!r} is what was chosen for {domain}; name another one")
    plain = next(row for row in figures.candidates if row.setup_name == PLAIN.name)
    chosen = accounts.pop(chosen_name)
    reasons = {candidate.setup_name: f"{candidate.state}: {candidate.reason}" for candidate in figures.candidates}
    figure = f"measured at {chosen.measured:.2f}" if chosen.measured else f"forecast at {chosen.speedup:.2f}"
    reasons[PLAIN.name] = f"{chosen_name} is {figure} times it"
    others = [replace(account, why_not=reasons[name]) for name, account in accounts.items()]
    others.sort(key=lambda other: (other.setup_name != instead, other.state == "infeasible", -other.best_known))
    return Explanation(
        domain=choice.domain,
        batch_size=choice.batch_size,
        context_length=choice.context_length,
        temperature=choice.temperature,
        chosen=chosen_name,
        proven=choice.proven,
        reason=choice.reason,
        plain_s_per_token=_token_s(plain),
        rival=others[0].setup_name if others else None,
        accounts=(chosen, *others),
    )


def accounts_of(figures: PointFigures) -> dict[str, Account]:
    """Where a round's time goes, by setup, of every candidate with a forecast; none where plain decoding has none."""
    candidates = {
        candidate.setup_name: candidate
        for candidate in figures.candidates
        if candidate.forecast_speedup and candidate.forecast_tok_per_s and candidate.acceptance_length
    }
    if PLAIN.name not in candidates:
        return {}
    plain_s = _token_s(candidates[PLAIN.name])
    return {name: _account(candidate, plain_s) for name, candidate in candidates.items()}


def _token_s(plain: Candidate) -> float:
    """Seconds of a token of plain decoding: of its round, else, where no round was timed, by its rate."""
    assert plain.forecast_tok_per_s  # else it would have been left out
    return (plain.round_split.total_s if plain.round_split else 0.0) or 1.0 / plain.forecast_tok_per_s.estimate


def needed_acceptance(acceptance_length: float, length: int) -> float | None:
    """The acceptance of each token at which rounds of `length` drafted tokens yield `acceptance_length` tokens.

    0 where a round needs no accepted token, None where k accepted tokens are not enough.
    """
    return None if acceptance_length > max(1, length + 1) else rate_of(acceptance_length, length)


def _account(candidate: Candidate, plain_s: float) -> Account:
    acceptance_length, length = candidate.acceptance_length, candidate.length
    assert candidate.forecast_speedup  # else it would have been left out, here and below
    assert candidate.forecast_tok_per_s
    assert acceptance_length
    round_s = candidate.round_split.total_s if candidate.round_split else None
    break_even = None if round_s is None else round_s / plain_s
    unknown = dict.fromkeys(("draft_s", "verify_s", "overhead_s"))
    return Account(
        setup_name=candidate.setup_name,
        state=candidate.state,
        speedup=candidate.forecast_speedup,
        measured=candidate.measured_speedup,
        race_speedup=candidate.race_speedup,
        tok_per_s=candidate.forecast_tok_per_s,
        acceptance_length=acceptance_length,
        acceptance=needed_acceptance(acceptance_length, length) if length else None,
        **(asdict(candidate.round_split) if candidate.round_split else unknown),
        round_s=round_s,
        break_even_length=break_even,
        break_even_acceptance=needed_acceptance(break_even, length) if length and break_even else None,
    )


def sentences(explanation: Explanation) -> list[str]:
    """The answer in a few lines for a terminal: the choice, what k = 0 costs, the rounds, and why the rival lost."""
    point = f"batch {explanation.batch_size}, context {explanation.context_length}"
    proven = "proven" if explanation.proven else "not proven"
    shown = explanation.accounts[:2]  # the choice and its rival
    return [
        f"{explanation.domain}, {point}, temperature {explanation.temperature:g}: {explanation.chosen}, {proven}",
        explanation.reason,
        f"Plain decoding (k = 0) takes {_ms(explanation.plain_s_per_token)} ms per token.",
        *(_round_sentence(account) for account in shown if account.setup_name != PLAIN.name),
        *(f"Not {account.setup_name}: {account.why_not}." for account in shown[1:]),
    ]


def _round_sentence(account: Account) -> str:
    if account.round_s is None or account.break_even_length is None:
        return (
            f"{account.setup_name} was run, not traced: it yields {account.acceptance_length:.2f} tokens per round and "
            f"decodes {account.best_known:.2f} times as fast as plain decoding; how a round's time splits is unknown."
        )
    drafted = "draft and verify" if account.draft_s is None else f"draft {_ms(account.draft_s)}, verify"
    needed = "which no acceptance yields"
    if account.break_even_acceptance is not None:
        has = "" if account.acceptance is None else f" (it has {account.acceptance:.2f})"
        needed = f"an acceptance of {account.break_even_acceptance:.2f} of each token{has}"
    return (
        f"A round of {account.setup_name} takes {_ms(account.round_s)} ms ({drafted} {_ms(account.verify_s)}, overhead "
        f"{_ms(account.overhead_s)}) and yields {account.acceptance_length:.2f} tokens; it breaks even with plain "
        f"decoding at {account.break_even_length:.2f} tokens, {needed}."
    )


def comparison(accounts: Sequence[Account]) -> Table:
    """The first candidates side by side: tokens a round against what it needs, and where its time goes."""
    title = "forecast of the mean round: tokens, and milliseconds"
    table = figures_table("setup", (*ROUND_COLUMNS, "speed-up"), title=title)
    for account in accounts[:MOST_ROWS]:
        cells = (*round_cells(account), f"{account.speedup.estimate:.2f}")
        style = "bold" if not account.why_not else "dim" if account.state == "infeasible" else ""
        table.add_row(account.setup_name, *cells, style=style)
    return table


def round_cells(account: Account) -> tuple[str, ...]:
    """The figures of `ROUND_COLUMNS`, for the terminal and the report's page."""
    needed = "-" if account.break_even_length is None else f"{account.break_even_length:.2f}"
    times = (_ms(account.draft_s), _ms(account.verify_s), _ms(account.overhead_s))
    return f"{account.acceptance_length:.2f}", needed, *times


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"
