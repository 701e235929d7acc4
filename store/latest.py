"""What the last run of a target left: its policy, and the figures that a report shows.

How either is shown it must not know.
"""

from typing import TYPE_CHECKING

from profiles.errors import InputError, NotMeasuredError
from store.book import Book
from store.deploy import read_policy
from tuner.policy import Policy

if TYPE_CHECKING:
    from tuner.report import Dossier


def find_policy(book: Book, target: str | None) -> Policy:
    """The latest policy of the target, of any when None. Raises NotMeasuredError: there is none."""
    text = book.latest_policy(target)
    if text is None:
        asked = f"of target {target!r} " if target else ""
        raise NotMeasuredError(f"no policy {asked}in store {book.place}: run `tune.py run` first")
    return read_policy(book, text)


def find_dossier(book: Book, policy: Policy) -> "Dossier":
    """What the target's last finished run left to be shown.

    Raises: NotMeasuredError: no run finished, or it ended before a forecast. InputError: what it left is damaged.
    """
    from tuner.report import Dossier

    raw = book.latest_outcome(policy.target, policy.environment).get("dossier")
    if raw is None:
        raise NotMeasuredError(f"no finished run of {policy.target.name} is in the store: run `tune.py run` first")
    try:
        dossier = Dossier.from_json(raw)
    except InputError as error:
        raise InputError(f"the last run in store {book.place}: {error}") from error
    if not any(anchor.candidates for anchor in dossier.anchors):
        raise NotMeasuredError(
            f"the last run of {policy.target.name} ended before a forecast: run it again, for longer"
        )
    return dossier
